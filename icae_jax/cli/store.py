"""`icae store KIND`: what a folder of compressed documents holds, and its upkeep."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from icae_jax import errors
from icae_jax.cli import flags
from icae_jax.errors import UserError

if TYPE_CHECKING:
    from icae_jax.inference.store import Entry, Store, Writer
else:
    Entry = Store = Writer = object  # importing JAX takes seconds

HELP = "list, check and maintain a folder of compressed documents"
KINDS = {
    "ls": "list entries, chosen by the beginning of their ids or by metadata",
    "show": "all that is known of some entries",
    "stats": "what the store holds, its compressor, and the room that it takes",
    "verify": "read everything: checksums, shapes, whether all shards are there",
    "rm": "remove entries; compact gives back their room",
    "compact": "give back the room of entries that were replaced or removed",
    "export": "write entries into memory files",
    "import": "take memory files of the same compressor into the store",
}


def run(argv: list[str]) -> int:
    """Runs the verb. Returns the exit code 0; UserError on bad input and on damage."""
    args = _parser().parse_args(argv)
    args.run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = flags.parser("store", HELP)
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    runs = (_ls, _show, _stats, _verify, _rm, _compact, _export, _import)
    kind_parsers = {}
    for (kind, text), kind_run in zip(KINDS.items(), runs, strict=True):
        kind_parser = kinds.add_parser(kind, help=text, description=text, allow_abbrev=False)
        kind_parser.set_defaults(run=kind_run)
        kind_parser.add_argument("store", metavar="STORE", help="folder of the store")
        kind_parsers[kind] = kind_parser
    add = kind_parsers["ls"].add_argument
    add("--prefix", default="", help="only ids that begin so, in their order")
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only entries whose metadata have that value (JSON, else a text); may be repeated",
    )
    add("--limit", type=int, help="how many at most")
    add("--after", metavar="ID", help="begin behind that entry")
    for kind in ("show", "rm", "export"):
        kind_parsers[kind].add_argument(
            "--id", action="append", default=[], help="of an entry; may be repeated"
        )
    kind_parsers["rm"].add_argument(
        "--damaged", action="store_true", help="remove the entries that verify finds damaged"
    )
    kind_parsers["compact"].add_argument(
        "--unused",
        type=float,
        default=0.5,
        help="rewrite shards of which more than this part is not in use; %(default)s by default",
    )
    add = kind_parsers["export"].add_argument
    add("--to", required=True, help="memory file for the --id given; without --id, a new folder")
    add("--a_file", type=int, default=1024, help="entries of a memory file in that folder")
    add = kind_parsers["import"].add_argument
    add("--memory", action="append", required=True, help="memory file; may be repeated")
    add("--adapter", help="for a new store: the adapter, by default the one the memory names")
    flags.base_flags(kind_parsers["import"])
    for kind, kind_parser in kind_parsers.items():
        a_line = kind in ("ls", "show", "verify", "export", "import")
        flags.json_flag(kind_parser, f"print one JSON object{' a line' if a_line else ''}")
    return parser


# --- Reading ---


def _ls(args):
    from icae_jax.inference import store

    where = dict(map(_condition, args.where))
    with store.open_store(args.store) as opened:
        for entry in opened.find(where, args.prefix, args.limit, args.after):
            _print_entry(entry, args.json)


def _print_entry(entry: Entry, as_json: bool) -> None:
    line = f"{entry.tokens:>9,}{entry.memory_tokens:>8,}{entry.bytes:>13,}"
    line += f"{' kv ' if entry.has_kv else '    '} {_one_line(entry.id)}"
    if entry.metadata:
        line += f"  {json.dumps(entry.metadata, ensure_ascii=False)}"
    flags.print_result(entry.as_json(), as_json, line)


def _one_line(text: str) -> str:
    """An id as a line of a list shows it: quoted where it would break the line."""
    return text if text.isprintable() and text.strip() == text != "" else json.dumps(text)


def _condition(text: str) -> tuple[str, Any]:
    """What --where asks: a key and a value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--where {text}: give KEY=VALUE, such as --where lang=de")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def _show(args):
    from icae_jax.inference import store

    if not args.id:
        raise UserError("icae store show: give --id; icae store ls lists the ids")
    with store.open_store(args.store) as opened:
        for entry in opened.get(args.id):
            values = entry.as_json()
            text = "\n".join(f"{name:14} {_shown(value)}" for name, value in values.items())
            flags.print_result(values, args.json, text)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _stats(args):
    from icae_jax.inference import store

    with store.open_store(args.store) as opened:
        info = opened.info
        values = {
            **{name: getattr(info, name) for name in ("method", "layout", "dtype", "kv")},
            "adapter": info.adapter,
            "adapter_fingerprint": info.origin.adapter_fingerprint,
            "base": info.base,
            "base_fingerprint": info.origin.base_fingerprint,
            "created_by": info.created_by,
            "shards_at": info.shards or str(opened.shards.folder),
            **opened.stats(),
        }
    text = "\n".join(f"{name:20} {_figure(value)}" for name, value in values.items())
    flags.print_result(values, args.json, text)


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _verify(args):
    from icae_jax.inference import store

    with store.open_store(args.store) as opened:
        seen = _verified(opened, args.json)
    values = {name: value for name, value in vars(seen).items() if name != "damage"}
    values["damaged"] = len(seen.damage)
    notes = [f"{seen.pending} pending"] * bool(seen.pending)
    if seen.orphans:
        orphans = errors.counted(seen.orphans, "shards")
        notes.append(f"{orphans} that no entry names, which compact removes")
    flags.print_result(
        values,
        args.json,
        f"{args.store}: {errors.counted(seen.entries, 'entries')} in "
        f"{errors.counted(seen.shards, 'shards')} read, {len(seen.damage):,} damaged"
        + "".join(f"; {note}" for note in notes),
    )
    if seen.damage:
        raise UserError(
            f"store {args.store}: {errors.counted(len(seen.damage), 'things')} damaged, listed "
            "above; take the shards from a backup, or run icae store rm --damaged and compress "
            "again"
        )


