"""Compresses a collection of any size into a store: streamed, resumable, by several processes."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.data import sources
from icae_jax.data.documents import Documents
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError
from icae_jax.inference import loading, store
from icae_jax.inference.batching import concatenate
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.texts import Size
from icae_jax.inference.writing import Work
from icae_jax.runtime import sharding
from icae_jax.workflows.store_work import Group, Prepared, Problems, Share

REMOVED_AT_ONCE = 512  # entries

Tell = Callable[[Sequence[str]], Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is compressed into which store.

    Attributes:
        input: a source of texts, see `data/README.md`.
        store: its folder.
        adapter: what compresses, see `trained.find`; "" for the one that the store names.
        base: folder, hub id or URL; None for the store's, or the adapter's.
        base_dtype: see `loading.load`.
        size: of the memories.
        dtype: of the store's numbers; None for the store's own, float32 for a new one.
        kv: whether the decoder's K/V of head and slots are stored beside them; a store that has
            them goes on to.
        metadata: fields of a row that are kept; () for what its field `metadata` holds.
        batch_size: whole segments encoded at once.
        mesh: such as "fsdp=4,tensor=2", of this host's devices; None for one device.
        strict: whether documents that cannot be stored are an error.
        prune: whether entries are removed whose documents the input no longer has.
        process: of this process, from 0.
        processes: how many share the input; they need not know of each other.
        shards: a URL or folder for the shards of a new store.
    """

    input: str
    store: str
    adapter: str = ""
    base: str | None = None
    base_dtype: str | None = None
    size: Size = Size()
    dtype: str | None = None
    kv: bool = False
    metadata: tuple[str, ...] = ()
    batch_size: int = 16
    mesh: str | None = None
    strict: bool = False
    prune: bool = False
    process: int = 0
    processes: int = 1
    shards: str | None = None

    def check(self) -> None:
        """UserError if a field cannot be."""
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--process {self.process} --processes {self.processes}: give how many there are, "
                "and a number from 0 below that"
            )
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; it must be at least 1")
        if not self.adapter and not store.exists(self.store):
            raise UserError("--adapter is not given; name the compressor that fills the new store")


def compress_store(request: Request, tell: Tell = lambda ids: None) -> dict[str, Any]:
    """Compresses what of an input is not in a store yet.

    The input is read twice: first to see what is to do, and whether all of it can be done. The base
    is loaded only if something is.

    tell: called with the ids of each shard as soon as it is on disk.

    Returns counts and sizes. UserError, before the base is loaded, if input, store and compressor
    do not go together.
    """
    request.check()
    sources.check_present(request.input)
    began, problems = time.monotonic(), Problems(request.strict)
    there = _stated(request.store)
    prepared, info = _prepare(request, there)
    request.size.check(prepared.config)
    share = Share(prepared, info, request.size, request.process, request.processes)
    result: dict[str, Any] = {"store": str(request.store), "documents": 0, "stored": 0}
    result |= {"unchanged": 0, "metadata_changed": 0, "pruned": 0, "shards": 0}
    result |= {"context_tokens": 0, "memory_tokens": 0, "bytes": 0, "padding": 0.0}
    writer = compressor = None
    try:
        if there is not None:
            writer = store.Writer(request.store, None, request.process, request.processes)
        survey = _survey(request, share, writer, problems)
        documents = survey.documents
        if survey.stored:
            compressor = _load(request, prepared)
            if writer is None:
                full = dataclasses.replace(info, origin=compressor.origin)
                where = (request.process, request.processes, request.shards)
                writer = store.Writer(request.store, full, *where)
            else:
                writer.info.check_compressor(request.store, compressor)
        if survey.stored or survey.metadata:
            documents.close()
            documents = Documents(request.input, request.metadata)  # what is wrong is told already
            result |= _fill(request, share, writer, compressor, documents, survey.tokens, tell)
        if writer is not None and request.process == 0:
            writer.merge()
            if request.prune:
                result["pruned"] = _prune(request.store, writer, documents)
    finally:
        if writer is not None:
            writer.close()
    result |= {"documents": survey.seen, "unchanged": survey.unchanged}
    result |= {"problems": problems.count, "problem_documents": problems.kept}
    result["left_out"] = survey.documents.sieve.counts
    result["ratio"] = result["context_tokens"] / max(1, result["memory_tokens"])
    return result | {"seconds": time.monotonic() - began}


