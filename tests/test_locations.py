"""Where base models come from: folders, the hub, object storage. No network is used."""

import errno
import importlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

import huggingface_hub
import huggingface_hub.errors
import jax
import pytest
import safetensors.numpy
import tqdm
from conftest import ROOT, TINY, random_trained
from etils import epath
from huggingface_hub import constants

from icae_jax import errors
from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import fetching, locations, orbax_copy, remote_rows, weights
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.workflows import convert_base

httpx = importlib.import_module(
    huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]
)  # the client that the hub uses


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """Whatever the environment says, no test reaches a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def bucket(tmp_path, tiny_base, monkeypatch):
    """gs://bucket as a local folder, with the tiny base in bases/tiny; `opened` lists the files
    read.
    """
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "bucket"
    shutil.copytree(tiny_base, root / "bases" / "tiny")
    opened = []

    def mapped(original, path, *args, **kw):
        return original(os.fspath(path).replace("gs://bucket", str(root)), *args, **kw)

    def opening(original, path, *args, **kw):
        opened.append(os.path.basename(path))
        return mapped(original, path, *args, **kw)

    with epath.testing.mock_epath(open=opening, isdir=mapped, listdir=mapped, stat=mapped):
        yield root / "bases" / "tiny", opened


URL = "gs://bucket/bases/tiny"


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in pathlib.Path(folder).rglob("*")
        if p.is_file()
    }


def test_folder_is_taken_as_it_is(tiny_base, tmp_path, monkeypatch):
    """Breaks when a folder is copied, or one that is named like a hub id is sought on the hub."""
    assert locations.local_folder(tiny_base) == tiny_base == locations.local_folder(str(tiny_base))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "meta" / "llama")
    assert locations.local_folder("meta/llama") == pathlib.Path("meta/llama")


@pytest.mark.parametrize(
    "base",
    [
        "absent",
        "./runs/base",
        "../base",
        "/absent/base",
        "a/b/c",
        "gs:/bucket/base",
        "~/base",
        "a/b@",
        "",
    ],
)
def test_what_is_neither_folder_nor_hub_id(base, tmp_path, monkeypatch):
    """Breaks when the hub is asked for a mistyped path, or an empty path is the current folder."""
    monkeypatch.chdir(tmp_path)  # where none of them is
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    with pytest.raises(
        ValueError,
        match=r"is not a folder; give a model-hub folder with .*, "
        "a hub id such as meta-llama/.*, or gs://",
    ):
        locations.local_folder(base)


# ------------------------------------------------------------------------------------------ the hub


def test_hub_id(tiny_base, monkeypatch):
    """Breaks when the revision is lost, needed files are not fetched, or other copies of the
    weights are.
    """
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tiny_base)
    )
    assert locations.local_folder("meta-llama/Llama-3.2-1B") == tiny_base
    assert locations.local_folder("org/name@refs/pr/1", progress=False) == tiny_base
    assert [(a[0], k["revision"]) for a, k in asked] == [
        ("meta-llama/Llama-3.2-1B", None),
        ("org/name", "refs/pr/1"),
    ]
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE.txt",
        "tokenizer.model.v3",
    }
    other = {
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "model.gguf",
        "model.pt",
        "original/params.json",
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/config.json",
        "gguf/model.safetensors",
        "tokenizer.py",
        "tokenization_x.py",
        "tokenizer_x.py",
        "tokenizer.pyc",
        "tokenizer.model.py",
        "LICENSE.py",
        "modeling.py",
    }
    patterns = {k: asked[0][1][k] for k in ("allow_patterns", "ignore_patterns")}
    assert set(huggingface_hub.utils.filter_repo_objects(needed | other, **patterns)) == needed


def test_hub_id_from_the_hubs_cache_without_a_network(tmp_path, tiny_base, monkeypatch):
    """Breaks when a downloaded base needs the network again, or a missing one gives a traceback."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"base 'org/tiny': there is no folder org/tiny in .*HF_HUB_OFFLINE is set"
    ):
        locations.local_folder("org/tiny")
    shutil.copytree(tiny_base, tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40))
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    for base in ("org/tiny", "org/tiny@main"):
        assert contents(locations.local_folder(base)) == contents(tiny_base)
    with pytest.raises(
        ValueError, match=r"base 'org/tiny@v2': there is no folder .*HF_HUB_OFFLINE is set"
    ):
        locations.local_folder("org/tiny@v2")


