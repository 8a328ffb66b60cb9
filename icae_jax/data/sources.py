"""Where texts and questions come from: JSON lines, plain text, prepared TFDS sets.

A JSON line holds `text`, or `context`, `question` and `answers` (or `answer`), or PwC's `input`, `prompt` and `answer`. Files may be
packed, as .gz or .zst.
"""

import itertools
import json
import pathlib
import typing
from collections.abc import Iterator

from icae_jax import errors
from icae_jax.data import reading, tfds_sets
from icae_jax.errors import UserError
from icae_jax.interop.text import check_encodable


class Row(typing.NamedTuple):
    """One text, perhaps with one question on it and all its reference answers.

    where: file and line (or set and row), for errors. id: the row's own, or its number, behind the file's name where a source joins
    several. subset: the row's own, or "". own_id: whether the data gives the id.
    """

    text: str
    question: str | None
    answers: tuple[str, ...] | None
    where: str
    id: str
    subset: str = ""
    own_id: bool = False

    @property
    def answer(self):
        """The first reference answer, which training uses; None without a question."""
        return self.answers[0] if self.answers else None


def split_source(source):
    """The paths of a source: several are joined by commas."""
    paths = [p.strip() for p in source.split(",") if p.strip()]
    if not paths:
        raise UserError("the data source is empty; give a file of JSON lines, a text file, or tfds:NAME:SPLIT")
    return paths


def _is_json(path):
    return any(part in pathlib.Path(path).suffixes for part in (".jsonl", ".json", ".ndjson"))


def check_present(source: str, tfds_dir: str | None = None) -> None:
    """UserError where a file of a source is absent, or a prepared set cannot be opened; little is read for it."""
    for path in split_source(source):
        if path.startswith(tfds_sets.PREFIX):
            tfds_sets.open_set(path, tfds_dir)
        else:
            _check_file(path)


def _check_file(path):
    with reading.naming(path):
        if not pathlib.Path(path).is_file():
            raise UserError(f"data file {path}: no such file")


def identity(source: str, tfds_dir: str | None = None, content_hash=reading.content_hash) -> list:
    """What a source is known by: how its files are read and what is in them, wherever they lie; what a TFDS set says of itself.

    content_hash: of a file; one that remembers, where large files are asked for again and again.
    """
    result = []
    for path in split_source(source):
        if path.startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(path, tfds_dir))
        else:
            _check_file(path)
            packed = pathlib.Path(path).suffix
            with reading.naming(path):
                how = "json lines" if _is_json(path) else "text"
                result.append([how, packed if packed in reading.COMPRESSED else "", content_hash(path)])
    return result


def earlier_identity(source: str, tfds_dir: str | None = None) -> list:
    """What the first version of token caches knew a source by: files by name, size, time of change, and ends."""
    result = []
    for path in split_source(source):
        if path.startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(path, tfds_dir))
        else:
            stat = pathlib.Path(path).stat()
            result.append([pathlib.Path(path).name, stat.st_size, stat.st_mtime_ns, reading.ends(path, stat.st_size)])
    return result


def read_rows(source: str, tfds_dir: str | None = None, max_row_bytes: int = reading.MAX_ROW_BYTES) -> Iterator[Row]:
    """Yields the `Row`s of a source in order. UserError names file and line of anything malformed, or longer than max_row_bytes."""
    paths = split_source(source)
    for path, name in zip(paths, _short_names(paths), strict=True):
        prefix = f"{name}:" if len(paths) > 1 else ""
        if path.startswith(tfds_sets.PREFIX):
            for raw, where, number in tfds_sets.read(path, tfds_dir):
                yield parse_row(raw, where, prefix + number)
        elif _is_json(path):
            yield from _read_json_lines(path, prefix, max_row_bytes)
        else:
            yield Row(reading.read_text(path, max_row_bytes), None, None, path, name)


def read_all(source: str, tfds_dir: str | None = None) -> list[Row]:
    """All `Row`s of a source at once; what passes, such as a network file system's fault, is tried again."""
    return errors.retrying(lambda: list(read_rows(source, tfds_dir)), f"reading {source}")


def with_ids(rows: list[Row]) -> dict[str, Row]:
    """`{id: row}` of the rows that make a memory each, in the order of the rows; no id is lost, none stands for two texts.

    A text whose rows have no ids of their own, such as a context with many questions, is one memory. Each id of a row's own is one.
    UserError where two texts have one id.
    """
    own, named = {}, set()
    for row in rows:
        if row.own_id:
            first = own.setdefault(row.id, row)
            if first.text != row.text:
                raise UserError(f"{row.where}: id {row.id!r} is that of another text too ({first.where}); give each text an id of its own")
            named.add(row.text)
    found = {}
    for row in rows:
        if row.own_id:
            found.setdefault(row.id, row)
        elif row.text not in named:
            named.add(row.text)
            names = itertools.chain([row.id], (f"{row.id}#{i}" for i in itertools.count(2)))
            name = next(name for name in names if name not in own and name not in found)
            found[name] = row
    return found


def _short_names(paths):
    """The paths' last parts, as few of them as tell the paths apart."""
    split = [(path,) if path.startswith(tfds_sets.PREFIX) else pathlib.Path(path).parts for path in paths]
    for count in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-count:]) for parts in split]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _read_json_lines(path, prefix, max_row_bytes):
    with reading.naming(path):
        for number, line in enumerate(reading.read_lines(path, max_row_bytes)):
            text = line.decode("utf-8")
            if text.strip():
                where = f"{path}:{number + 1}"
                try:
                    raw = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not valid JSON ({error})") from error
                yield parse_row(raw, where, f"{prefix}{number}")


def _text_field(raw, field, where):
    value = raw[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {type(value).__name__}, expected text")
    check_encodable(value, f"{where}: {field}")
    return value


def parse_row(raw, where, default_id):
    """The `Row` of one JSON object. UserError names place and field."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a JSON {type(raw).__name__}, expected an object with text, or context, question and answers")
    own_id = raw.get("id")
    has_own = own_id not in (None, "")
    tail = (where, str(own_id) if has_own else default_id, str(raw.get("subset", "")), has_own)
    for field, value in zip(("id", "subset"), tail[1:3], strict=True):
        check_encodable(value, f"{where}: {field}")
    if "text" in raw:
        return Row(_text_field(raw, "text", where), None, None, *tail)
    if {"input", "prompt", "answer"} <= raw.keys():
        text, question, answer = (_text_field(raw, field, where) for field in ("input", "prompt", "answer"))
        return Row(text, question, (answer,), *tail)
    if {"context", "question"} <= raw.keys() and raw.keys() & {"answers", "answer"}:
        answers = raw.get("answers", raw.get("answer"))
        if isinstance(answers, dict):
            answers = answers.get("text")  # SQuAD's own form
        if isinstance(answers, str):
            answers = [answers]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise UserError(f"{where}: answers is {answers!r}, expected a list of texts, at least one")
        for answer in answers:
            check_encodable(answer, f"{where}: answers")
        return Row(_text_field(raw, "context", where), _text_field(raw, "question", where), tuple(answers), *tail)
    raise UserError(
        f"{where}: fields {', '.join(sorted(raw)) or 'none'}; expected text, or context, question and answers, or input, prompt and answer"
    )