def _stated(path: str) -> store.Info | None:
    """What a store says of itself; None if there is none yet."""
    if not store.exists(path):
        return None
    with store.open_store(path) as reader:
        return reader.info


def _prepare(request: Request, there: store.Info | None) -> tuple[Prepared, store.Info]:
    """The compressor without its base, and what the store says of itself once it is loaded."""
    adapter = request.adapter or there.adapter
    base = request.base or (None if there is None else loading.store_base(there))
    prepared = Prepared(adapter, base, request.base_dtype)
    kv = request.kv or bool(there is not None and there.kv)
    dtype = request.dtype or (there.dtype if there is not None else "float32")
    template = prepared.adapter.template.name if kv else ""
    info = store.Info.of(prepared, dtype, template, base=prepared.base_path)
    if there is not None:
        there.check(request.store, info)
    if kv and not prepared.config.spec.memory.RUNS_IN_DECODER:
        raise UserError(
            f"--kv: the memory of method {prepared.config.method} is K/V already, which no pass of "
            "the decoder has to make; leave --kv out"
        )
    return prepared, info


def _load(request: Request, prepared: Prepared) -> Compressor:
    mesh = sharding.local_mesh(sharding.parse(request.mesh)) if request.mesh else None
    base = loading.load_base(prepared.base_path, request.base_dtype, mesh)
    return loading.load_onto(base, prepared.found, request.base_dtype, mesh)


# --- The first pass ---


@dataclasses.dataclass
class _Survey:
    """What is to do: documents to store, their tokens, metadata to change; and what is there."""

    documents: Documents
    seen: int = 0
    stored: int = 0
    tokens: int = 0
    metadata: int = 0
    unchanged: int = 0


def _survey(
    request: Request, share: Share, writer: store.Writer | None, problems: Problems
) -> _Survey:
    """Reads the whole input. UserError if it is malformed or empty."""
    sieve = Sieve("--strict" if request.strict else "", questions=False)
    documents = Documents(request.input, request.metadata, sieve, problems.add)
    survey = _Survey(documents)

    def refuse(document, why):
        documents.leave_out(document.id)
        problems.add(document, why)

    for group in share.work(documents, writer, refuse):
        survey.stored += len(group.documents)
        survey.tokens += group.tokens
        survey.metadata += len(group.metadata)
        survey.unchanged += group.unchanged
    survey.seen = survey.stored + survey.metadata + survey.unchanged + problems.count
    if request.processes == 1:
        sieve.check_some(survey.seen, f"--input {request.input}")
    if sieve.left_out:
        print(f"--input {request.input}: left out {sieve}", file=sys.stderr, flush=True)
    return survey


# --- The second pass ---


