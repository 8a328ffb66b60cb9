"""`icae prepare`."""

import json
import pathlib
import sys

from tqdm import tqdm

from icae_jax import errors
from icae_jax.cli import flags

HELP = "make a data set of downloaded files, for training and evaluation to read"
DISTIL = "distil"  # beside the sets: what is made of a teacher's answers


def run(argv: list[str]) -> int:
    """Prepares a set and prints what it holds and the sources to train on."""
    if argv[:1] == [DISTIL]:
        return _distil(argv[1:])
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
    parser.epilog += f". icae prepare {DISTIL} --help: a teacher's answers to a source's questions"
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


def _distil(argv):
    """Writes a teacher's answers and prints how many. Returns the exit code."""
    from icae_jax.objectives.targets import TEMPLATES
    from icae_jax.runtime import platforms
    from icae_jax.workflows import distil

    text = "write a teacher's greedy answers to a source's questions, as a source to train on"
    parser, default = flags.parser(f"prepare {DISTIL}", text), distil.Request("", "")
    add = parser.add_argument
    help_text = "contexts with questions, whose answers may be missing, as training reads them"
    add("--from", dest="source", required=True, metavar="SOURCE", help=help_text)
    help_text = "the file to write (.jsonl); the same command goes on with what is there"
    add("--output", required=True, metavar="FILE", help=help_text)
    help_text = "the teacher, which reads whole contexts; by default the base of --adapter"
    add("--base", default="", help=help_text)
    add("--base_dtype", choices=flags.BASE_DTYPES, metavar="DTYPE", help=flags.BASE_DTYPE_HELP)
    templates = {"choices": TEMPLATES, "metavar": f"{{{','.join(TEMPLATES)}}}"}
    help_text = "how it is asked (default: the adapter's, or plain)"
    add("--template", default="", **templates, help=help_text)
    add("--adapter", default="", help="an adapter, with whose decoder LoRA the teacher answers")
    add("--tfds_dir", help="folder of prepared sets, for sources tfds:NAME:SPLIT")
    help_text = "questions answered at once (default: %(default)s)"
    add("--batch_size", type=int, default=default.batch_size, help=help_text)
    help_text = "most tokens of an answer (default: %(default)s)"
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help=help_text)
    flags.json_flag(parser)
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    platforms.check()
    with tqdm(unit="question", desc=DISTIL, file=sys.stderr, disable=as_json) as bar:

        def tell(done, total):
            bar.total, bar.n = total, done
            bar.refresh()

        about = distil.distil(distil.Request(**args), tell)
    state = "prepared" if about["prepared_now"] else "already prepared, of these files"
    lines = [f"{about['path']}: {state}", f"  {errors.counted(about['answers'], 'answers')}"]
    lines += [f"  left out {errors.counted(n, what)}" for what, n in about["left_out"].items()]
    lines += ["", "To train on it:", f"  --config.data.train={about['path']}"]
    flags.print_result(about, as_json, "\n".join(lines))
    return 0


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
