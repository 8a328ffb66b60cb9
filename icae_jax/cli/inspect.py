"""`icae inspect`."""

import json

from icae_jax.cli import flags

HELP = "say what a file or folder is, its sizes, its method, and which bases fit"


def run(argv: list[str]) -> int:
    """Prints what a path, or a base alone, is; returns 2 if a base given does not fit."""
    from icae_jax.workflows import inspection

    parser = flags.parser("inspect", HELP)
    parser.add_argument(
        "path",
        nargs="?",
        help="file or folder, or an adapter's hub id or gs://…; without it, --base is described",
    )
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        help="a base to try: folder, FILE.gguf, hub id, or gs://…; may be given many times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.path is None and len(args.base) != 1:
        parser.error("give a path, or one --base to describe")
    if args.path is None:
        about, verdicts = inspection.describe_base(args.base[0]), {}
    else:
        about = inspection.describe(args.path)
        verdicts = inspection.try_bases(args.path, about, args.base)
    fits = {base: fit for base, (fit, _) in verdicts.items()}
    if args.json:
        print(json.dumps(about | ({"fits": fits} if fits else {}), ensure_ascii=False))
    else:
        rows = [(name.replace("_", " "), _text(value)) for name, value in about.items()]
        rows += [
            ("fits" if fit else "does not fit", f"{base} ({why})")
            for base, (fit, why) in verdicts.items()
        ]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:{width}}  {text}" for name, text in rows))
    return 0 if all(fits.values()) else flags.BAD_INPUT


def _text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
