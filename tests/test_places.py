"""Where data are: folders, globs, names with commas, object storage, the hub; and that their
identity is their content.
"""

import glob
import gzip
import os
import shutil
import sys
import types

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import write_jsonl
from etils import epath

from icae_jax import errors
from icae_jax.data import hub_sets, places, sources, tokens
from icae_jax.data.rows import Sieve
from icae_jax.errors import UserError


def texts(source):
    return [row.text for row in sources.read_rows(source)]


@pytest.fixture
def corpus(tmp_path):
    """A folder as in a repository of the hub: rows at two depths, and other files."""
    folder = tmp_path / "corpus"
    for name in (".git", "deep/deeper"):
        (folder / name).mkdir(parents=True)
    write_jsonl(folder / ".git" / "x.jsonl", [{"text": "hidden"}])
    write_jsonl(folder / "b.jsonl", [{"text": "b"}, {"text": "c"}])
    (folder / "deep" / "deeper" / "a.csv").write_text("text\nd\n")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}'))
    (folder / "README.md").write_text("read me")
    (folder / "dataset_info.json").write_text('{"features": {}}')
    (folder / "paper.pdf").write_bytes(b"%PDF")
    return folder


def test_a_folder_is_its_files_of_rows(corpus, tmp_path, capsys):
    """Breaks when a file of a folder is lost or out of order, a file that is not data is read, or
    skipped files are not reported.
    """
    rows = list(sources.read_rows(str(corpus)))
    assert [(row.text, row.id) for row in rows] == [
        ("a", "a.jsonl.gz:0"),
        ("b", "b.jsonl:0"),
        ("c", "b.jsonl:1"),
        ("d", "a.csv:0"),
    ]
    assert (
        f"data {corpus}: 3 files are read; 3 others are not, such as {corpus}/README.md"
        in capsys.readouterr().err
    )
    sources.check_present(str(corpus))
    every = [f"{corpus}/a.jsonl.gz", f"{corpus}/b.jsonl", f"{corpus}/deep/deeper/a.csv"]
    assert (
        sources.identity(str(corpus))
        == sources.identity(",".join(every))
        == sources.identity(f"{corpus}/")
    )
    shutil.copytree(corpus, tmp_path / "elsewhere")
    assert sources.identity(str(tmp_path / "elsewhere")) == sources.identity(str(corpus))
    write_jsonl(corpus / "b2.jsonl", [{"text": "new"}])
    assert sources.identity(str(corpus)) != sources.identity(",".join(every))


def test_links_and_copies_in_a_folder(corpus, tmp_path):
    """Breaks when a linked folder is lost, a cycle of links is followed forever, or a backup
    doubles its rows.
    """
    write_jsonl(tmp_path / "x.jsonl", [{"text": "linked"}])
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "z.jsonl").symlink_to(tmp_path / "x.jsonl")
    (corpus / "far").symlink_to(tmp_path / "far")
    (corpus / "deep" / "back").symlink_to(corpus)
    for name in ("b.jsonl.bak", "b.jsonl~", "c.jsonl.incomplete"):
        shutil.copy(corpus / "b.jsonl", corpus / name)
    assert texts(str(corpus)) == ["a", "b", "c", "d", "linked"]
    assert texts(f"{corpus}/b.jsonl.bak") == ["b", "c"]  # where it is asked for


def test_a_folder_of_texts_is_its_texts(tmp_path):
    """Breaks when texts are read only beside rows, or a licence or hidden file is one of them."""
    for name in ("2.txt", "1.md", "LICENSE", "LICENSE.txt", ".hidden.txt", "Makefile"):
        (tmp_path / name).write_text(name)
    assert texts(str(tmp_path)) == ["1.md", "2.txt"]


def test_globs(corpus):
    """Breaks when a pattern is taken for a file name, matches are unordered, or matching folders
    are not entered.
    """
    assert texts(f"{corpus}/*.jsonl*") == ["a", "b", "c"] and texts(f"{corpus}/**/*.csv") == ["d"]
    assert texts(f"{corpus}/*") == ["a", "b", "c", "d"] and texts(f"{corpus}/de[e]p") == ["d"]
    odd = corpus / "odd [1].jsonl"
    write_jsonl(odd, [{"text": "odd"}])
    assert texts(str(odd)) == ["odd"]
    assert sources.identity(f"{corpus}/b.*") == sources.identity(f"{corpus}/b.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "data .*empty: no files; expected files of JSON"),
        ("corpus/*.xyz", r"data .*\*\.xyz: no files; expected"),
        ("corpus/*.pdf", "data .*pdf: none of its 1 files is data; expected"),
        (
            "https://host/a.jsonl",
            "data file https://host/a.jsonl: https:// is not read; expected gs://",
        ),
        ("hf:a b", "hf:a b: not the name of a data set on the hub"),
        (" , ", "the data source is empty"),
    ],
)
def test_sources_that_stand_for_nothing(corpus, tmp_path, monkeypatch, source, message):
    """Breaks when an empty folder or a pattern without matches passes as empty data, or a URL as a
    file.
    """
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for read in (sources.check_present, sources.identity, texts):
        with pytest.raises(UserError, match=message):
            read(source)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_closed_folder_is_named(corpus):
    """Breaks when an unreadable folder counts as empty, so that half of the data is trained on."""
    (corpus / "deep").chmod(0)
    with pytest.raises(UserError, match="permission denied"):
        texts(str(corpus))


