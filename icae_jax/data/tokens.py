"""A source tokenised once: flat id arrays, memory-mapped from a cache keyed by tokenizer and content."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from icae_jax import cache, errors, files
from icae_jax.data import reading, rows, sources
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids

CACHE_VERSION = 2  # 1 made control tokens of what texts spelled, and knew files by their times
BATCH = 1000  # rows handed to the tokenizer at once
BATCH_CHARACTERS = (
    1 << 21
)  # and no more characters than these, but for a single row's; a token takes a hundred bytes meanwhile
REMEMBERED = 1 << 20  # bytes from which on a file's hash is kept
SETTLED = 2.0  # seconds after which a change of a file shows in its time
GATHERED = 1 << 16  # questions put in order at once
ARRAYS = (
    "text_ids", "text_offsets", "prompt_ids", "prompt_offsets", "answer_ids", "answer_offsets", "question_offsets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts and their questions as ids, without special tokens; all int32 but the offsets (int64).

    Text i is `text_ids[text_offsets[i] : text_offsets[i + 1]]`; its questions are number question_offsets[i] …
    question_offsets[i + 1] - 1, each with a prompt and an answer. key: identity of tokenizer and source. earlier_key: the same as the
    first version had it. left_out: `{reason: how many}` rows or questions. held: keeps the arrays' folder from being removed.
    """

    text_ids: np.ndarray
    text_offsets: np.ndarray
    prompt_ids: np.ndarray
    prompt_offsets: np.ndarray
    answer_ids: np.ndarray
    answer_offsets: np.ndarray
    question_offsets: np.ndarray
    key: str
    earlier_key: str = ""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    held: BinaryIO | None = dataclasses.field(default=None, repr=False, compare=False)

    def text(self, i):
        return self.text_ids[self.text_offsets[i] : self.text_offsets[i + 1]]

    def prompt(self, q):
        return self.prompt_ids[self.prompt_offsets[q] : self.prompt_offsets[q + 1]]

    def answer(self, q):
        return self.answer_ids[self.answer_offsets[q] : self.answer_offsets[q + 1]]


# ------------------------------------------------------------------------------------------------------------ identity


def _tokenizer_identity(tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )


def _key(version, tokenizer, source_identity):
    return hashlib.sha256(
        json.dumps([version, _tokenizer_identity(tokenizer), source_identity]).encode()
    ).hexdigest()


def _hash_once(cache_dir, path):
    """`reading.content_hash`, that of a large file remembered in the cache under its path, size and time."""
    path = path if reading.is_remote(path) else pathlib.Path(path).resolve()
    size, changed = before = reading.stamp(path)
    if size < REMEMBERED or not changed:
        return reading.content_hash(path)
    within = pathlib.Path("hashes") / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    note = cache.folder(cache_dir, within) / within
    known = {"path": str(path), "size": size, "mtime_ns": changed}
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(note.read_text(encoding="utf-8"))
        if {name: noted.get(name) for name in known} == known:
            with contextlib.suppress(OSError):  # of a cache that may only be read
                os.utime(note)
            return noted["hash"]
    content = reading.content_hash(path)
    if (
        reading.stamp(path) == before and time.time() - changed / 1e9 > SETTLED
    ):  # else another change could go by unseen
        with contextlib.suppress(OSError):  # it can be hashed again
            files.write_json(note, known | {"hash": content})
    return content


# ---------------------------------------------------------------------------------------------------------- tokenising


class _Column:
    """An array that grows in a .npy file, of which nothing stays in memory."""

    def __init__(self, path, dtype):
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
        self._write_header()

    def _write_header(
        self,
    ):  # numpy leaves room in it, so that it takes as many bytes whatever the count
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def extend(self, values):
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.tobytes())
        self.count += len(values)

    def close(self):
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def array(self):
        return np.load(self.path, mmap_mode="r")


class _Pieces:
    """Many short arrays in one `_Column`, and where each ends in another."""

    def __init__(self, folder, name):
        self.ids, self.offsets = (
            _Column(folder / f"{name}_ids.npy", np.int32),
            _Column(folder / f"{name}_offsets.npy", np.int64),
        )
        self.offsets.extend([0])

    def extend(self, pieces):
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        self.offsets.extend(self.ids.count + np.cumsum(lengths))
        self.ids.extend(
            np.fromiter(itertools.chain.from_iterable(pieces), np.int32, int(lengths.sum()))
        )

    def close(self):
        self.ids.close()
        self.offsets.close()


