"""`icae evaluate`."""

from icae_jax.cli import flags

HELP = "measure a compressor by one of the papers' suites, with intervals and a report"


def run(argv):
    from icae_jax.evaluation import evaluate
    from icae_jax.runtime import distributed

    parser = flags.parser("evaluate", HELP)
    flags.process_flags(parser)
    with distributed.ending_together(flags.BAD_INPUT):
        return evaluate.main(parser, argv)
