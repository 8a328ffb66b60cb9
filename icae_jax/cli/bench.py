"""`icae bench`."""

import argparse

from icae_jax.cli import flags

HELP = "measure a training step on the devices at hand"


KINDS = {"train": "a training step: time, FLOPs, memory, compilation, and where the time goes"}


def run(argv):
    if not argv or argv[0] not in KINDS:
        return flags.tell_kinds("bench", KINDS, argv)
    from icae_jax.performance import bench

    parser = argparse.ArgumentParser(
        prog=f"icae bench {argv[0]}", description=f"measure {KINDS[argv[0]]}", allow_abbrev=False
    )
    return bench.main(parser, argv[1:])
