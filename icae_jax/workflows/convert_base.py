"""`icae convert base`: a base model from any source into a new folder, in the hub's format or as an Orbax copy, in any dtype."""

import pathlib
import shutil

import jax

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations, orbax_copy, weights
from icae_jax.models.families import tensor_names
from icae_jax.models.families.config_json import parse_config, stored_dtype

DTYPES = ("bfloat16", "float32", "float16")
FORMATS = ("hub", "orbax")
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
MOST_BYTES = 256 << 20  # of a file that is no weights


def carried(folder):
    """The folder's files that a copy of the base needs beside config.json and weights: generation_config.json, the tokenizer, a licence."""
    for path in sorted(pathlib.Path(folder).iterdir()):
        named = (
            path.name == orbax_copy.ORBAX_URL
            or path.name.endswith(".index.json")
            or path.name.startswith((".", "README"))
        )
        other = (
            named or path.suffix in WEIGHTS or path.suffix == ".py"
        )  # code of the base's own is never run
        if (
            path.name != "config.json"
            and path.is_file()
            and not other
            and path.stat().st_size <= MOST_BYTES
        ):
            yield path


def convert(source, to, form="hub", dtype=None, progress=False):
    """Writes a base into a new folder and returns a line that says what was written.

    source: see `locations.local_folder`. form: "hub" (safetensors) or "orbax" (`params/`). dtype: one of DTYPES, by default the source's
    own. config.json keeps everything but its dtype, so that transformers loads the same model. The weights pass through our tree, so
    what is written has been checked. UserError, before anything is written, where `to` holds something or the source does not load.
    """
    to = pathlib.Path(to)
    files.check_new_folder(to, "--to")
    folder = locations.local_folder(source, progress)
    if to.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--to {to} is inside --from {source}; give a folder elsewhere")
    path = folder / "config.json"
    raw = files.read_json(path, "the base model's configuration")
    config = parse_config(raw, path)
    dtype = dtype or stored_dtype(raw, path) or "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"{path}: dtype is {dtype!r}; choose one with --dtype: {', '.join(DTYPES)}")
    params = weights.load_params(folder, config, dtype, _on_the_host(), progress)
    stated = [field for field in ("dtype", "torch_dtype") if field in raw] or ["dtype"]
    with files.replacing_folder(to) as tmp:
        for file in carried(folder):
            shutil.copyfile(file, tmp / file.name)
        files.write_json(tmp / "config.json", raw | dict.fromkeys(stated, dtype))
        if form == "orbax":
            orbax_copy.save_orbax(tmp, params)
        else:
            weights.save_params(tmp, config, params, dtype)
    leaves = jax.tree.leaves(params)
    tensors = len(leaves) if form == "orbax" else len(tensor_names.tensor_names(config))
    size, identity = sum(x.nbytes for x in leaves), bases.fingerprint(config, params)
    return f"{to}: {form} format, {tensors} tensors in {dtype}, {size:,} bytes, fingerprint {identity[:12]}"


def _on_the_host():
    """The sharding that keeps arrays in the host's memory, which is larger than an accelerator's; None where JAX has no CPU backend."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return None


def main(parser, argv):
    """The verb: adds its flags to the parser, converts, prints one line."""
    parser.add_argument(
        "--from",
        required=True,
        dest="source",
        help="folder, hub id (org/name or org/name@revision), or gs://…",
    )
    parser.add_argument("--to", required=True, type=pathlib.Path, help="new folder to write")
    parser.add_argument(
        "--format",
        default="hub",
        choices=FORMATS,
        help="hub: safetensors; orbax: what many hosts start from faster",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; by default the source's own"
    )
    args = parser.parse_args(argv)
    print(convert(args.source, args.to, args.format, args.dtype, progress=True))
    return 0
