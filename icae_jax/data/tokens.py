"""A source tokenised once: flat arrays of ids, memory-mapped from a cache."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32, Int64

from icae_jax import cache, errors, files
from icae_jax.data import reading, sources, tokenising
from icae_jax.data.rows import Sieve
from icae_jax.interop.hub import tokenizer as tokenizers

# Version 1 made control tokens of what texts spelled, and knew files by their modification times.
CACHE_VERSION = 2
REMEMBERED = 1 << 20  # the hashes of files from this many bytes on are stored
SETTLED = 2.0  # seconds after which a change of a file shows in its modification time
ARRAYS = (
    "text_ids",
    "text_offsets",
    "prompt_ids",
    "prompt_offsets",
    "answer_ids",
    "answer_offsets",
    "question_offsets",
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Texts and their questions as token ids, without special tokens.

    Text i is `text_ids[text_offsets[i] : text_offsets[i + 1]]`. Its questions are the numbers
    question_offsets[i] … question_offsets[i + 1] - 1, each with a prompt and an answer.

    Attributes:
      key: identity of the tokenizer and the source.
      earlier_key: the same as the first version of the cache computed it.
      left_out: `{reason: count}` of rows and questions.
      held: an open file that keeps the arrays' folder from being removed.
    """

    text_ids: Int32[np.ndarray, " text_tokens"]
    text_offsets: Int64[np.ndarray, " text_ends"]
    prompt_ids: Int32[np.ndarray, " prompt_tokens"]
    prompt_offsets: Int64[np.ndarray, " question_ends"]
    answer_ids: Int32[np.ndarray, " answer_tokens"]
    answer_offsets: Int64[np.ndarray, " question_ends"]
    question_offsets: Int64[np.ndarray, " text_ends"]
    key: str
    earlier_key: str = ""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    held: BinaryIO | None = dataclasses.field(default=None, repr=False, compare=False)

    def text(self, i: int | np.integer) -> Int32[np.ndarray, " n"]:
        """The ids of text i."""
        return self.text_ids[self.text_offsets[i] : self.text_offsets[i + 1]]

    def prompt(self, q: int | np.integer) -> Int32[np.ndarray, " n"]:
        """The ids of the prompt of question q."""
        return self.prompt_ids[self.prompt_offsets[q] : self.prompt_offsets[q + 1]]

    def answer(self, q: int | np.integer) -> Int32[np.ndarray, " n"]:
        """The ids of the answer of question q."""
        return self.answer_ids[self.answer_offsets[q] : self.answer_offsets[q + 1]]


def tokenise(
    source: str,
    tokenizer: Any,
    cache_dir: str | os.PathLike = "",
    tfds_dir: str | None = None,
    max_row_bytes: int = reading.MAX_ROW_BYTES,
    no_answer: str = "",
    strict: str = "",
) -> Tokens:
    """`Tokens` of a source, from the cache if it holds the same data with the same tokenizer.

    Otherwise one process of the host tokenises it. Transient faults are retried. `no_answer` and
    `strict` are those of `rows.Sieve`. UserError if no rows are left or one is malformed; the
    message names file and line.
    """
    what = f"tokenising {source}"
    hash_file = functools.partial(_content_hash, cache_dir)
    identity = errors.retrying(
        lambda: sources.identity(source, tfds_dir, hash_file, no_answer), what
    )
    earlier = errors.retrying(lambda: sources.earlier_identity(source, tfds_dir), what)
    key, earlier_key = _key(CACHE_VERSION, tokenizer, identity), _key(1, tokenizer, earlier)
    entry = pathlib.Path("tokens") / key[:32]
    root = cache.folder(cache_dir, entry / cache.ABOUT)
    folder = root / entry
    # blank=False: white space has tokens with most tokenizers, and is then trained on.
    sieve = Sieve(strict, no_answer, blank=False)
    fingerprint = tokenizers.fingerprint(tokenizer)

    def build(tmp):
        fresh = sieve.fresh()
        rows = sources.read_rows(source, tfds_dir, max_row_bytes, fresh)
        count = tokenising.write_arrays(tmp, rows, tokenizer, fresh)
        fresh.check_some(count, f"data source {source}")
        return {
            "version": CACHE_VERSION,
            "source": source,
            "left_out": fresh.left_out,
            "tokenizer": fingerprint,
        }

    while (held := _hold(folder, fingerprint)) is None:
        with cache.alone(folder, what):
            if not (folder / cache.ABOUT).exists():
                errors.retrying(lambda: _write(folder, build), what)
        _prune(root)
    sieve.add(_about(folder).get("left_out", {}))  # absent from the first entries of version 2
    return Tokens(
        **_arrays(folder), key=key, earlier_key=earlier_key, left_out=sieve.counts, held=held
    )


