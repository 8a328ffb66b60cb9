"""`icae evaluate`."""

import argparse
import dataclasses
import pathlib
import sys

from icae_jax.cli import flags

HELP = "measure a compressor by one of the papers' suites, with intervals and a report"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _parser() -> argparse.ArgumentParser:
    from icae_jax.evaluation.suites import SUITES
    from icae_jax.evaluation.suites.common import Options
    from icae_jax.objectives.targets import TEMPLATES

    parser, default = flags.parser("evaluate", HELP), Options()
    flags.process_flags(parser)
    add = parser.add_argument
    add("--suite", required=True, choices=list(SUITES), help="what to measure")
    help_text = "adapter folder, workdir, checkpoint, hub id, or gs://…; several with suite ablate"
    add("--adapter", default=[], action="append", metavar="[NAME=]DIR", help=help_text)
    help_text = (
        "read memories from a store in place of compressing (suites qa, autoencode), of the "
    )
    help_text += "texts of --data by their content or id; --adapter is by default the one it names"
    add("--store", metavar="DIR", help=help_text)
    flags.base_flags(parser)
    help_text = "this host's devices, such as fsdp=4,tensor=2; by default batches use all of them"
    add("--mesh", help=help_text)
    help_text = "[NAME=]SOURCE, several joined by commas: JSON, tables, text, folders or globs of "
    help_text += "them, or tfds:NAME:SPLIT"
    add("--data", required=True, help=help_text)
    add("--tfds_dir", help="folder of prepared TFDS sets")
    help_text = "reference answer of questions without one; by default they are left out"
    add("--no_answer", default="", metavar="TEXT", help=help_text)
    help_text = "refuse empty texts and questions without an answer instead of leaving them out"
    add("--strict", action="store_true", help=help_text)
    add("--limit", type=int, default=0, help="most texts of each set; 0, the default, takes all")
    add("--seed", type=int, default=0, help="draws the texts and the bootstrap replicates")
    help_text = "folder of results.json and report.html (default: evaluation/SUITE-HASH); the "
    help_text += "same command continues what is there"
    add("--out", type=pathlib.Path, help=help_text)
    flags.json_flag(parser, "print what results.json holds")

    add = parser.add_argument_group("settings; each suite takes what concerns it").add_argument
    help_text = "contexts at once; changes no score (default: %(default)s)"
    add("--batch_size", type=int, default=default.batch_size, help=help_text)
    help_text = "memory tokens per segment, such as 2,11; by default all that the adapter supports"
    add("--k", type=flags.numbers, default=default.k, help=help_text)
    help_text = "tokens of a context, such as 128,256; by default what one segment holds"
    add("--context_lengths", type=flags.numbers, default=default.context_lengths, help=help_text)
    help_text = "at most (default: %(default)s)"
    add("--continuation_tokens", type=int, default=default.continuation_tokens, help=help_text)
    help_text = "of an answer (default: %(default)s)"
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help=help_text)
    help_text = "numbers of segments to join (default: 1,2,4)"
    add("--spans", type=flags.numbers, default=default.spans, help=help_text)
    help_text = "template for the base without a memory; by default the adapter's"
    templates = {"choices": ("", *TEMPLATES), "metavar": f"{{{','.join(TEMPLATES)}}}"}
    add("--plain_template", default="", **templates, help=help_text)
    help_text = "rising memory tokens per segment, such as 2,8,32: suite qa then also takes each "
    help_text += "answer from the first at which it is likely enough, or the last"
    add("--ladder", type=flags.numbers, default=default.ladder, help=help_text)
    help_text = "of --ladder: log-probability of an answer's tokens, in the mean, that is likely "
    help_text += "enough (default: %(default).3f, probability 0.9)"
    add("--threshold", type=float, default=default.threshold, help=help_text)
    help_text = "only these arms, joined by commas; by default all"
    add("--arms", type=_words, default=(), help=help_text)
    return parser


def run(argv: list[str]) -> int:
    """Runs one suite and prints its scores. Returns the exit code."""
    import jax

    from icae_jax.evaluation import evaluate, page
    from icae_jax.evaluation.suites.common import Options
    from icae_jax.runtime import distributed

    args = _parser().parse_args(argv)

    def taken(kind, but=()):
        names = {field.name for field in dataclasses.fields(kind)} - set(but)
        return {name: getattr(args, name) for name in names}

    def say(text):
        if jax.process_index() == 0:
            print(text, file=sys.stderr)

    with distributed.ending_together(flags.BAD_INPUT):
        options = Options(**taken(Options))
        adapters = evaluate.named_adapters(args.adapter)
        fields = taken(evaluate.Request, ("options", "adapters"))
        request = evaluate.Request(**fields, adapters=adapters, options=options)
        distributed.start(args.coordinator, args.processes, args.process)
        done = evaluate.evaluate(request, say)
        if jax.process_index() == 0:
            results, report = done.folder / evaluate.RESULTS, done.folder / evaluate.PAGE
            text = page.summary(done.result)
            text += f"\n\nresults   {results}\nreport    {report.resolve()}"
            flags.print_result(done.result, args.json, text)
        return 0
