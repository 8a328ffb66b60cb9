"""Where texts and questions come from: JSON lines, plain text, prepared TFDS sets.

A JSON line holds `text`, or `context`, `question` and `answers` (or `answer`), or PwC's `input`, `prompt` and `answer`.
"""

import gzip
import hashlib
import json
import pathlib
import typing
import zlib

TFDS_PREFIX = "tfds:"


class Row(typing.NamedTuple):
    """One text, perhaps with one question on it. where: file and line (or set and row), for errors. id: the row's own, or its number."""

    text: str
    question: str | None
    answer: str | None
    where: str
    id: str


def split_source(source):
    """The paths of a source: several are joined by commas."""
    paths = [p.strip() for p in source.split(",") if p.strip()]
    if not paths:
        raise ValueError("the data source is empty; give a file of JSON lines, a text file, or tfds:NAME:SPLIT")
    return paths


def _ends(file, size):
    """sha256 of a file's first and last MiB: tells files of one name, size and time apart without reading gigabytes."""
    with open(file, "rb") as f:
        digest = hashlib.sha256(f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()


def identity(source, tfds_dir=None):
    """What the token cache takes for the source's content: names, sizes, times and ends; a TFDS set by name, split and folder."""
    result = []
    for path in split_source(source):
        if path.startswith(TFDS_PREFIX):
            result.append([path, tfds_dir])
            continue
        file = pathlib.Path(path)
        if not file.is_file():
            raise ValueError(f"data file {path}: no such file")
        stat = file.stat()
        result.append([file.name, stat.st_size, stat.st_mtime_ns, _ends(file, stat.st_size)])
    return result


def read_rows(source, tfds_dir=None):
    """Yields the `Row`s of a source in order. ValueError names file and line of anything malformed."""
    for path in split_source(source):
        if path.startswith(TFDS_PREFIX):
            yield from _read_tfds(path, tfds_dir)
        elif any(part in pathlib.Path(path).suffixes for part in (".jsonl", ".json", ".ndjson")):
            yield from _read_json_lines(path)
        else:
            yield _read_text(path)


def _open(path):
    return gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8")


def _reading(path, error):
    return ValueError(f"data file {path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _read_text(path):
    try:
        with _open(path) as f:
            return Row(f.read(), None, None, path, pathlib.Path(path).name)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _reading(path, error) from error


def _read_json_lines(path):
    try:
        with _open(path) as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    raw = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where}: not valid JSON ({error})") from error
                yield parse_row(raw, where, str(number - 1))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _reading(path, error) from error


def _read_tfds(spec, tfds_dir):
    import tensorflow_datasets as tfds  # imported late: only this source needs it

    name, _, split = spec.removeprefix(TFDS_PREFIX).partition(":")
    try:
        source = tfds.data_source(name, split=split or "train", data_dir=tfds_dir, download=False)
    except Exception as error:  # tfds raises many kinds; all mean that this set cannot be read here
        raise ValueError(f"{spec}: cannot be read as a prepared TFDS set in data.tfds_dir {tfds_dir!r} ({error})") from error
    for number in range(len(source)):
        yield parse_row(_plain(source[number]), f"{spec} row {number}", str(number))


def _plain(value):
    """TFDS values as JSON has them: bytes as text, arrays as lists."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _text_field(raw, field, where):
    value = raw[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is {type(value).__name__}, expected text")
    return value


def parse_row(raw, where, default_id):
    """The `Row` of one JSON object. ValueError names place and field."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: a JSON {type(raw).__name__}, expected an object with text, or context, question and answers")
    row_id = str(raw.get("id", default_id))
    if "text" in raw:
        return Row(_text_field(raw, "text", where), None, None, where, row_id)
    if {"input", "prompt", "answer"} <= raw.keys():
        return Row(*(_text_field(raw, f, where) for f in ("input", "prompt", "answer")), where, row_id)
    if {"context", "question"} <= raw.keys() and raw.keys() & {"answers", "answer"}:
        answers = raw.get("answers", raw.get("answer"))
        if isinstance(answers, dict):
            answers = answers.get("text")  # SQuAD's own form
        if isinstance(answers, str):
            answers = [answers]
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise ValueError(f"{where}: answers is {answers!r}, expected a list with at least one text")
        return Row(_text_field(raw, "context", where), _text_field(raw, "question", where), answers[0], where, row_id)
    raise ValueError(
        f"{where}: fields {', '.join(sorted(raw)) or 'none'}; expected text, or context, question and answers, or input, prompt and answer"
    )
