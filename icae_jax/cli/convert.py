"""`icae convert`."""

import argparse

from icae_jax.cli import flags

HELP = "convert base models and adapters between this package's formats and those of others"


KINDS = {
    "base": "a base model, into the hub's format or an Orbax copy",
    "adapter": "a trained compressor, from and to any format",
}


def run(argv):
    if not argv or argv[0] not in KINDS:
        return flags.tell_kinds("convert", KINDS, argv)
    from icae_jax.workflows import convert_adapter, convert_base

    parser = argparse.ArgumentParser(
        prog=f"icae convert {argv[0]}", description=f"convert {KINDS[argv[0]]}"
    )
    return (convert_base if argv[0] == "base" else convert_adapter).main(parser, argv[1:])
