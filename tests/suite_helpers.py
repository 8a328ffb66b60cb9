"""Shared by the suites' tests: texts, cached compressors, records by example, reference scores."""

import functools
import pathlib

import numpy as np
import pytest
from conftest import WORDS, random_lora, random_trained

from icae_jax.compression.config import CompressionConfig
from icae_jax.evaluation import examples as drawn
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

BOUND = 1e-5  # float32: what batch size and neighbours may change, relatively

load_base = functools.cache(bases.load_base)


def in_eights(self, count):
    """`Devices.rows` as on eight devices that each take a row: other numbers of texts then need
    no other programs.
    """
    return -(-count // 8) * 8


class InEights(Compressor):
    """A compressor whose batches are padded to multiples of eight."""

    def __init__(self, *args):
        super().__init__(*args)
        self.devices.rows = functools.partial(in_eights, self.devices)


@functools.cache
def compressor(
    path,
    method="icae",
    template="plain",
    layout="",
    k_choices=(2, 4),
    seed=0,
    trigger_token="",
    decoder_lora=False,
):
    """A random compressor of segments of 16 tokens; the same object for the same arguments, so that
    it compiles once.
    """
    base, k = load_base(path), k_choices[-1]
    config = CompressionConfig(
        method=method,
        k=k,
        rate=16 / k,
        k_choices=k_choices,
        layout=layout,
        trigger_token=trigger_token,
        decoder_lora=decoder_lora,
    )
    trained = random_trained(base.config, config.vectors, seed)
    if config.spec.tensors:
        trained |= config.spec.tensors(base.config, config)
    if decoder_lora:
        trained["decoder_lora"] = random_lora(base.config, seed=seed + 9)
    adapter = adapters.Adapter(
        config,
        LoraConfig(4),
        targets.make_template(template, base.tokenizer),
        trained,
        str(path),
        base.fingerprint,
    )
    return InEights(base, adapter, path)


def arms_of_k(method):
    """`{arm: k}` to try: for one method two of them, which is enough, as every shape takes time to
    compile.
    """
    return {"memory": 4, "memory k=2": 2} if method == "icae" else {"memory": 4}


def words(n, seed):
    return " ".join(np.random.default_rng(seed).choice(WORDS[7:], n))


def question(number, answers=("the cat", "a big red dog"), n=3):
    return drawn.Question(f"q{number}", words(n, [7, number]), tuple(answers))


def text(n, seed=0, questions=(), group="a", content=None):
    """A `Text` of n tokens."""
    content = words(n, [n, seed]) if content is None else content
    key = drawn._hash(content, *((q.text, q.answers) for q in questions))
    return drawn.Text(key, f"{n}-{seed}", group, content, tuple(questions))


def made(suite, *texts):
    """(examples, reasons of those left out)."""
    return drawn.make_examples({"a": list(texts)}, 0, suite)


def by_example(suite, examples, batch=None):
    """`{key: records}` of examples, measured `batch` at a time."""
    batch = batch or len(examples)
    found = {}
    for at in range(0, len(examples), batch):
        part = examples[at : at + batch]
        found |= {e.key: of for e, of in zip(part, suite.measure(part), strict=True)}
    return found


def measured(suite, *texts):
    """(examples, records of each) of texts of which none may be left out."""
    examples, left_out = made(suite, *texts)
    assert not left_out
    found = by_example(suite, examples)
    return examples, [found[e.key] for e in examples]


def same(got, want, only=None):
    """That records agree: who they are, labels counted, sums within `BOUND`, and the texts unless a
    tie was counted.

    Returns how many numbers were compared.
    """
    compared = 0
    assert got.keys() == want.keys()
    for key, of in want.items():
        assert len(got[key]) == len(of)
        for a, b in zip(got[key], of, strict=True):
            assert {n: a[n] for n in ("id", "cluster", "set", "group")} == {
                n: b[n] for n in ("id", "cluster", "set", "group")
            }
            assert (
                a["sums"].keys() == b["sums"].keys()
                and a["texts"].keys() == b["texts"].keys()
                and a["ties"].keys() == b["ties"].keys()
            )
            tied = {arm for one in (a, b) for arm, count in one["ties"].items() if count}
            assert {n: t for n, t in a["texts"].items() if n not in tied} == {
                n: t for n, t in b["texts"].items() if n not in tied
            }
            for metric, arms in b["sums"].items():
                assert list(a["sums"][metric]) == list(arms)
                for arm, numbers in arms.items():
                    loss = metric in ("perplexity", "ae_loss", "answer_loss")
                    if tied & {arm} and not loss:
                        continue
                    mine = a["sums"][metric][arm]
                    assert mine[1:] == numbers[1:] and abs(mine[0] - numbers[0]) <= (
                        BOUND * abs(numbers[0]) if loss else 0
                    )
                    compared += 1
    return compared


def near(numbers, *want, bound=2e-5):
    """That summed numbers are those of some `Score`s or (nats, labels): labels exactly, nats within
    `bound`.
    """
    want = [(-w.log_prob, w.tokens) if hasattr(w, "log_prob") else w for w in want]
    nats, labels = (sum(part) for part in zip(*want, strict=True))
    assert numbers[1] == labels and abs(numbers[0] - nats) <= bound * abs(nats), (
        numbers,
        nats,
        labels,
    )


# ------------------------------------------------------------------------------------- transformers


@functools.cache
def _model(path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        pathlib.Path(path), dtype=torch.float32
    ).eval()


def reference_nats(path, ids, first):
    """(negative log-likelihood, labels) of ids[first:] behind those before them, by transformers'
    logits.
    """
    import torch

    with torch.no_grad():
        log_probs = _model(path)(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids))), len(ids) - first


def reference_answer(path, prompt, limit, stops):
    """Ids that transformers' greedy generation writes behind a prompt, without a stop."""
    import torch

    prompt = torch.tensor([list(prompt)])
    out = _model(path).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(stops),
    )
    new = out[0, prompt.shape[1] :].tolist()
    return new[:-1] if new[-1] in stops else new