def _batches(rows: Iterable[sources.Row]) -> Iterator[list[sources.Row]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.text)
        if len(batch) >= BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(row):
    """A hash of a text that has questions, None of another, which stands as often as it comes."""
    return (
        None
        if row.question is None
        else hashlib.blake2b(row.text.encode(), digest_size=16).digest()
    )


def _build(folder, source, tokenizer, tfds_dir, max_row_bytes, sieve):
    """Writes the arrays of a source into a folder, reading and tokenising a batch of rows at a time.

    Texts stand in order of first appearance, each once where it has questions, with its questions in their order. What has no tokens is
    left out, and counted by the sieve. In memory stays a hash of each text that has questions.
    """
    numbers = {}  # of texts with questions, by their hash; None for one without tokens
    with contextlib.ExitStack() as stack:
        texts, prompts, answers = (_Pieces(folder, name) for name in ("text", "prompt", "answer"))
        owners = _Column(
            folder / "owners.npy", np.int64
        )  # the text of each question, in the order of the rows
        for column in (texts, prompts, answers, owners):
            stack.callback(column.close)
        for batch in _batches(sources.read_rows(source, tfds_dir, max_row_bytes, sieve)):
            digests = [_digest(row) for row in batch]
            new = {}  # texts that have no number yet, by their hash, or by their place in the batch
            for at, (row, digest) in enumerate(zip(batch, digests, strict=True)):
                if digest not in numbers:
                    new.setdefault(digest or at, row.text)
            pieces = dict(zip(new, user_ids(tokenizer, list(new.values())), strict=True))
            count = texts.offsets.count - 1
            fresh = {
                name: count + i
                for i, name in enumerate(name for name, ids in pieces.items() if ids)
            }
            texts.extend([ids for ids in pieces.values() if ids])
            asked = []
            for at, (row, digest) in enumerate(zip(batch, digests, strict=True)):
                number = numbers[digest] if digest in numbers else fresh.get(digest or at)
                if number is None:
                    sieve.count(rows.TEXT_WITHOUT_TOKENS, row.where)
                elif row.answers:
                    asked.append((number, row))
            numbers |= {digest: fresh.get(digest) for digest in new if isinstance(digest, bytes)}
            fields = [
                user_ids(tokenizer, [getattr(row, field) for _, row in asked])
                for field in ("question", "answer")
            ]
            whole = []
            for (number, row), prompt, answer in zip(asked, *fields, strict=True):
                if prompt and answer:
                    whole.append((number, prompt, answer))
                else:
                    sieve.count(
                        rows.ANSWER_WITHOUT_TOKENS if prompt else rows.QUESTION_WITHOUT_TOKENS,
                        row.where,
                    )
            for column, values in zip(
                (owners, prompts, answers), zip(*whole, strict=True), strict=False
            ):
                column.extend(values)
    count = texts.offsets.count - 1
    sieve.check_some(count, f"data source {source}")
    _sort(folder, owners.array(), count)
    owners.path.unlink()


