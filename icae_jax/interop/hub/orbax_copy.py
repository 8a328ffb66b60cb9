"""An Orbax copy of a base's weights, from which each host reads only its own shards."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from icae_jax import errors
from icae_jax.errors import UserError
from icae_jax.interop.hub import placing, stored
from icae_jax.models import quantize, schemes

CHUNK_BYTES = 4 << 20  # small, so that a shard of a parameter is read without the rest
ORBAX = "params"  # the folder of the copy, beside config.json and the tokenizer's files
# In its place, if the copy is elsewhere: its URL, so that each host reads its shards from there.
ORBAX_URL = "params.url"


def is_orbax(folder: str | pathlib.Path) -> bool:
    """Whether a folder's weights are an Orbax copy and not safetensors files."""
    folder = pathlib.Path(folder)
    if any((folder / name).exists() for name in (stored.WHOLE, stored.INDEX)):
        return False
    return (folder / ORBAX / "_METADATA").is_file() or (folder / ORBAX_URL).is_file()


def save_orbax(folder: str | os.PathLike, params: dict) -> None:
    """Writes an Orbax copy of the parameters into `folder/params`, which must not exist.

    A quantised parameter is a folder of its arrays.
    """
    import orbax.checkpoint as ocp  # takes a second, which loading safetensors need not wait for

    params = jax.tree.map(
        lambda w: (
            {name: getattr(w, name) for name in schemes.LEAVES if hasattr(w, name)}
            if quantize.is_quantized(w)
            else w
        ),
        params,
        is_leaf=quantize.is_quantized,
    )
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            pathlib.Path(folder).resolve() / ORBAX, args=ocp.args.PyTreeSave(params, save_args=args)
        )


class OrbaxCopy:
    """The Orbax copy of a folder, which satisfies `is_orbax`.

    Attributes:
        blocks: by path, the block length of parameters in int8 that do not have one scale per
            output.
    """

    def __init__(self, folder: pathlib.Path):
        import tensorstore

        self._source = _location(folder)
        self._shapes = _stored_shapes(self._source)
        self.blocks = {}
        for path, codes in self._shapes.items():
            scales = self._shapes.get((*path[:-1], "scales"))
            if path[-1] == "codes" and scales is not None and len(scales) == len(codes):
                axis = -1 if path[:-1] == ("embed",) else -2
                if scales[axis] > 1 and codes[axis] % scales[axis] == 0:
                    self.blocks[path[:-1]] = codes[axis] // scales[axis]
        # Through tensorstore, in whose format Orbax writes: Orbax's own restore holds two shards,
        # and the chunks of 128 threads beside them.
        self._context = tensorstore.Context(
            {"file_io_concurrency": {"limit": 8}, "cache_pool": {"total_bytes_limit": 0}}
        )

    def check(self, targets: Mapping[placing.Path, jax.ShapeDtypeStruct]) -> None:
        """UserError if the copy's arrays are not those of the model."""
        _check_shapes(self._source, self._shapes, targets)

    def reader(
        self, path: placing.Path, dtype: DTypeLike
    ) -> Callable[[placing.Ranges], np.ndarray]:
        """What reads (start, stop) along each axis of an array, in a dtype."""
        import tensorstore

        kvstore = {"driver": "ocdbt", "base": _kvstore(self._source), "path": f"{'.'.join(path)}/"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        with _naming(self._source):
            array = errors.retrying(
                lambda: tensorstore.open(spec, read=True, context=self._context).result(),
                f"reading {self._source}",
            )
        array = tensorstore.cast(array, jnp.dtype(dtype))

        def read(ranges):
            slices = tuple(slice(*axis) for axis in ranges)
            with _naming(self._source):
                return errors.retrying(
                    lambda: array[slices].read().result(), f"reading {self._source}"
                )

        return read

    def int8_reader(self, path: placing.Path) -> None:
        """None: what is stored in int8 is read as it is."""


def _location(folder):
    """The path of a folder's Orbax copy, here or in a bucket."""
    url = folder / ORBAX_URL
    if not url.is_file():
        return folder.resolve() / ORBAX
    text = url.read_text(encoding="utf-8").strip()
    if "://" not in text or text.startswith("file:"):
        raise UserError(
            f"{url}: {text!r} is not where a bucket has an Orbax copy; "
            f"give its URL, such as gs://BUCKET/BASE/{ORBAX}"
        )
    return epath.Path(text)


def _stored_shapes(source):
    """The shape of every array of a copy, by its path."""
    import orbax.checkpoint as ocp

    with _naming(source), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        # If Orbax cannot read the metadata, it does not say why.
        errors.retrying((source / "_METADATA").read_bytes, f"reading {source}")
        metadata = checkpointer.metadata(source).item_metadata
        if metadata is None:
            raise UserError("files are missing")
    return {
        tuple(key.key for key in keys): tuple(x.shape)
        for keys, x in jax.tree_util.tree_leaves_with_path(metadata.tree)
    }


def _check_shapes(source, shapes, targets):
    """UserError if a copy's arrays are not those of the model."""
    missing, unknown = targets.keys() - shapes.keys(), shapes.keys() - targets.keys()
    stored.refuse(
        source,
        {
            "missing": [".".join(path) for path in missing],
            "not in the model of config.json": [".".join(path) for path in unknown],
            "of another shape": [
                f"{'.'.join(path)} has shape {shapes[path]}, "
                f"config.json implies {targets[path].shape}"
                for path in targets.keys() & shapes.keys()
                if shapes[path] != targets[path].shape
            ],
        },
    )


def _kvstore(source):
    """The tensorstore spec of a folder, here or in a bucket."""
    scheme, _, rest = str(source).rpartition("://")
    if not scheme:
        return {"driver": "file", "path": f"{source}/"}
    bucket, _, path = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{path}/"}


@contextlib.contextmanager
def _naming(source: object) -> Iterator[None]:
    """Names the copy where it is damaged, of which Orbax and tensorstore raise plain Exceptions."""
    try:
        yield
    except Exception as error:
        if errors.transient(error) or isinstance(error, MemoryError):
            raise
        cause = str(error).strip().splitlines()
        raise UserError(
            f"{source}: not a readable Orbax copy of a base ({cause[0] if cause else error!r}); "
            "make it anew"
        ) from error