def test_names_with_commas_and_spaces(tmp_path, monkeypatch):
    """Breaks when a comma in a file's name makes it unusable, or an absent file swallows its
    neighbour.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("a, b.jsonl", "a", "c.jsonl", "x=y, z.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    assert places.split_source("a, b.jsonl,c.jsonl") == ["a, b.jsonl", "c.jsonl"]
    assert places.split_source("c.jsonl, a, b.jsonl ,tfds:x:train") == [
        "c.jsonl",
        "a, b.jsonl",
        "tfds:x:train",
    ]
    assert (
        places.split_source("a, no.jsonl") == ["a", "no.jsonl"]
        and places.split_source("gs://b/a, b.jsonl")[1] == "b.jsonl"
    )
    from icae_jax.evaluation import examples

    assert examples.named_sources("x=a, b.jsonl,c.jsonl") == {"x": "a, b.jsonl", "c": "c.jsonl"}
    assert list(examples.named_sources("x=y, z.jsonl")) == ["x=y, z"]


# ----------------------------------------------------------------------------------- object storage


@pytest.fixture
def bucket(corpus, tmp_path):
    """gs://bucket as a local folder, with the corpus and a table."""
    root = tmp_path / "bucket"
    shutil.copytree(corpus, root / "corpus")
    pa.parquet.write_table(pa.table({"text": ["p"]}), root / "p.parquet")

    def mapped(original, path, *args, **kw):
        return original(os.fspath(path).replace("gs://bucket", str(root)), *args, **kw)

    def globbed(original, path):
        return [
            match.replace(str(root), "gs://bucket")
            for match in glob.glob(os.fspath(path).replace("gs://bucket", str(root)))
        ]

    with epath.testing.mock_epath(
        open=mapped, isdir=mapped, listdir=mapped, stat=mapped, exists=mapped, glob=globbed
    ):
        yield root


def test_object_storage(bucket, corpus, tmp_path, tiny_tokenizer):
    """Breaks when a file, folder or glob of a bucket is not read, has another order than locally,
    or another identity than a local copy.
    """
    assert texts("gs://bucket/corpus") == ["a", "b", "c", "d"] and texts(
        "gs://bucket/corpus/*.jsonl*"
    ) == ["a", "b", "c"]
    assert texts("gs://bucket/p.parquet, gs://bucket/corpus/b.jsonl") == ["p", "b", "c"]
    assert next(sources.read_rows("gs://bucket/p.parquet")).where == "gs://bucket/p.parquet row 0"
    sources.check_present("gs://bucket/corpus")
    os.rename(bucket / "corpus" / "deep", bucket / "corpus" / "deep.en")  # a folder with a suffix
    assert texts("gs://bucket/corpus") == ["a", "b", "c", "d"]
    assert sources.identity("gs://bucket/corpus") == sources.identity(str(corpus))
    remote, here = (
        tokens.tokenise(source, tiny_tokenizer, str(tmp_path / "cache"))
        for source in ("gs://bucket/corpus", str(corpus))
    )
    assert remote.key == here.key


def test_the_hash_of_a_large_remote_file_is_kept(bucket, tmp_path, monkeypatch):
    """Breaks when gigabytes are read from a bucket at each start, or a hash outlives a change of
    the file.
    """
    monkeypatch.setattr(tokens, "REMEMBERED", 10)
    hashed, content_hash = [], tokens.reading.content_hash
    monkeypatch.setattr(
        tokens.reading, "content_hash", lambda path: hashed.append(path) or content_hash(path)
    )
    for change in (1, 2):
        os.utime(bucket / "p.parquet", (change, change))
        assert len({tokens._content_hash(tmp_path, "gs://bucket/p.parquet") for _ in range(3)}) == 1
    assert len(hashed) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gs://bucket/corpus/no.jsonl", "data file gs://bucket/corpus/no.jsonl: no such file"),
        ("gs://bucket/no", "data file gs://bucket/no: no such file"),
        ("gs://bucket/corpus/*.xyz", r"data gs://bucket/corpus/\*\.xyz: no files"),
        (
            "gs://bucket/**/*.jsonl",
            r"data gs://bucket/\*\*/\*\.jsonl: \*\* is not read there; give the folder",
        ),
        (
            "gs://bucket/corpus/paper.pdf",
            r"data file gs://bucket/corpus/paper\.pdf: \.pdf is no format",
        ),
    ],
)
def test_what_a_bucket_has_not(bucket, source, message):
    """Breaks when an absent or unknown file of a bucket gives a traceback."""
    for read in (sources.check_present, sources.identity):
        with pytest.raises(UserError, match=f"^{message}"):
            read(source)
    with pytest.raises(UserError, match=f"^{message.replace('no such file', 'cannot be read')}"):
        texts(source)


