"""`icae prepare`."""

import json
import pathlib
import sys

from icae_jax import errors
from icae_jax.cli import flags

HELP = "make a data set of downloaded files, for training and evaluation to read"


def run(argv: list[str]) -> int:
    """Prepares a set and prints what it holds and the sources to train on."""
    from icae_jax.data import builders
    from icae_jax.workflows import prepare

    args = _flags(builders, prepare.PROCESSES).parse_args(argv)
    builder_class = builders.builder(args.set)
    request = prepare.make_request(
        builder_class, args.set, args.sources, args.only, args.split, args.field
    )
    strict = "--strict" if args.strict else ""
    about = prepare.describe(
        *prepare.prepare(builder_class, request, args.tfds_dir, args.name, args.processes, strict)
    )
    if about["left_out"]:
        print(f"{about['path']}: left out {about['left_out']}", file=sys.stderr)
    print(json.dumps(about) if args.json else _text(about, args.tfds_dir))
    return 0


def _flags(builders, processes):
    parser = flags.parser("prepare", HELP)
    parser.epilog = "Sets: " + "; ".join(
        f"{name}, of {builders.builder(name).ABOUT}" for name in builders.NAMES
    )
    add = parser.add_argument
    add("set", metavar="NAME", help=f"which set: {', '.join(builders.NAMES)}")
    add(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="FILE_OR_FOLDER",
        help="the downloaded files, plain or packed, or folders that hold them",
    )
    add("--tfds_dir", required=True, help="folder of prepared sets, as training's data.tfds_dir")
    add("--only", help="parts of the set, by commas: splits, subsets, or both, as train/SQuAD")
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="json_text: a split and its files, instead of --from; may be given many times",
    )
    add("--field", help="json_text: the field that holds the text (default: text)")
    add("--name", default="", help="a name to tell this set from others of its kind")
    add(
        "--strict",
        action="store_true",
        help="refuse empty texts and questions without an answer; by default they are left out",
    )
    add(
        "--processes",
        type=int,
        default=processes,
        help="processes that read and write (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _text(about, tfds_dir):
    state = "prepared" if about["prepared_now"] else "already prepared, of these files"
    lines = [f"{about['path']}: {state}"]
    splits, months = about["splits"], about["months"]
    if months:
        count = sum(splits[month]["examples"] for month in months)
        lines.append(
            f"  {errors.counted(len(months), 'months')}, one split each, "
            f"{errors.counted(count, 'examples')}"
        )
    lines += [
        f"  {name:12} {errors.counted(split['examples'], 'examples'):>21} in "
        f"{errors.counted(split['shards'], 'shards')}"
        for name, split in splits.items()
        if name not in months
    ]
    lines += [f"  {errors.counted(count, what)}" for what, count in about["noted"].items()]
    lines += [
        f"  {folder}: left by a preparation that was killed, unless one is running; "
        "it can be deleted"
        for folder in about["incomplete"]
    ]
    lines += ["", "To train on it:"]
    folder = pathlib.Path(tfds_dir)  # without a slash at its end
    lines += [
        f"  --config.data.train={source} --config.data.tfds_dir={folder}   # {size:,} examples"
        for source, size in about["sources"].items()
    ]
    return "\n".join(lines)
