"""Abstracts of arXiv papers, a split for each month of first submission: text that is newer than a base can be held out of its training."""

import collections
import contextlib
import email.utils
import json
import re

from icae_jax.data import rows
from icae_jax.data.builders import common, inputs, shards
from icae_jax.errors import UserError

WHERE = 'arxiv-metadata-oai-snapshot.json (Kaggle data set "Cornell-University/arxiv"), or lines with id and text'
NEW_ID = re.compile(r"(\d\d)(\d\d)\.\d{4,5}(v\d+)?")  # since April 2007
OLD_ID = re.compile(r"[a-z-]+(\.[A-Z]{2})?/(\d\d)(\d\d)\d{3}(v\d+)?")
COLUMNS = rows.FIELDS | {"abstract", "versions"}
APART = "ids whose first version is dated over a month away; the id's month was taken"


def month_of_id(arxiv_id):
    """(year, month) that an arXiv id tells, None where it tells none."""
    new, old = NEW_ID.fullmatch(arxiv_id), OLD_ID.fullmatch(arxiv_id)
    if not new and not old:
        return None
    year, month = map(int, new.group(1, 2) if new else old.group(2, 3))
    return (year + (1900 if old and year > 90 else 2000), month) if 1 <= month <= 12 else None


def month_of_version(raw):
    """(year, month) of the first version of a row of the dump, None where it has no such date."""
    versions = raw.get("versions")
    if not isinstance(versions, list) or not versions or not isinstance(versions[0], dict):
        return None
    try:
        created = email.utils.parsedate_to_datetime(versions[0].get("created"))
    except (TypeError, ValueError):
        return None
    return created.year, created.month


def abstract(raw, counts):
    """(split such as "2023_07", id, text in one line) of a row of the dump, or of one with id and text.

    counts[APART] counts ids at odds with the date of the first version. UserError where nothing tells the month.
    """
    arxiv_id = common.text_of(raw, "id")
    text = common.text_of(raw, "text" if "text" in raw else "abstract")
    told, dated = month_of_id(arxiv_id), month_of_version(raw)
    if not told and not dated:
        raise UserError(
            f"id is {arxiv_id!r}, which tells no month (as 0704.0001 or hep-th/9901001 do), and versions[0].created neither"
        )
    if told and dated and abs(12 * (told[0] - dated[0]) + told[1] - dated[1]) > 1:
        counts[APART] += 1
    year, month = told or dated
    return f"{year:04d}_{month:02d}", arxiv_id, " ".join(text.split())


def sort_by_month(part, folder, number, sieve):
    """Sorts the rows of a part into folder/MONTH.NUMBER.jsonl; returns (its months, what was noted, what was left out)."""
    counts, sieve = collections.Counter(), sieve.fresh()
    with contextlib.ExitStack() as stack:
        files = {}  # some 400 at most, one a month since 1991

        def sort(raw, where):
            month, arxiv_id, text = abstract(raw, counts)
            row = common.row_of(text, arxiv_id)._replace(
                where="" if sieve.strict else where
            )  # `objects` puts the place before an error
            if sieve.take(row) is None:
                return ()
            if month not in files:
                files[month] = stack.enter_context(
                    open(f"{folder}/{month}.{number:06d}.jsonl", "w", encoding="utf-8")
                )
            files[month].write(json.dumps({"id": arxiv_id, "text": text}) + "\n")
            return ()

        for _ in shards.objects(part, sort, COLUMNS):
            pass
        return sorted(files), counts, sieve.left_out


class Builder(common.LocalBuilder, skip_registration=True):
    """`id` and `text`, the abstract, without the dump's line breaks; one split a month, such as 2023_07."""

    ABOUT = WHERE
    FLAGS = ("from",)
    FEATURES = common.TEXTS

    def sources(self, request):
        files = inputs.files_in(request.paths)
        return {"months": [inputs.Input(str(f)) for f in files]}

    def jobs(self, folder):
        """One pass over the dump sorts its rows by month; every month is then a job."""
        parts = [part for i in self.inputs["months"] for part in shards.parts_of(*i)]
        tasks = [
            (part, str(folder), number, self.sieve.fresh()) for number, part in enumerate(parts)
        ]
        months, counts = collections.defaultdict(list), collections.Counter()
        for number, (found, noted, left_out) in enumerate(
            shards.run(sort_by_month, tasks, self.processes, "sorting by month")
        ):
            counts.update(noted)
            self.sieve.add(left_out)
            for month in found:
                months[month].append(shards.Part(f"{folder}/{month}.{number:06d}.jsonl"))
        return {month: [months[month]] for month in sorted(months)}, counts

    @staticmethod
    def parse(raw, subset):
        yield common.row_of(raw["text"], raw["id"])
