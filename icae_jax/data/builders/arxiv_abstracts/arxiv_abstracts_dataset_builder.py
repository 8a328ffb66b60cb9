"""Abstracts of arXiv papers, with one split per month of first submission.

So text that is newer than a base can be held out.
"""

import collections
import contextlib
import email.utils
import json
import pathlib
import re
from collections.abc import Iterator

from icae_jax.data import forms
from icae_jax.data.builders import common, inputs, shards
from icae_jax.data.rows import Row, Sieve
from icae_jax.errors import UserError

WHERE = (
    'arxiv-metadata-oai-snapshot.json (Kaggle data set "Cornell-University/arxiv"), or lines with '
    "id and text"
)
NEW_ID = re.compile(r"(\d\d)(\d\d)\.\d{4,5}(v\d+)?")  # since April 2007
OLD_ID = re.compile(r"[a-z-]+(\.[A-Z]{2})?/(\d\d)(\d\d)\d{3}(v\d+)?")
COLUMNS = forms.FIELDS | {"abstract", "versions"}
APART = "ids whose first version is dated over a month away; the id's month was taken"


def month_of_id(arxiv_id: str) -> tuple[int, int] | None:
    """(year, month) of an arXiv id, None if it has none."""
    new, old = NEW_ID.fullmatch(arxiv_id), OLD_ID.fullmatch(arxiv_id)
    if not new and not old:
        return None
    year, month = map(int, new.group(1, 2) if new else old.group(2, 3))
    return (year + (1900 if old and year > 90 else 2000), month) if 1 <= month <= 12 else None


def month_of_version(raw: dict) -> tuple[int, int] | None:
    """(year, month) of the first version of a row of the dump, None if it has no such date."""
    versions = raw.get("versions")
    if not isinstance(versions, list) or not versions or not isinstance(versions[0], dict):
        return None
    try:
        created = email.utils.parsedate_to_datetime(versions[0].get("created"))
    except (TypeError, ValueError):
        return None
    return created.year, created.month


def abstract(raw: dict, counts: dict[str, int]) -> tuple[str, str, str]:
    """(split such as "2023_07", id, text in one line) of a row of the dump, or of id and text.

    counts[APART] counts ids at odds with the date of the first version. UserError if neither gives
    a month.
    """
    arxiv_id = common.text_of(raw, "id")
    text = common.text_of(raw, "text" if "text" in raw else "abstract")
    by_id, by_version = month_of_id(arxiv_id), month_of_version(raw)
    if not by_id and not by_version:
        raise UserError(
            f"id is {arxiv_id!r}, which tells no month (as 0704.0001 or hep-th/9901001 do), and "
            "versions[0].created neither"
        )
    year, month = by_id or by_version
    if by_id and by_version and abs(12 * (year - by_version[0]) + month - by_version[1]) > 1:
        counts[APART] += 1
    return f"{year:04d}_{month:02d}", arxiv_id, " ".join(text.split())


def sort_by_month(
    part: shards.Part, folder: str, number: int, sieve: Sieve
) -> tuple[list[str], collections.Counter, dict[str, tuple[int, str]]]:
    """Sorts the rows of a part into folder/MONTH.NUMBER.jsonl.

    Returns (its months, what was noted, what was left out).
    """
    counts, sieve = collections.Counter(), sieve.fresh()
    with contextlib.ExitStack() as stack:
        files = {}  # some 400 at most, one for each month since 1991

        def sort(raw, where):
            month, arxiv_id, text = abstract(raw, counts)
            # An error gets its place from `objects`.
            row = common.row_of(text, arxiv_id)._replace(where="" if sieve.strict else where)
            if sieve.take(row) is None:
                return ()
            if month not in files:
                path = f"{folder}/{month}.{number:06d}.jsonl"
                files[month] = stack.enter_context(open(path, "w", encoding="utf-8"))
            files[month].write(json.dumps({"id": arxiv_id, "text": text}) + "\n")
            return ()

        for _ in shards.objects(part, sort, COLUMNS):
            pass
        return sorted(files), counts, sieve.left_out


class Builder(common.LocalBuilder, skip_registration=True):
    """`id` and `text`, the abstract without line breaks; one split per month, such as 2023_07."""

    ABOUT = WHERE
    FLAGS = ("from",)
    FEATURES = common.TEXTS

    def sources(self, request: inputs.Request) -> dict[str, list[inputs.Input]]:
        """All files of the request, whose rows are sorted by month later."""
        files = inputs.files_in(request.paths)
        return {"months": [inputs.Input(str(file)) for file in files]}

    def jobs(
        self, folder: pathlib.Path
    ) -> tuple[dict[str, list[list[shards.Part]]], dict[str, int]]:
        """One pass over the dump sorts its rows by month; each month is then one job."""
        parts = [part for file in self.inputs["months"] for part in shards.parts_of(*file)]
        tasks = [
            (part, str(folder), number, self.sieve.fresh()) for number, part in enumerate(parts)
        ]
        months, counts = collections.defaultdict(list), collections.Counter()
        results = shards.run(sort_by_month, tasks, self.processes, "sorting by month")
        for number, (months_of_part, noted, left_out) in enumerate(results):
            counts.update(noted)
            self.sieve.add(left_out)
            for month in months_of_part:
                months[month].append(shards.Part(f"{folder}/{month}.{number:06d}.jsonl"))
        return {month: [months[month]] for month in sorted(months)}, counts

    @staticmethod
    def parse(raw: dict, subset: str) -> Iterator[Row]:
        """Yields the row of a sorted abstract."""
        yield common.row_of(raw["text"], raw["id"])