# ----------------------------------------------------------------------------------------- identity


def _tokenizer_identity(tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str()
    return json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _key(version, tokenizer, source_identity):
    identity = json.dumps([version, _tokenizer_identity(tokenizer), source_identity])
    return hashlib.sha256(identity.encode()).hexdigest()


def _content_hash(cache_dir, path):
    """`reading.content_hash`; that of a large file is cached under its path, size and time."""
    path = path if reading.is_remote(path) else pathlib.Path(path).resolve()
    size, changed = stamp = reading.stamp(path)
    if size < REMEMBERED or not changed:
        return reading.content_hash(path)
    entry = pathlib.Path("hashes") / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    record_path = cache.folder(cache_dir, entry) / entry
    known = {"path": str(path), "size": size, "mtime_ns": changed}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if {name: record.get(name) for name in known} == known:
            with contextlib.suppress(OSError):  # the cache may be read-only
                os.utime(record_path)
            return record["hash"]
    content = reading.content_hash(path)
    # Soon after a change another one might leave the time as it is.
    settled = time.time() - changed / 1e9 > SETTLED
    if settled and reading.stamp(path) == stamp:
        with contextlib.suppress(OSError):  # it can be hashed again
            files.write_json(record_path, known | {"hash": content})
    return content


# ---------------------------------------------------------------------------------- cache entries


def _hold(folder, fingerprint):
    """`cache.hold`, after removing an entry that cannot be used; None if there is none.

    An entry cannot be used if its files are damaged, as after a power loss, or if the tokenizer
    gave other ids when it was made, as an earlier version of its library may.
    """
    held = cache.hold(folder)
    if held is None:
        return None
    fault = ""
    try:
        if (
            _about(folder).get("tokenizer", fingerprint) != fingerprint
        ):  # absent from the first ones
            fault = "its ids are those of another version of the tokenizers library"
        _arrays(folder)
    except (ValueError, EOFError, FileNotFoundError) as error:
        fault = f"its files are damaged ({error})"
    if not fault:
        return held
    errors.say(f"cache {folder}: {fault}; made anew")
    held.close()
    _remove(folder)
    return None


def _about(folder):
    """What a cache entry says of itself. ValueError if it is damaged."""
    about = json.loads((folder / cache.ABOUT).read_text(encoding="utf-8"))
    if not isinstance(about, dict):
        raise ValueError(f"{cache.ABOUT} is no object")
    return about


def _arrays(folder):
    """`{name: array}` of a cache entry.

    ValueError, EOFError or FileNotFoundError if their sizes show that they are damaged.
    """
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    ends = {f"{name}_offsets": len(arrays[f"{name}_ids"]) for name in ("text", "prompt", "answer")}
    ends["question_offsets"] = len(arrays["prompt_offsets"]) - 1
    for name, end in ends.items():
        offsets = arrays[name]
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != end:
            raise ValueError(f"{name} does not end at {end}")
    return arrays


def _write(folder: pathlib.Path, build: Callable[[pathlib.Path], dict]) -> None:
    """Makes a cache entry, whole or not at all.

    build: writes the arrays into a folder and returns what the entry says of itself.
    """
    tmp = folder.with_name(f".new.{secrets.token_hex(4)}")
    tmp.mkdir()  # as open as the umask says: others may share the cache
    try:
        files.write_json(tmp / cache.ABOUT, build(tmp))
        files.flush(tmp)
        if folder.exists() and not (folder / cache.ABOUT).exists():  # damaged, or partly removed
            _remove(folder)
        try:
            os.rename(tmp, folder)
        except OSError:
            # Without locks another process may have written the same entry first.
            if not (folder / cache.ABOUT).exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _remove(folder):
    # Another process may be removing it, too.
    gone = folder.with_name(f".gone.{secrets.token_hex(8)}")
    with (
        errors.naming(f"cache {folder}: cannot be made anew"),
        contextlib.suppress(FileNotFoundError),
    ):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _prune(root):
    """Removes the entries unused for longest until the cache is within its bound."""
    with contextlib.suppress(OSError):  # what cannot be removed takes space, but does no harm
        removed = cache.prune(root, cache.limit(), CACHE_VERSION)
        if removed:
            freed = sum(entry.size for entry in removed) / cache.GIB
            print(
                f"cache {root}: {len(removed)} unused for longest removed, {freed:,.2f} GiB "
                f"(${cache.VARIABLE})",
                file=sys.stderr,
                flush=True,
            )
