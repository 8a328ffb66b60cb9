"""`icae cache`: lists and prunes the cache folder."""

from icae_jax.cli import flags

HELP = "list what the cache folder holds, or remove what was used least recently"


def run(argv: list[str]) -> int:
    """Lists or prunes the cache. Returns the exit code."""
    from icae_jax import cache, errors
    from icae_jax.data.tokens import CACHE_VERSION
    from icae_jax.errors import UserError

    parser = flags.parser("cache", HELP)
    add = parser.add_argument
    add(
        "action",
        choices=("list", "prune"),
        help="list what there is, its size and when it was last used; or prune it to the limit",
    )
    add(
        "--cache_dir",
        default="",
        help="another cache than $ICAE_CACHE, or ~/.cache/icae_jax: "
        "the data.cache_dir of a configuration",
    )
    default = f"${cache.VARIABLE} or {cache.DEFAULT_GIB:g}"
    add("--max_gib", help=f"prune: how many GiB may stay, by default {default}")
    add(
        "--all",
        action="store_true",
        help="prune: remove everything that no process uses, except bases copied from buckets",
    )
    add("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args(argv)
    if args.action == "list" and (args.all or args.max_gib is not None):
        parser.error("--all and --max_gib are for prune")
    root = cache.named_folder(args.cache_dir)
    if not args.cache_dir and (root is None or not root.exists()):
        root = cache.folder()  # perhaps one in the temporary directory
    elif not root.is_dir():
        raise UserError(f"{'--cache_dir' if args.cache_dir else 'cache'} {root}: no such folder")

    if args.action == "list":
        _print_list(cache.summary(cache.entries(root, CACHE_VERSION)), root, args.json)
        return 0
    most = cache.limit() if args.max_gib is None else cache.parse_gib(args.max_gib, "--max_gib")
    most = 0 if args.all else most
    with errors.naming(f"cache {root}: cannot be pruned"):
        removed = cache.prune(root, most, CACHE_VERSION, args.all)
    left = sum(e.size for e in cache.entries(root, CACHE_VERSION) if e.kind != "bases")
    freed = sum(entry.size for entry in removed)
    why = ", in use or used just now" if left > most else ""
    flags.print_result(
        {"removed": len(removed), "freed_bytes": freed, "left_bytes": left},
        args.json,
        f"{root}: freed {_size(freed)} ({len(removed)} removed), {_size(left)} left{why}",
    )
    return 0


def _print_list(rows, root, as_json):
    from icae_jax import cache

    for row in rows:
        notes = ["in use"] if row["in_use"] else []
        notes += ["outdated"] if row["outdated"] else []
        notes += [f"{row['count']:,} of them"] if row["count"] > 1 else []
        line = f"{row['what']:9}{_size(row['bytes']):>12}  {row['used']}  {row['name']}"
        flags.print_result(row, as_json, line + (f" ({', '.join(notes)})" if notes else ""))
    if not as_json:
        total = sum(row["bytes"] for row in rows if row["what"] != "bases")
        limit = f"{_size(cache.limit())} (${cache.VARIABLE})"
        print(f"{root}: {_size(total)} of {limit}, bases not counted")


def _size(size):
    gib = size / (1 << 30)
    return f"{gib:,.2f} GiB" if gib >= 0.1 else f"{1024 * gib:,.1f} MiB"
