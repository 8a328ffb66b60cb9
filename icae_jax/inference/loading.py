"""Loading compressors: a base with an adapter, perhaps with a memory file to read."""

import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference import memory_file, store
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.memory_file import TextId
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.runtime import sharding
from icae_jax.training import trained
from icae_jax.training.trained import Trained


def load_base(
    source: str | os.PathLike,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> bases.Base:
    """A base for a `Compressor`, split over the mesh's devices, by default on one device.

    source: folder, hub id or URL. dtype: see `load`.
    """
    activations, quantize = bases.precision(dtype)
    placement = None if mesh is None else sharding.Placement(mesh, bases.sizes(source))
    return bases.load_base(
        source,
        jnp.dtype(activations),
        None if placement is None else placement.parameter,
        progress=jax.process_index() == 0,
        quantize=quantize,
    )


def load(
    adapter: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Compressor:
    """Loads a `Compressor`.

    Args:
        adapter: adapter folder, training workdir, checkpoint, hub id `org/name[@revision]`, or URL
            (gs://…), see `training.trained.find`.
        base: model-hub folder, hub id or URL; by default the one that the adapter names.
        dtype: of base and activations, "float32" or "bfloat16"; or a scheme of `models.schemes`,
            such as "int8", for the base alone. None is float32, or what the base is stored in.
        mesh: devices (`runtime.sharding`) that base and batches are split over, by default one.

    Raises:
        UserError: the base is not the one that the adapter was trained on.
    """
    found = trained.find_whole(adapter)
    loaded = load_base(base or trained.base_of(found), dtype, mesh)
    return load_onto(loaded, found, dtype, mesh)


def load_onto(
    base: bases.Base,
    found: Trained,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Compressor:
    """The `Compressor` of a trained compressor that was found, and of a loaded base.

    dtype, mesh: those that the base was loaded with. UserError as for `load`.
    """
    name, adapter = trained.open_adapter(found, base)
    activations, _ = bases.precision(dtype)
    return Compressor(base, adapter, name, activations, mesh)


def load_with_memory(
    memory_path: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    only_ids: Sequence[str] = (),
) -> tuple[Compressor, Memory, list[TextId]]:
    """A memory file's compressor, memory and ids.

    Args:
        memory_path: the memory file.
        adapter: as for `load`; by default the one that the memory names.
        base: as for `load`.
        dtype: as for `load`.
        mesh: as for `load`.
        only_ids: only the texts of these ids, by default all.

    Raises:
        UserError: the file is damaged, is of another adapter or base, or lacks an id.
    """
    metadata = memory_file.read_metadata(memory_path)
    rows = memory_file.rows_of(memory_file.read_ids(memory_path, metadata), only_ids)
    adapter = adapter or metadata["adapter"]
    _check_here(adapter, f"--memory {memory_path}")
    compressor = load(adapter, base, dtype=dtype, mesh=mesh)
    memory, ids = compressor.load_memory(memory_path)
    if only_ids:
        memory, ids = memory[rows], [ids[row] for row in rows]
    return compressor, memory, ids


def load_with_store(
    store_path: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Compressor, store.Store]:
    """A store, and the compressor that reads it.

    Args:
        store_path: the store's folder.
        adapter: as for `load`; by default the one that the store names.
        base: as for `load`; by default the one that the store names, if it is here.
        dtype: as for `load`.
        mesh: as for `load`.

    Raises:
        UserError: another adapter or base filled the store, or the one that it names is gone.
    """
    opened = store.open_store(store_path)
    adapter = adapter or opened.info.adapter
    _check_here(adapter, f"--store {store_path}")
    compressor = load(adapter, base or store_base(opened.info), dtype=dtype, mesh=mesh)
    opened.check(compressor)
    return compressor, opened


def store_base(info: store.Info) -> str | None:
    """The base that a store names; None where it is not to be had, so that the adapter's counts."""
    here = pathlib.Path(info.base).exists() or locations.is_remote(info.base)
    return info.base if info.base and here else None


def _check_here(adapter: str | os.PathLike, what: str) -> None:
    """UserError if the adapter that a memory file or a store names is gone."""
    if not pathlib.Path(adapter).is_dir() and not locations.is_remote(str(adapter)):
        raise UserError(
            f"{what} names adapter {adapter}, which is not here; give the adapter's folder with "
            "--adapter"
        )