def _sort(folder, owners, count):
    """Puts questions in the order of their texts, where rows of one text stand apart, and writes the texts' offsets into them."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=count), out=offsets[1:])
    np.save(folder / "question_offsets.npy", offsets)
    if len(owners) and (owners[1:] < owners[:-1]).any():
        order = np.argsort(owners, kind="stable")
        for name in ("prompt", "answer"):
            _reorder(folder, name, order)


def _reorder(folder, name, order):
    parts = [folder / f"{name}_{part}.npy" for part in ("ids", "offsets")]
    ids, offsets = (np.load(path, mmap_mode="r") for path in parts)
    sorted_pieces = _Pieces(folder, f"sorted_{name}")
    for start in range(0, len(order), GATHERED):
        chosen = order[start : start + GATHERED]
        sorted_pieces.extend([ids[offsets[q] : offsets[q + 1]] for q in chosen])
    sorted_pieces.close()
    for path in parts:
        os.replace(folder / f"sorted_{path.name}", path)


def tokenise(
    source,
    tokenizer,
    cache_dir="",
    tfds_dir=None,
    max_row_bytes=reading.MAX_ROW_BYTES,
    no_answer="",
    strict="",
) -> Tokens:
    """`Tokens` of a source, from the cache where the same tokenizer and content were tokenised before, else by one process of the host.

    no_answer, strict: as for `rows.Sieve`. UserError names the file and line of malformed rows, or an empty data set. A fault that passes
    is tried again.
    """
    what = f"tokenising {source}"
    found = errors.retrying(
        lambda: sources.identity(
            source, tfds_dir, functools.partial(_hash_once, cache_dir), no_answer
        ),
        what,
    )
    earlier = errors.retrying(lambda: sources.earlier_identity(source, tfds_dir), what)
    key, earlier_key = _key(CACHE_VERSION, tokenizer, found), _key(1, tokenizer, earlier)
    root = cache.folder(cache_dir, pathlib.Path("tokens") / key[:32] / cache.ABOUT)
    folder = root / "tokens" / key[:32]
    # Texts of white space have tokens with most tokenizers, and are trained on then.
    sieve = rows.Sieve(strict, no_answer, blank=False)
    made_by = tokenizers.fingerprint(tokenizer)
    while (held := _held(folder, made_by)) is None:
        with cache.alone(folder, what):
            if not (folder / cache.ABOUT).exists():
                errors.retrying(
                    lambda: _write(
                        folder, source, tokenizer, tfds_dir, max_row_bytes, sieve.fresh(), made_by
                    ),
                    what,
                )
        most = cache.limit()
        with contextlib.suppress(OSError):  # what cannot be removed takes room, and does no harm
            removed = cache.prune(root, most, CACHE_VERSION)
            if removed:
                freed = sum(entry.size for entry in removed) / cache.GIB
                told = f"{len(removed)} unused for longest removed, {freed:,.2f} GiB (${cache.VARIABLE})"
                print(f"cache {root}: {told}", file=sys.stderr, flush=True)
    sieve.add(_about(folder).get("left_out", {}))  # absent where nothing could be left out yet
    return Tokens(
        **_arrays(folder), key=key, earlier_key=earlier_key, left_out=sieve.counts, held=held
    )


def _held(folder, made_by):
    """`cache.hold`; None, too, where its files are damaged, as after a power loss, or where the same tokenizer made other ids of the probe
    text then, as an earlier version of its library may: they are removed.
    """
    held = cache.hold(folder)
    if held is None:
        return None
    why = ""
    try:
        if _about(folder).get("tokenizer", made_by) != made_by:  # the first ones do not say
            why = "its ids are those of another version of the tokenizers library"
        _arrays(folder)
    except (ValueError, EOFError, FileNotFoundError) as error:
        why = f"its files are damaged ({error})"
    if not why:
        return held
    errors.say(f"cache {folder}: {why}; made anew")
    held.close()
    _remove(folder)
    return None


def _remove(folder):
    with (
        errors.naming(f"cache {folder}: cannot be made anew"),
        contextlib.suppress(FileNotFoundError),
    ):  # another process may be at it, too
        gone = folder.with_name(f".gone.{secrets.token_hex(8)}")
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _about(folder):
    """What a folder of tokens says of itself. ValueError where it is damaged."""
    about = json.loads((folder / cache.ABOUT).read_text(encoding="utf-8"))
    if not isinstance(about, dict):
        raise ValueError(f"{cache.ABOUT} is no object")
    return about


def _arrays(folder):
    """`{name: array}` of a folder of tokens. ValueError, EOFError or FileNotFoundError where they are damaged, as far as sizes tell."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    ends = {f"{name}_offsets": len(arrays[f"{name}_ids"]) for name in ("text", "prompt", "answer")}
    for name, end in (ends | {"question_offsets": len(arrays["prompt_offsets"]) - 1}).items():
        offsets = arrays[name]
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
            raise ValueError(f"{name} does not end at {end}")
    return arrays


def _write(folder, source, tokenizer, tfds_dir, max_row_bytes, sieve, made_by):
    tmp = folder.with_name(f".new.{secrets.token_hex(4)}")
    tmp.mkdir()  # as open as the umask says: others may share the cache
    try:
        _build(tmp, source, tokenizer, tfds_dir, max_row_bytes, sieve)
        files.write_json(
            tmp / cache.ABOUT,
            {
                "version": CACHE_VERSION,
                "source": source,
                "left_out": sieve.left_out,
                "tokenizer": made_by,
            },
        )
        files.flush(tmp)
        if folder.exists() and not (folder / cache.ABOUT).exists():  # damaged, or in part removed
            _remove(folder)
        try:
            os.rename(tmp, folder)
        except OSError:
            if not (
                folder / cache.ABOUT
            ).exists():  # else another process was first where the filesystem has no locks, with the same
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