def failing(error):
    def raising(original, *args, **kw):
        raise error

    return epath.testing.mock_epath(open=raising, exists=raising, isdir=raising, stat=raising)


def test_what_a_storage_answers(monkeypatch):
    """Breaks when a network fault ends a run for good (exit code 2) or is not retried, or a refusal
    is retried.
    """
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    with failing(ConnectionResetError("reset")), pytest.raises(ConnectionResetError):
        sources.read_all("gs://bucket/a.jsonl")
    forbidden = Exception("no access")
    forbidden.code = 403
    answers = (
        (forbidden, "no access"),
        (ImportError("gcsfs"), "pip install gcsfs for gs://"),
        (FileNotFoundError("gone"), "gone"),
    )
    for error, said in answers:
        with (
            failing(error),
            pytest.raises(
                UserError, match=f"^data file gs://bucket/a.jsonl: cannot be read .*{said}"
            ),
        ):
            sources.read_all("gs://bucket/a.jsonl")


# ------------------------------------------------------------------------------------------ the hub


class FakeSet:
    """A data set as the `datasets` library returns it."""

    _fingerprint = "f0"

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, at):
        return {name: values[at] for name, values in self.columns.items()}

    def select_columns(self, names):
        return FakeSet({name: self.columns[name] for name in names})


SET = FakeSet(
    {
        "context": ["c", "d"],
        "question": ["q", "r"],
        "answers": [{"text": ["a"]}, {"text": []}],
        "image": [b"\xff", b"\xff"],
    }
)


@pytest.fixture
def library(monkeypatch):
    """A fake `datasets` library that loads SET: its calls, and what it raises instead."""
    asked, raised = [], []

    def load_dataset(*args, **kw):
        asked.append((*args, kw["split"], kw["revision"]))
        if raised:
            raise raised[0]
        return SET

    config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=config)
    )
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    return asked, raised, config


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hf:squad", ("squad", None, "train", None)),
        ("hf:org/squad_v2:validation", ("org/squad_v2", None, "validation", None)),
        (
            "hf:org/wiki/text-2-v1@main:train[:10%]",
            ("org/wiki", "text-2-v1", "train[:10%]", "main"),
        ),
    ],
)
def test_sets_of_the_hub(library, monkeypatch, spec, asked):
    """Breaks when a configuration, revision, split or row is lost, or a set's own code would
    run.
    """
    monkeypatch.setattr(hub_sets, "BATCH", 1)
    sieve = Sieve()
    rows = list(sources.read_rows(spec, sieve=sieve))
    assert library[0] == [asked] and library[2].HF_DATASETS_TRUST_REMOTE_CODE is False
    assert [row[:5] for row in rows] == [
        ("c", "q", ("a",), f"{spec} row 0", "0"),
        ("d", "r", (), f"{spec} row 1", "1"),
    ]
    assert (
        sieve.left_out
        and sources.identity(spec) == [["hf", "f0", 2]]
        and not sources.earlier_identity(spec)
    )


def test_sets_of_the_hub_that_cannot_be_read(library, monkeypatch):
    """Breaks when a wrong name, HF_HUB_OFFLINE or an absent library is not one line for the user,
    or an outage is.
    """
    _, raised, config = library
    raised[:] = [FileNotFoundError("no such\nset")]
    with pytest.raises(
        UserError, match=r"^hf:org/no:train: cannot be read as a data set of the hub .no such set.$"
    ):
        texts("hf:org/no:train")
    raised[:] = [ConnectionError("Couldn't reach the hub")]
    with pytest.raises(ConnectionError):
        texts("hf:org/no:train")
    config.HF_HUB_OFFLINE = True
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        texts("hf:org/no:train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError,
        match=r"^hf:org/no: a data set of the hub needs the datasets library: pip install datasets",
    ):
        texts("hf:org/no")


def test_which_names_are_sets():
    """Breaks when the URL of a file of the hub is taken for a set."""
    assert places.is_set("hf:org/name") and places.is_set("tfds:x:train")
    assert not places.is_set("hf://datasets/org/name/a.jsonl") and not places.is_set("hf.jsonl")


def test_a_pipe_is_no_data_file(tmp_path):
    """Breaks when a pipe, which can be read only once, is waited for forever or read as text."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(
        UserError, match=r"rows\.jsonl: no plain file, which is read twice; save it as one"
    ):
        sources.read_texts(str(tmp_path / "rows.jsonl"), "--input")
