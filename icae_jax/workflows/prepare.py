"""`icae prepare`: the papers' data sets and local corpora, from downloaded files into TFDS sets that training reads."""

import os
import pathlib
import re
import sys

from icae_jax import errors, lock
from icae_jax.data import builders
from icae_jax.data.builders.inputs import Request
from icae_jax.data.tfds_sets import PREFIX, SPLIT_OF_MONTH
from icae_jax.errors import UserError

PROCESSES = min(8, os.cpu_count() or 1)
FLAG_OF = {
    "paths": "from",
    "only": "only",
    "patterns": "split",
    "field": "field",
}  # fields of a request by the flag that sets them


def _pattern(text):
    split, equals, pattern = text.partition("=")
    if not (split and equals and pattern):
        raise UserError(
            f"--split {text}: give NAME=GLOB, such as --split train='corpus/train-*.jsonl.zst'"
        )
    return split, pattern


def make_request(args, builder):
    """The `Request` of parsed flags. UserError names one that this set does not take."""
    only = tuple(name.strip() for name in (args.only or "").split(",") if name.strip())
    given = {
        "paths": tuple(args.sources),
        "only": only,
        "patterns": tuple(map(_pattern, args.split)),
        "field": args.field,
    }
    given = {field: value for field, value in given.items() if value}
    for field in given:
        if FLAG_OF[field] not in builder.FLAGS:
            takes = ", ".join(f"--{flag}" for flag in builder.FLAGS)
            raise UserError(f"--{FLAG_OF[field]}: {args.set} does not take it; it takes {takes}")
    return Request(**given)


def prepare(builder_class, request, tfds_dir, name="", processes=PROCESSES, strict=""):
    """Prepares a set of `request` in tfds_dir; returns (its builder, whether there was anything to do).

    name: of this one among several of its kind. strict: as `common.LocalBuilder` has it.
    UserError names what is absent or malformed; nothing is taken for prepared then.
    """
    import tensorflow_datasets as tfds
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # TFDS warns of every --name
    if processes < 1:
        raise UserError(f"--processes is {processes}; it must be positive")
    if name and not re.fullmatch(r"[A-Za-z]\w*", name):
        raise UserError(f"--name is {name!r}; give letters, digits and _, a letter first")
    if "://" in str(tfds_dir):
        raise UserError(
            f"--tfds_dir {tfds_dir}: sets are prepared in a local folder; copy it there when it is done"
        )
    config = tfds.core.BuilderConfig(name=name, version=builder_class.VERSION) if name else None
    builder = builder_class(
        request=request, processes=processes, strict=strict, data_dir=tfds_dir, config=config
    )
    with errors.naming(f"--tfds_dir {tfds_dir}", "give a folder that can be written"):
        pathlib.Path(tfds_dir).mkdir(parents=True, exist_ok=True)
    if builder.data_path.exists():
        return builder, builder.prepare()
    with lock.only_writer(builder.data_path.parent, "--tfds_dir"):
        return builder, builder.prepare()


def sources_of(builder):
    """What to give as data.train or data.eval: `{source: examples}`; months together, as a range."""
    name = f"{PREFIX}{builder.name}{f'/{builder.builder_config.name}' if builder.builder_config else ''}"
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    months = sorted(split for split in sizes if SPLIT_OF_MONTH.fullmatch(split))
    if not months:
        return {f"{name}:{split}": size for split, size in sizes.items()}
    first, last = (month.replace("_", "-") for month in (months[0], months[-1]))
    return {
        f"{name}:{first}..{last}" if len(months) > 1 else f"{name}:{first}": sum(
            sizes[m] for m in months
        )
    }


def main(parser, argv):
    """Prepares a set and prints what it holds and the sources to train on. Returns 0."""
    parser.epilog = "Sets: " + "; ".join(
        f"{name}, of {builders.builder(name).ABOUT}" for name in builders.NAMES
    )
    parser.add_argument("set", metavar="NAME", help=f"which set: {', '.join(builders.NAMES)}")
    help_text = "the downloaded files, plain or packed, or folders that hold them"
    parser.add_argument(
        "--from", dest="sources", nargs="+", default=[], metavar="FILE_OR_FOLDER", help=help_text
    )
    parser.add_argument(
        "--tfds_dir", required=True, help="folder of prepared sets, the data.tfds_dir of training"
    )
    parser.add_argument(
        "--only",
        help="parts of the set, by commas: splits, subsets, or SPLIT/SUBSET, such as train/SQuAD",
    )
    help_text = "json_text: a split and its files; may be given many times, in place of --from"
    parser.add_argument("--split", action="append", default=[], metavar="NAME=GLOB", help=help_text)
    parser.add_argument("--field", help="json_text: the field that holds the text, by default text")
    parser.add_argument(
        "--name", default="", help="a name for this one, where several of a kind stand side by side"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse empty texts and questions without an answer, left out otherwise",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=PROCESSES,
        help=f"processes that read and write, by default {PROCESSES}",
    )
    args = parser.parse_args(argv)
    builder_class = builders.builder(args.set)
    request, strict = make_request(args, builder_class), "--strict" if args.strict else ""
    builder, made = prepare(
        builder_class, request, args.tfds_dir, args.name, args.processes, strict
    )
    if builder.sieve.left_out:
        print(f"{builder.data_path}: left out {builder.sieve}", file=sys.stderr)
    print(f"{builder.data_path}: {'prepared' if made else 'already prepared, of these files'}")
    of_months = [
        info for split, info in builder.info.splits.items() if SPLIT_OF_MONTH.fullmatch(split)
    ]
    if of_months:
        print(
            f"  {len(of_months)} months, one split each, {sum(info.num_examples for info in of_months):,} examples"
        )
    for split, info in builder.info.splits.items():
        if info not in of_months:
            print(f"  {split:12} {info.num_examples:>12,} examples in {info.num_shards} shard(s)")
    for what, count in builder.info.metadata["noted"].items():
        print(f"  {count:,} {what}")
    for folder in builder.left_overs():
        print(
            f"  {folder}: left by a preparation that was killed, unless one is running; it can be deleted"
        )
    print("\nTo train on it:")
    for source, size in sources_of(builder).items():
        print(
            f"  --config.data.train={source} --config.data.tfds_dir={pathlib.Path(args.tfds_dir)}   # {size:,} examples"
        )
    return 0