def _fill(
    request: Request,
    share: Share,
    writer: store.Writer,
    compressor: Compressor | None,
    documents: Documents,
    tokens: int,
    tell: Tell,
) -> dict[str, Any]:
    """Stores what is to do, a shard for each group. tokens: to compress, for the progress bar."""
    counts = {"stored": 0, "metadata_changed": 0, "shards": 0}
    counts |= {"context_tokens": 0, "memory_tokens": 0, "bytes": 0}
    work = Work(0, 0)
    bar = tqdm(
        total=tokens,
        desc="compressing",
        unit="token",
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not tokens,
    )
    with bar:
        leave_out = documents.leave_out
        for group in share.work(documents, writer, lambda document, _: leave_out(document.id)):
            if group.metadata:
                writer.set_metadata(group.metadata)
                counts["metadata_changed"] += len(group.metadata)
            if group.documents:
                entries, done = _entries(compressor, group, request.batch_size, bool(share.info.kv))
                writer.add_shard(entries)
                tell([entry.id for entry in entries])
                work = Work(work.tokens + done.tokens, work.computed + done.computed)
                counts["stored"] += len(entries)
                counts["shards"] += 1
                counts["context_tokens"] += group.tokens
                memory_tokens = sum(int(entry.memory.tokens[0]) for entry in entries)
                counts["memory_tokens"] += memory_tokens
                counts["bytes"] += sum(_nbytes(share.info, entry) for entry in entries)
                bar.update(group.tokens)
            if request.process == 0 and request.processes > 1:
                writer.merge()  # so that few pending files are there at a time
    return counts | {"padding": work.padding}


def _nbytes(info: store.Info, entry: store.NewEntry) -> int:
    tokens = int(entry.memory.tokens[0])
    kv = info.nbytes(info.kv_shape(tokens)) if entry.prefix is not None else 0
    return info.nbytes(info.memory_shape(tokens)) + kv


def _entries(
    compressor: Compressor, group: Group, batch_size: int, kv: bool
) -> tuple[list[store.NewEntry], Work]:
    """The entries of a group's documents, and what was computed for them."""
    count = len(group.documents)
    written: list[Memory | None] = [None] * count
    prefixes: list[Prefix | None] = [None] * count
    work = Work(0, 0)
    for k in sorted(set(group.ks)):
        rows = [row for row in range(count) if group.ks[row] == k]
        contexts = [group.contexts[row] for row in rows]
        memories, done = compressor.writer.write_each(contexts, k, batch_size)
        work = Work(work.tokens + done.tokens, work.computed + done.computed)
        of_k = _prefixes(compressor, memories, batch_size) if kv else [None] * len(rows)
        for row, memory, prefix in zip(rows, memories, of_k, strict=True):
            written[row], prefixes[row] = memory, prefix
    entries = [
        store.NewEntry(document.id, own_hash, memory, prefix, document.metadata)
        for document, own_hash, memory, prefix in zip(
            group.documents, group.hashes, written, prefixes, strict=True
        )
    ]
    return entries, work


def _prefixes(compressor: Compressor, memories: Sequence[Memory], batch_size: int) -> list[Prefix]:
    """What the decoder reads of each memory behind the template's head, on the host.

    All batches have `batch_size` rows, and segments that are a power of two, so that few programs
    are compiled; this is little beside what the encoder does.
    """
    rows = compressor.devices.rows(batch_size)
    counts = [1 << (m.segment_lengths.shape[1] - 1).bit_length() for m in memories]
    prefixes: list[Prefix | None] = [None] * len(memories)
    for segments in set(counts):
        of_count = [i for i, count in enumerate(counts) if count == segments]
        for start in range(0, len(of_count), rows):
            batch = of_count[start : start + rows]
            filled = np.resize(batch, rows)  # the rows repeat
            memory = concatenate([memories[i] for i in filled], compressor.config, segments)
            prefix = compressor.prefix(memory)
            for row, i in enumerate(batch):
                at = slice(row, row + 1)
                fields = (prefix.k[:, at], prefix.v[:, at], prefix.mask[at])
                prefixes[i] = Prefix(*fields, prefix.positions[at], prefix.end[at])
    return prefixes


def _prune(path: str | pathlib.Path, writer: store.Writer, documents: Documents) -> int:
    """Removes the entries whose documents were not read. Returns how many."""
    pruned, gone = 0, []
    with store.open_store(path) as reader:
        for entry_id in reader:
            if entry_id not in documents:
                gone.append(entry_id)
            if len(gone) == REMOVED_AT_ONCE:
                pruned += writer.remove(gone)
                gone = []
    return pruned + (writer.remove(gone) if gone else 0)