def _verified(opened: Store, as_json: bool) -> Any:
    """What verify sees; damage is printed."""
    from icae_jax.inference import store

    seen = store.verify(opened)
    for damage in seen.damage:
        where = "" if damage.id is None else f"{_one_line(damage.id)}: "
        flags.print_result(damage._asdict(), as_json, f"damaged: {where}{damage.problem}")
    return seen


# --- Writing ---


def _rm(args):
    from icae_jax.inference import store

    if bool(args.id) == args.damaged:
        raise UserError("icae store rm: give either --id or --damaged")
    with store.Writer(args.store) as writer:
        ids = args.id
        if args.damaged:
            with store.open_store(args.store) as opened:
                ids = [d.id for d in store.verify(opened).damage if d.id is not None]
        removed = writer.remove(ids)
    flags.print_result(
        {"removed": removed},
        args.json,
        f"{args.store}: {errors.counted(removed, 'entries')} removed",
    )


def _compact(args):
    from icae_jax.inference import store

    if not 0 <= args.unused < 1:
        raise UserError(f"--unused {args.unused}: give a part from 0 to below 1, such as 0.5")
    with store.Writer(args.store) as writer:
        done = store.compact(writer, args.unused)
    text = f"{args.store}: {done.freed_bytes:,} bytes given back, {done.removed} shards removed, "
    text += f"{done.written} written"
    if done.damaged:
        text += f"; {errors.counted(done.damaged, 'entries')} left where they are, damaged"
    flags.print_result(vars(done), args.json, text)


def _export(args):
    from icae_jax import files
    from icae_jax.inference import store
    from icae_jax.inference.store import exchange

    with store.open_store(args.store) as opened:
        if args.id:
            exchange.export_file(opened, opened.get(list(dict.fromkeys(args.id))), args.to)
            written: Iterator[Any] = iter([args.to])
        else:
            files.check_new_folder(args.to)
            with errors.naming(f"--to {args.to}", "give a folder that can be written"):
                pathlib.Path(args.to).mkdir(parents=True, exist_ok=True)
            written = exchange.export_folder(opened, opened.find(), args.to, args.a_file)
        for path in written:
            flags.print_result({"memory": str(path)}, args.json, str(path))


def _import(args):
    from icae_jax.inference import store
    from icae_jax.inference.store import exchange

    info = None
    if not store.exists(args.store):
        from icae_jax.inference import loading

        compressor, _, _ = loading.load_with_memory(
            args.memory[0], args.adapter, args.base, dtype=args.base_dtype
        )
        info = store.Info.of(compressor)
    elif args.adapter or args.base:
        print(
            "note: the store says its compressor; --adapter and --base are not read",
            file=sys.stderr,
        )
    with store.Writer(args.store, info) as writer:
        for path in args.memory:
            counts = exchange.import_file(writer, path)
            flags.print_result(
                {"memory": path, **counts},
                args.json,
                f"{path}: {counts['stored']:,} stored, {counts['unchanged']:,} unchanged",
            )
