"""Deliberate faults of `icae bench ask` (`faults.py` has those of the rest)."""

from faults import Mutant

TESTS = "test_bench_ask.py"

MUTANTS = [
    Mutant(
        "the run that compiles is a round",
        "performance/bench_ask.py",
        '    for turn in range(options.rounds):\n        _progress(f"context of',
        '    for turn in range(options.rounds - 1):\n        _progress(f"context of',
        f"{TESTS} -k take_turns",
    ),
    Mutant(
        "a ratio is upside down",
        "performance/bench_ask.py",
        "turn[over][key] / turn[under][key]",
        "turn[under][key] / turn[over][key]",
        f"{TESTS} -k take_turns",
    ),
    Mutant(
        "transformers runs behind all ways",
        "performance/bench_ask.py",
        'for name in (way, THEIRS) if way == "full" or name == way]',
        "for name in (way,)] + [THEIRS]",
        f"{TESTS} -k take_turns",
    ),
    Mutant(
        "tokens before the last one's first count as decoded",
        "performance/bench_ask.py",
        "sum(at > last for row",
        "sum(at > 0 for row",
        f"{TESTS} -k figures",
    ),
    Mutant(
        "texts are compared at their end",
        "performance/bench_ask.py",
        "margin[parting[0]]",
        "margin[parting[-1]]",
        f"{TESTS} -k margin_decides",
    ),
    Mutant(
        "all questions are about one context",
        "performance/bench_ask_ways.py",
        "default_rng([self.seed, tokens, i])",
        "default_rng([self.seed, tokens])",
        f"{TESTS} -k at_hand",
    ),
    Mutant(
        "the token behind the last is decoded too",
        "performance/bench_ask_ways.py",
        "Sampling(max_new_tokens=new_tokens, past_limit=False)",
        "Sampling(max_new_tokens=new_tokens)",
        f"{TESTS} -k at_hand",
    ),
    Mutant(
        "a full context has no question",
        "performance/bench_ask_ways.py",
        "[*self._head, *context, *self._plain_prompt] for",
        "[*self._head, *context] for",
        f"{TESTS} -k at_hand",
    ),
    Mutant(
        "a context that does not fit is noticed by the engine",
        "performance/bench_ask_ways.py",
        "if needed > positions:",
        "if needed > 2 * positions:",
        f"{TESTS} -k bad_input",
    ),
    Mutant(
        "requests are told in the order in which they ended",
        "performance/bench_ask_throughput.py",
        "        ended.sort(key=lambda running: running.request.tag)\n",
        "",
        f"{TESTS} -k own_tokens",
    ),
    Mutant(
        "a base in int8 is compared with one in float32",
        "performance/bench_ask_transformers.py",
        "if base_format not in DTYPES:",
        "if not base_format:",
        f"{TESTS} -k without_pytorch",
    ),
]
