"""Where texts and questions come from: JSON lines, plain text, prepared TFDS sets.

A JSON line holds `text`, or `context`, `question` and `answers` (or `answer`), or PwC's `input`, `prompt` and `answer`. Files may be
packed, as .gz or .zst.
"""

import json
import pathlib
import typing

from icae_jax.data import reading, tfds_sets
from icae_jax.errors import UserError


class Row(typing.NamedTuple):
    """One text, perhaps with one question on it and all its reference answers.

    where: file and line (or set and row), for errors. id: the row's own, or its number. subset: the row's own, or "".
    """

    text: str
    question: str | None
    answers: tuple[str, ...] | None
    where: str
    id: str
    subset: str = ""

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


def identity(source, tfds_dir=None):
    """What the token cache takes for the source's content: names, sizes, times and ends of files; what a TFDS set says of itself."""
    result = []
    for path in split_source(source):
        if path.startswith(tfds_sets.PREFIX):
            result.append(tfds_sets.identity(path, tfds_dir))
            continue
        file = pathlib.Path(path)
        if not file.is_file():
            raise UserError(f"data file {path}: no such file")
        stat = file.stat()
        result.append([file.name, stat.st_size, stat.st_mtime_ns, reading.ends(file, stat.st_size)])
    return result


def read_rows(source, tfds_dir=None):
    """Yields the `Row`s of a source in order. UserError names file and line of anything malformed."""
    for path in split_source(source):
        if path.startswith(tfds_sets.PREFIX):
            yield from (parse_row(*row) for row in tfds_sets.read(path, tfds_dir))
        elif any(part in pathlib.Path(path).suffixes for part in (".jsonl", ".json", ".ndjson")):
            yield from _read_json_lines(path)
        else:
            yield _read_text(path)


def _read_text(path):
    try:
        with reading.open_text(path) as f:
            return Row(f.read(), None, None, path, pathlib.Path(path).name)
    except reading.READ_ERRORS as error:
        raise reading.unreadable(path, error) from error


def _read_json_lines(path):
    try:
        with reading.open_text(path) as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    raw = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: not valid JSON ({error})") from error
                yield parse_row(raw, where, str(number - 1))
    except reading.READ_ERRORS as error:
        raise reading.unreadable(path, error) from error


def _text_field(raw, field, where):
    value = raw[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {type(value).__name__}, expected text")
    return value


def parse_row(raw, where, default_id):
    """The `Row` of one JSON object. UserError names place and field."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a JSON {type(raw).__name__}, expected an object with text, or context, question and answers")
    own_id = raw.get("id")
    tail = (where, default_id if own_id in (None, "") else str(own_id), str(raw.get("subset", "")))
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
        return Row(_text_field(raw, "context", where), _text_field(raw, "question", where), tuple(answers), *tail)
    raise UserError(
        f"{where}: fields {', '.join(sorted(raw)) or 'none'}; expected text, or context, question and answers, or input, prompt and answer"
    )