def test_a_new_process_finds_the_hubs_settings(tmp_path):
    """Breaks when a setting of the hub's library is read before the module that holds it is
    imported.
    """
    code = (
        "from icae_jax import errors; from icae_jax.interop.hub import locations\n"
        "try: locations.local_folder('models/llama')\n"
        "except errors.UserError as error: print(error)"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        "there is no folder models/llama" in out.stdout and "HF_HUB_OFFLINE is set" in out.stdout
    ), out.stderr


def test_the_hubs_files_are_read_in_exact_ranges(tiny_base, monkeypatch):
    """Breaks when the hub's filesystem reads more of a file than the requested rows."""
    read = []

    def fetch(self, start, end):
        read.append(end - start)
        return (tiny_base / "model.safetensors").read_bytes()[start:end]

    module = importlib.import_module("huggingface_hub.hf_file_system")
    resolved = types.SimpleNamespace(unresolve=lambda: "org/tiny@c/model.safetensors")
    size = (tiny_base / "model.safetensors").stat().st_size
    monkeypatch.setattr(
        module.HfFileSystem, "resolve_path", lambda self, path, revision=None, **_: resolved
    )
    monkeypatch.setattr(
        module.HfFileSystem,
        "info",
        lambda self, path, **_: {"name": path, "size": size, "type": "file"},
    )
    monkeypatch.setattr(module.HfFileSystemFile, "_fetch_range", fetch)
    remote = locations.remote_opener("org/tiny", pathlib.Path("c" * 40))
    rows = remote_rows.read_rows(tiny_base, remote, "model.embed_tokens.weight", [7, 3])
    assert (
        rows
        == safetensors.numpy.load_file(tiny_base / "model.safetensors")[
            "model.embed_tokens.weight"
        ][[7, 3]]
    ).all()
    assert read[0] == 8 and read[2:] == [TINY.hidden_size * 4] * 2


def test_repository_without_a_base(tmp_path, monkeypatch):
    """Breaks when a repository of another kind (an adapter, GGUF files) is only noticed by a
    missing file in a cache.
    """
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ValueError, match=r"base 'org/adapter' has no config\.json"):
        locations.local_folder("org/adapter")


def failure(status, kind=huggingface_hub.errors.HfHubHTTPError, text="the hub's own words"):
    """An error as the hub's client raises it for a response."""
    return kind(
        text,
        response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x")),
    )


UNREACHABLE = huggingface_hub.errors.LocalEntryNotFoundError(
    "Got: ConnectError: [Errno 111] Connection refused"
)


