"""The builder of arXiv's abstracts: a split for each month."""

import pytest
from builder_helpers import made, nothing_left, rows, write
from conftest import shared

from icae_jax.data import sources
from icae_jax.data.builders import shards
from icae_jax.data.builders.arxiv_abstracts import arxiv_abstracts_dataset_builder as arxiv


def paper(arxiv_id, created, text="  A text\nin lines.\n"):
    """A line of the dump."""
    versions = [
        {"version": "v1", "created": created},
        {"version": "v2", "created": "Tue, 24 Jul 2018 20:10:27 GMT"},
    ]
    fields = {
        "submitter": "A B",
        "authors": "A. B\nand C. D",
        "title": "T",
        "comments": None,
        "journal-ref": None,
        "doi": None,
    }
    more = {
        "report-no": None,
        "categories": "hep-ph",
        "license": None,
        "abstract": text,
        "versions": versions,
    }
    return {
        "id": arxiv_id,
        **fields,
        **more,
        "update_date": "2018-11-26",
        "authors_parsed": [["B", "A.", ""], ["D", "C.", ""]],
    }


@pytest.mark.parametrize(
    ("arxiv_id", "created", "month"),
    [
        ("0704.0001", "Mon, 2 Apr 2007 19:18:42 GMT", "2007_04"),
        (
            "1501.00001",
            "Wed, 31 Dec 2014 20:01:01 GMT",
            "2015_01",
        ),  # a new month's id for the old month's last night
        ("2312.12345v2", "Wed, 20 Dec 2023 20:01:01 GMT", "2023_12"),
        ("hep-th/9901001", "Fri, 1 Jan 1999 19:18:42 GMT", "1999_01"),
        ("math.AG/0309136", "Sun, 7 Sep 2003 19:18:42 GMT", "2003_09"),
        ("acc-phys/9411001", "Mon, 31 Oct 1994 15:24:11 GMT", "1994_11"),
        ("oddly named", "Sat, 2 Mar 2019 19:18:42 GMT", "2019_03"),
    ],
)
def test_the_month_of_a_paper(arxiv_id, created, month):
    """Breaks when an old or new id is misread (1999 is not 2099), or the first version is not used
    without one.
    """
    counts = {arxiv.APART: 0}
    assert arxiv.abstract(paper(arxiv_id, created), counts) == (month, arxiv_id, "A text in lines.")
    assert counts == {arxiv.APART: 0}


def test_ids_at_odds_with_the_first_version_are_counted():
    """Breaks when papers whose month is in doubt are not counted, or the date wins over the id."""
    counts = {arxiv.APART: 0}
    assert (
        arxiv.abstract(paper("hep-th/9201001", "Thu, 5 Mar 2009 10:00:00 GMT"), counts)[0]
        == "1992_01"
    )
    assert counts == {arxiv.APART: 1}
    for bad in ("9913.0001", "x/9913001", "paper7"):
        with pytest.raises(ValueError, match=f"id is '{bad}', which tells no month"):
            arxiv.abstract({"id": bad, "text": "t"}, counts)


def test_arxiv_abstracts(tmp_path, monkeypatch):
    """Breaks when a row is lost or doubled at the boundaries of parts or months, the result depends
    on the number of processes, or a month's rows change their order.
    """
    ids = [
        f"{year:02d}{month:02d}.{n:05d}"
        for n in range(3)
        for year in (23, 24)
        for month in (1, 2, 11)
    ]
    lines = [paper(i, f"Mon, 2 Jan 20{i[:2]} 19:18:42 GMT") for i in ids]
    dump = write(
        tmp_path / "arxiv-metadata-oai-snapshot.json", [*lines, "", paper("2401.99999", "", " \n")]
    )
    builder = made(tmp_path, "arxiv_abstracts", dump)
    assert list(builder.info.splits) == [
        "2023_01",
        "2023_02",
        "2023_11",
        "2024_01",
        "2024_02",
        "2024_11",
    ]
    noted = dict(builder.info.metadata["noted"])
    assert noted == {"empty texts left out": 1, arxiv.APART: 6}  # those of November, dated January
    got = rows(tmp_path, "tfds:arxiv_abstracts:2023-11..2024-01")
    assert [row.id for row in got] == [f"{m}.{n:05d}" for m in ("2311", "2401") for n in range(3)]
    assert (
        got[0].text == "A text in lines." and got[3].where == "tfds:arxiv_abstracts:2024_01 row 0"
    )

    monkeypatch.setattr(shards, "PART", 1500)  # a few lines
    other = made(tmp_path, "arxiv_abstracts", dump, label="parts", processes=2)
    one, two = (
        rows(tmp_path, f"tfds:{name}:..") for name in ("arxiv_abstracts", "arxiv_abstracts/parts")
    )
    assert [(row.id, row.text) for row in one] == [(row.id, row.text) for row in two] and len(
        one
    ) == len(ids)
    assert other.info.metadata["noted"] == noted
    assert {p.suffix for p in other.data_path.iterdir()} == {
        ".json",
        ".array_record-00000-of-00001",
    }, "nothing in passing stays"


def test_abstracts_that_tell_no_month_are_named(tmp_path):
    """Breaks when a row without a month is kept, or its line is not named."""
    path = write(
        tmp_path / "a.jsonl", [{"id": "2401.00001", "text": "t"}, {"id": "17", "text": "t"}]
    )
    with pytest.raises(ValueError, match=f"^{path}:2: id is '17', which tells no month"):
        made(tmp_path, "arxiv_abstracts", path)
    assert nothing_left(tmp_path, "arxiv_abstracts")


def test_arxiv_abstracts_on_real_ones(tmp_path):
    """Breaks when real abstracts are lost, changed beyond white space, or held-out months overlap
    with earlier ones.
    """
    paths = [shared(f"data/arxiv/{name}.jsonl.gz") for name in ("valid", "test")]
    made(tmp_path, "arxiv_abstracts", *paths)
    want = {
        row.id: " ".join(row.text.split()) for path in paths for row in sources.read_rows(str(path))
    }
    got = rows(tmp_path, "tfds:arxiv_abstracts:..")
    assert {row.id: row.text for row in got} == want and len(got) == 2000
    june = rows(tmp_path, "tfds:arxiv_abstracts:2026-06..")
    assert len(june) == 1000 and all(row.id.startswith("2606.") for row in june)
