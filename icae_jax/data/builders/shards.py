"""From files of rows to array_record shards, in several processes, with one row in memory each."""

import concurrent.futures
import itertools
import multiprocessing
import os
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from icae_jax.data import formats, json_rows, reading
from icae_jax.data.forms import FIELDS
from icae_jax.data.rows import Row, Sieve, placed
from icae_jax.data.unpacking import CHUNK
from icae_jax.errors import UserError

PART = 256 << 20  # bytes that one job reads of JSON lines; other files are one part each
SHARD = 256 << 20  # about how many serialised bytes a shard holds

T = typing.TypeVar("T")


class Part(typing.NamedTuple):
    """The lines of a file that begin at bytes start … stop - 1 (None: to the end)."""

    path: str
    start: int = 0
    stop: int | None = None
    subset: str = ""


class Written(typing.NamedTuple):
    """What was written.

    Attributes:
      shards: (path, examples, serialised bytes) of each.
      left_out: as `rows.Sieve` counts it.
    """

    shards: list[tuple[str, int, int]]
    left_out: dict[str, tuple[int, str]]


def parts_of(path: str, subset: str = "") -> list[Part]:
    """A file as `Part`s that can be read in parallel."""
    if not formats.is_json_lines(path):
        return [Part(path, subset=subset)]
    starts = range(0, max(1, os.path.getsize(path)), PART)
    return [Part(path, start, start + PART, subset) for start in starts]


def _lines(part):
    """Yields (byte at which the line begins, its number in the part, the line); no blank lines."""
    with reading.naming(part.path), reading.open_bytes(part.path) as f:
        position = 0
        if part.start:  # a line that begins before `start` belongs to another part
            f.seek(part.start - 1)
            while piece := f.readline(CHUNK):
                if piece.endswith(b"\n"):
                    break
            position = f.tell()
        for number in itertools.count():
            if part.stop is not None and position >= part.stop:
                return
            line = f.readline(reading.MAX_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > reading.MAX_ROW_BYTES:
                where = f"{part.path}:{_line_number(part, position, number)}"
                reading.check_size(len(line), where, reading.MAX_ROW_BYTES)
            if not line.isspace():
                yield position, number, line
            position += len(line)


def _line_number(part, position, number):
    """A line's number in its file. Lines before a part are counted only here, for an error."""
    if not part.start:
        return number + 1
    before = 0
    with open(part.path, "rb") as f:
        while chunk := f.read(min(position - f.tell(), 1 << 20)):
            before += chunk.count(b"\n")
    return before + 1


def objects(
    part: Part,
    handle: Callable[[dict, str], Iterable[T]],
    columns: frozenset[str] = FIELDS,
) -> Iterator[T]:
    """Yields what `handle(JSON object, its place)` yields for each row of a part.

    The place is a line if the part begins the file, else a byte. UserError if a row is malformed or
    `handle` raises one; the message names file and line. columns: those wanted of a table.
    """
    if part.start == 0 and part.stop is None:
        for raw, where, _ in formats.raw_rows(part.path, reading.MAX_ROW_BYTES, columns):
            with placed(where):
                _check_object(raw)
                yield from handle(raw, where)
        return
    for position, number, line in _lines(part):
        where = f"{part.path} byte {position:,}" if part.start else f"{part.path}:{number + 1}"
        try:
            raw = json_rows.decode_line(line)
            _check_object(raw)
            yield from handle(raw, where)
        except UserError as error:
            line_number = _line_number(part, position, number)
            raise UserError(f"{part.path}:{line_number}: {error}") from error


def _check_object(raw):
    if not isinstance(raw, dict):
        raise UserError(f"a JSON {type(raw).__name__}, expected an object")


def _example(row, features):
    """The fields of a row that a set keeps; None if the set keeps questions and there is none."""
    if "question" in features and not row.answers:
        return None
    fields = {
        "id": row.id,
        "text": row.text,
        "context": row.text,
        "question": row.question,
        "answers": row.answers,
        "subset": row.subset,
    }
    return {name: fields[name] for name in features}


def write_shards(
    parts: Sequence[Part],
    parse: Callable[[dict, str], Iterable[Row]],
    features: Any,
    prefix: str,
    sieve: Sieve,
    columns: frozenset[str] = FIELDS,
) -> Written:
    """Writes the examples of parts, in order, as shards prefix.00000, ….

    `parse` makes rows of (raw row, subset), and raises a UserError if it is malformed; `features`
    is a tfds `FeaturesDict`. The sieve's own counts stay as they are.
    """
    sieve = sieve.fresh()

    def serialised(part):
        def examples(raw, where):
            for row in parse(raw, part.subset):
                # An error gets its place from `objects`.
                row = sieve.take(row._replace(where="" if sieve.strict else where))
                example = row and _example(row, features)
                if example:
                    yield features.serialize_example(example)

        return objects(part, examples, columns)

    records, shards = itertools.chain.from_iterable(map(serialised, parts)), []
    for number in itertools.count():
        first = next(records, None)
        if first is None:
            return Written(shards, sieve.left_out)
        path = f"{prefix}.{number:05d}"
        # group_size:1, since examples are read one by one, in any order
        writer, count, size = ArrayRecordWriter(path, "group_size:1"), 0, 0
        try:
            for record in itertools.chain([first], records):
                writer.write(record)
                count, size = count + 1, size + len(record)
                if size >= SHARD:
                    break
        finally:
            writer.close()
        shards.append((path, count, size))


def _end_with_parent():
    """Ends this process when its parent ends: workers of a killed parent would wait for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(function: Callable[..., T], jobs: Sequence[tuple], processes: int, what: str) -> list[T]:
    """`[function(*job) for job in jobs]` in several processes, which end with the first error.

    Function and jobs must be picklable. what: label of the progress bar.
    """
    if min(processes, len(jobs)) <= 1:
        return [function(*job) for job in tqdm.tqdm(jobs, desc=what, unit="part", disable=None)]
    others = set(multiprocessing.active_children())
    # spawn: a forked child would inherit locks of jax's or grain's threads, if the caller uses them
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), context, _end_with_parent
    ) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        done = concurrent.futures.as_completed(futures)
        try:
            for future in tqdm.tqdm(done, what, len(jobs), unit="part", disable=None):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # else the pool waits for running jobs, perhaps for hours
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise UserError(
                    f"a process died while {what} (killed, or out of memory?); try fewer "
                    "--processes"
                ) from error
            raise
    return [future.result() for future in futures]