@pytest.mark.parametrize(
    ("error", "users"),
    [
        (failure(404, huggingface_hub.errors.RepositoryNotFoundError), True),
        (failure(404, huggingface_hub.errors.RevisionNotFoundError), True),
        (failure(403, huggingface_hub.errors.GatedRepoError), True),
        (failure(401), True),
        (huggingface_hub.errors.HFValidationError("Repo id must"), True),
        (failure(500), False),
        (failure(429), False),
        (failure(503), False),
        (UNREACHABLE, False),
        (httpx.ConnectError("[Errno 111] Connection refused"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
    ids=lambda value: (
        getattr(value, "__class__", type(value)).__name__ if isinstance(value, Exception) else None
    ),
)
def test_an_outage_is_not_the_users_fault(error, users, monkeypatch, tmp_path, capsys):
    """Breaks when an unreachable hub ends a launched run for good, one that refuses is asked
    again, or the message omits that a mistyped path looks like a hub id.
    """
    asked = []

    def snapshot_download(*args, **kw):
        asked.append(args)
        raise error

    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError if users else ConnectionError) as caught:
        locations.local_folder("models/llama")
    assert errors.is_users(caught.value) == users and len(asked) == (1 if users else errors.TRIES)
    assert f"there is no folder models/llama in {tmp_path}" in str(
        caught.value
    ) and "hub id models/llama" in str(caught.value)
    assert (
        str(error).split()[-1] in str(caught.value)
        and capsys.readouterr().err.count("trying again") == len(asked) - 1
    )


def test_a_hub_that_comes_back(tiny_base, monkeypatch):
    """Breaks when one failed response ends a start that a retry would save."""
    answers = [type(UNREACHABLE)(*UNREACHABLE.args), failure(502)]
    monkeypatch.setattr(errors, "FIRST_DELAY", 0)

    def snapshot_download(*args, **kw):
        if answers:
            raise answers.pop(0)
        return str(tiny_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locations.local_folder("org/tiny") == tiny_base and not answers


class Hub:
    """A hub with one base, as `snapshot_download` and `HfFileSystem` show it; `read` counts bytes
    read of remote weights.
    """

    def __init__(self, base, cache, monkeypatch):
        self.base, self.cache, self.fetched, self.read = base, cache, [], 0
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(
            huggingface_hub, "HfFileSystem", lambda: types.SimpleNamespace(open=self.open)
        )

    def snapshot_download(self, repository, *, allow_patterns, ignore_patterns, **_):
        names = [p.relative_to(self.base).as_posix() for p in self.base.rglob("*") if p.is_file()]
        folder = self.cache / "snapshots" / ("c" * 40)
        folder.mkdir(parents=True, exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            self.fetched.append(name)
            shutil.copyfile(self.base / name, folder / name)
        return str(folder)

    def open(self, path, mode, revision, **_):
        assert path.startswith("org/tiny/") and revision == "c" * 40
        hub, file = self, io.FileIO(self.base / path.removeprefix("org/tiny/"), mode)

        class Counted(io.BufferedReader):
            def read(self, size):
                hub.read += size
                return super().read(size)

        return Counted(file)


@pytest.mark.parametrize("files_of_weights", [1, 3, "both"])
def test_looking_at_a_base_of_the_hub_fetches_no_weights(
    tiny_base, tiny_params, tmp_path, monkeypatch, capsys, files_of_weights
):
    """Breaks when `icae inspect --base`, or the sizes for a plan, download gigabytes, or the
    identity of remote weights differs.
    """
    folder = shutil.copytree(tiny_base, tmp_path / "hub")
    if files_of_weights == "both":  # the one file counts, and the index beside it is old
        weights.save_params(
            folder, TINY, jax.tree.map(lambda x: -x, tiny_params), "bfloat16", max_file_bytes=10_000
        )
    elif files_of_weights > 1:
        (folder / "model.safetensors").unlink()
        size = sum(x.nbytes for x in jax.tree.leaves(tiny_params)) // files_of_weights
        weights.save_params(folder, TINY, tiny_params, "bfloat16", max_file_bytes=size // 2)
        assert len(list(folder.glob("*.safetensors"))) > 2
    hub = Hub(folder, tmp_path / "cache", monkeypatch)
    assert bases.sizes("org/tiny") == TINY and tokenizers.load_tokenizer("org/tiny")("the cat")[
        "input_ids"
    ] == [1, 8, 9]
    assert hub.fetched and not hub.read
    whole = bases.load_base(folder)
    adapter = adapters.Adapter(
        CompressionConfig(k=3, rate=4, layout="sequential"),
        LoraConfig(4, 2.0, targets=("q_proj", "v_proj")),
        targets.make_template("plain", whole.tokenizer),
        random_trained(TINY, 3),
        "org/tiny",
        whole.fingerprint,
    )
    adapters.save_adapter(tmp_path / "adapter", adapter)
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--base", "org/tiny"]) == 0
    assert "fits" in capsys.readouterr().out and not [
        name for name in hub.fetched if name.endswith(".safetensors")
    ]
    header = max(int.from_bytes(p.read_bytes()[:8], "little") for p in folder.glob("*.safetensors"))
    assert 0 < hub.read <= 65 * TINY.hidden_size * 4 + 2 * (8 + header + 1)
    assert (
        bases.load_base("org/tiny").fingerprint == whole.fingerprint
    )  # which fetches the weights as ever
    assert [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_tensor_is_read_where_it_is(tiny_base):
    """Breaks when rows read remotely are not the tensor's, in any dtype, or a file without it gives
    a traceback.
    """
    tensors = safetensors.numpy.load_file(tiny_base / "model.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            stored = {name: value.astype(dtype) for name, value in tensors.items()}
            safetensors.numpy.save_file(stored, folder / "model.safetensors")
            for name, rows in (
                ("model.embed_tokens.weight", [5, 0, 63]),
                ("model.embed_tokens.weight", None),
                ("model.norm.weight", None),
            ):
                got = remote_rows.read_rows(
                    folder, lambda name: io.FileIO(folder / name), name, rows
                )
                want = stored[name].astype("float32").reshape(-1, TINY.hidden_size)
                assert (
                    got == (want if rows is None else want[rows])
                ).all() and got.dtype == "float32"
        for text in (
            b"{",
            (9).to_bytes(8, "little") + b'{"a": 1} ',
            (1 << 60).to_bytes(8, "little"),
        ):
            (folder / "model.safetensors").write_bytes(text)
            with pytest.raises(errors.UserError, match=r"model\.safetensors: no"):
                remote_rows.read_rows(
                    folder, lambda name: io.FileIO(folder / name), "model.norm.weight"
                )


# ----------------------------------------------------------------------------------- object storage


def test_url_is_copied_once(bucket, tiny_base, tmp_path, capsys, monkeypatch):
    """Breaks when a file is not copied, one that is not of the base is, or a second start copies
    again.
    """
    remote, opened = bucket
    bar = tqdm.tqdm
    monkeypatch.setattr(fetching.tqdm, "tqdm", lambda **kw: bar(**kw | {"delay": 0}))
    for name in (
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
    ):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("{}")
    folder = locations.local_folder(URL)
    assert folder.is_relative_to(tmp_path / "cache" / "bases") and contents(folder) == contents(
        tiny_base
    )
    assert f"copying {URL}: 100%" in capsys.readouterr().err
    assert sorted(opened) == sorted(contents(tiny_base))
    opened.clear()
    assert (
        locations.local_folder(URL + "/", progress=False) == folder
        and not opened
        and not capsys.readouterr().err
    )


def test_changed_files_are_copied_again_and_removed_ones_go(bucket):
    """Breaks when an old copy is used for a base that was replaced, or old weights are loaded with
    new ones.
    """
    remote, opened = bucket
    locations.local_folder(URL)
    opened.clear()
    config = remote / "config.json"
    config.write_text(config.read_text() + "\n")  # another size
    os.utime(remote / "generation_config.json", (1, 1))  # another time
    (remote / "model.safetensors").rename(remote / "model-00001-of-00001.safetensors")
    assert contents(locations.local_folder(URL)) == contents(remote)
    assert sorted(opened) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
    ]


def test_broken_copying_leaves_no_half_file(bucket, monkeypatch):
    """Breaks when a partly copied file counts as complete at the next start."""
    remote, _ = bucket
    copy = fetching._copy

    def broken(source, target, length, *rest):
        copy(source, target, length + (source.name == "model.safetensors"), *rest)

    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    monkeypatch.setattr(fetching, "_copy", broken)
    with pytest.raises(
        ConnectionError,
        match=r"cannot be reached.*model\.safetensors ended after \d+ bytes, \d+ expected",
    ):
        locations.local_folder(URL)
    monkeypatch.undo()
    monkeypatch.setenv("ICAE_CACHE", str(remote.parents[2] / "cache"))
    assert not list((remote.parents[2] / "cache").rglob("*model.safetensors*"))
    assert contents(locations.local_folder(URL)) == contents(remote)


def test_orbax_copy_at_a_url(bucket, tiny_params, monkeypatch, tmp_path):
    """Breaks when the weights are copied, though every host needs only its shards; or they are not
    found in the bucket, or used though there are safetensors files.
    """
    remote, _ = bucket
    orbax_copy.save_orbax(remote, tiny_params)
    folder = locations.local_folder(URL)
    assert not orbax_copy.is_orbax(folder) and not (folder / orbax_copy.ORBAX_URL).exists()
    (remote / "model.safetensors").unlink()
    folder = locations.local_folder(URL)
    assert (
        orbax_copy.is_orbax(folder)
        and not (folder / "params").exists()
        and not (folder / "model.safetensors").exists()
    )
    assert (folder / orbax_copy.ORBAX_URL).read_text() == f"{URL}/params\n"
    # tensorstore reads buckets itself, without epath: it is given the folder behind the bucket.
    local = types.SimpleNamespace(Path=lambda url: epath.Path(url.replace(URL, str(remote))))
    monkeypatch.setattr(orbax_copy, "epath", local)
    loaded = weights.load_params(folder, TINY)
    assert all(
        (got == want).all()
        for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny_params), strict=True)
    )
    convert_base.convert(folder, tmp_path / "hub")
    assert sorted(contents(tmp_path / "hub")) == sorted(
        {*contents(folder), "model.safetensors"} - {orbax_copy.ORBAX_URL}
    )


def test_looking_at_a_base_in_a_bucket_copies_no_weights(bucket, tiny_base):
    """Breaks when the weights are copied just to inspect a base, or weights of an earlier copy
    stand for their replacements.
    """
    remote, opened = bucket
    assert bases.sizes(URL) == TINY and "model.safetensors" not in opened and opened
    opened.clear()
    want = bases.load_base(tiny_base).fingerprint
    assert bases.identify(URL) == (TINY, want) and set(opened) == {"model.safetensors"}  # in place
    assert bases.load_base(URL).fingerprint == want
    opened.clear()
    assert bases.identify(URL) == (TINY, want) and not opened
    tensors = safetensors.numpy.load_file(remote / "model.safetensors")
    safetensors.numpy.save_file(
        {k: -v for k, v in tensors.items()} | {"more": tensors["model.norm.weight"]},
        remote / "model.safetensors",
    )
    assert bases.identify(URL)[1] == bases.load_base(remote).fingerprint != want
    assert bases.load_base(URL).fingerprint == bases.load_base(remote).fingerprint


def test_a_bucket_that_comes_back(bucket, tiny_base, monkeypatch):
    """Breaks when one failed read of a bucket ends a start, a lasting failure counts as bad input,
    or half a file stays.
    """
    remote, _ = bucket
    copy, failures = (
        fetching._copy,
        [OSError(errno.EIO, "Input/output error"), ConnectionResetError(104, "reset")],
    )

    def broken(source, target, *rest):
        if failures and source.name == "model.safetensors":
            target.write_bytes(b"half")
            raise failures.pop()
        copy(source, target, *rest)

    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    monkeypatch.setattr(fetching, "_copy", broken)
    assert contents(locations.local_folder(URL)) == contents(tiny_base) and not failures
    failures += [ConnectionResetError(104, "reset")] * errors.TRIES
    os.utime(remote / "model.safetensors", (1, 1))
    with pytest.raises(
        ConnectionError,
        match="base 'gs://bucket/bases/tiny' cannot be read: the store cannot be reached",
    ) as caught:
        locations.local_folder(URL)
    assert not errors.is_users(caught.value)


def test_where_tensorstore_looks():
    """Breaks when a bucket is read as a folder of this machine, or by another storage's driver."""
    assert orbax_copy._kvstore(pathlib.Path("/a/params")) == {
        "driver": "file",
        "path": "/a/params/",
    }
    assert orbax_copy._kvstore(epath.Path("gs://b/x/params")) == {
        "driver": "gcs",
        "bucket": "b",
        "path": "x/params/",
    }
    assert orbax_copy._kvstore(epath.Path("s3://b/params")) == {
        "driver": "s3",
        "bucket": "b",
        "path": "params/",
    }


def test_the_hubs_own_urls_offline(monkeypatch):
    """Breaks when hf://… without a network counts as an outage, after which launchers start again
    and again.
    """

    def asked(*_):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(fetching, "_remote_files", asked)
    with pytest.raises(
        errors.UserError,
        match="'hf://org/name' cannot be read: no copy is in the local cache",
    ):
        locations.local_folder("hf://org/name")


def test_what_a_url_can_lack(bucket, monkeypatch):
    """Breaks when a missing folder, one without a base, or a missing package gives a traceback, or
    leaves a folder in the cache.
    """
    remote, _ = bucket
    with pytest.raises(
        errors.UserError, match="base 'gs://bucket/absent' cannot be read: FileNotFoundError"
    ):
        locations.local_folder("gs://bucket/absent")
    (remote / "config.json").unlink()
    with pytest.raises(ValueError, match=r"base 'gs://bucket/bases/tiny' has no config\.json"):
        locations.local_folder(URL)

    def no_package(original, path):
        raise ImportError("Please install gcsfs to access Google Storage")

    with (
        epath.testing.mock_epath(listdir=no_package),
        pytest.raises(ValueError, match=r"not installed: .*gcsfs.*pip install gcsfs"),
    ):
        locations.local_folder(URL)
    assert not (remote.parents[2] / "cache").exists()
