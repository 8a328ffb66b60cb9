"""From files of rows to array_record shards, in many processes, a row at a time; plain JSON lines in parts."""

import concurrent.futures
import itertools
import multiprocessing
import os
import threading
import typing

import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from icae_jax.data import formats, json_rows, reading, rows
from icae_jax.errors import UserError

PART = (
    256 << 20
)  # bytes of a plain file that one job reads; a packed file cannot be entered in the middle, and is one part
SHARD = 256 << 20  # serialised bytes of a shard, about


class Part(typing.NamedTuple):
    """The lines of a file that begin at bytes start … stop - 1 (None: to the end), and the subset that they belong to."""

    path: str
    start: int = 0
    stop: int | None = None
    subset: str = ""


class Written(typing.NamedTuple):
    """shards: (path, examples, serialised bytes) of each. left_out: as `rows.Sieve` counts it."""

    shards: list
    left_out: dict[str, tuple[int, str]]


def parts_of(path, subset=""):
    """A file as `Part`s that can be read in parallel."""
    if not formats.is_json_lines(path):
        return [Part(path, subset=subset)]
    return [
        Part(path, start, start + PART, subset)
        for start in range(0, max(1, os.path.getsize(path)), PART)
    ]


def _lines(part):
    """Yields (bytes where the line begins, its number counted from the part's first, the line), blank lines left out."""
    with reading.naming(part.path), reading.open_bytes(part.path) as f:
        position = 0
        if part.start:  # a line that begins before `start` is another part's
            f.seek(part.start - 1)
            while piece := f.readline(reading.CHUNK):
                if piece.endswith(b"\n"):
                    break
            position = f.tell()
        for number in itertools.count():
            line = (
                f.readline(reading.MAX_ROW_BYTES + 1)
                if part.stop is None or position < part.stop
                else b""
            )
            if not line:
                return
            if len(line) > reading.MAX_ROW_BYTES:
                reading.check_size(
                    len(line),
                    f"{part.path}:{_line_number(part, position, number)}",
                    reading.MAX_ROW_BYTES,
                )
            if not line.isspace():
                yield position, number, line
            position += len(line)


def _line_number(part, position, number):
    """A line's number in its file. Lines before a part are counted only here, where an error needs them."""
    if not part.start:
        return number + 1
    before = 0
    with open(part.path, "rb") as f:
        while chunk := f.read(min(position - f.tell(), 1 << 20)):
            before += chunk.count(b"\n")
    return before + 1


def objects(part, handle, columns=rows.FIELDS):
    """Yields what `handle(JSON object, its place)` yields for each row of a part. UserError names file and line of what it refuses.

    The place is told by the line in a part that is a whole file, else by bytes. columns: those wanted of a table.
    """
    if part.start == 0 and part.stop is None:
        for raw, where, _ in formats.raw_rows(part.path, reading.MAX_ROW_BYTES, columns):
            with rows.placed(where):
                _check_object(raw)
                yield from handle(raw, where)
        return
    for position, number, line in _lines(part):
        try:
            raw = json_rows.decode_line(line)
            _check_object(raw)
            yield from handle(
                raw, f"{part.path} byte {position:,}" if part.start else f"{part.path}:{number + 1}"
            )
        except UserError as error:
            raise UserError(
                f"{part.path}:{_line_number(part, position, number)}: {error}"
            ) from error


def _check_object(raw):
    if not isinstance(raw, dict):
        raise UserError(f"a JSON {type(raw).__name__}, expected an object")


def _example(row, features):
    """What a set of those features keeps of a row; None where it keeps questions and the row has none that can be used."""
    fields = {
        "id": row.id,
        "text": row.text,
        "context": row.text,
        "question": row.question,
        "answers": row.answers,
        "subset": row.subset,
    }
    return (
        None
        if "question" in features and not row.answers
        else {name: fields[name] for name in features}
    )


def write_shards(parts, parse, features, prefix, sieve, columns=rows.FIELDS):
    """Writes the examples of parts, in order, as shards prefix.00000, …; returns `Written`.

    parse: `(raw, subset) -> iterable of Rows`; it raises UserError for what is malformed. sieve: which rows can be used. features: a tfds
    FeaturesDict. columns: those wanted of a table. No more than a row and an example are in memory at once.
    """
    sieve = sieve.fresh()

    def serialised(part):
        def examples(raw, where):
            for row in parse(raw, part.subset):
                row = sieve.take(
                    row._replace(where="" if sieve.strict else where)
                )  # `objects` puts the place before an error
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
    """Ends this process when its parent does: one that was killed leaves its pool waiting for work for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(function, jobs, processes, what):
    """`[function(*job) for job in jobs]` in that many processes, which end with the first error. what: said by the progress bar.

    Results do not depend on the number of processes. function and jobs must be picklable.
    """
    if min(processes, len(jobs)) <= 1:
        return [function(*job) for job in tqdm.tqdm(jobs, desc=what, unit="part", disable=None)]
    others = set(multiprocessing.active_children())
    # spawn: a forked child would inherit the threads' locks of jax or grain, where the caller has loaded them
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), context, _end_with_parent
    ) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm.tqdm(
                concurrent.futures.as_completed(futures),
                desc=what,
                unit="part",
                total=len(jobs),
                disable=None,
            ):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # else the pool waits for what they are at, perhaps hours
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise UserError(
                    f"a process died while {what} (killed, or out of memory?); try fewer --processes"
                ) from error
            raise
    return [future.result() for future in futures]
