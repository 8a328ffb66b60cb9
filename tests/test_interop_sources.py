"""Where base models come from: folders, the hub, object storage; without a network."""

import os
import pathlib
import shutil
import types

import huggingface_hub
import jax
import pytest
import tqdm
from conftest import TINY
from etils import epath

from icae_jax import convert_base
from icae_jax.interop import sources, weights


@pytest.fixture
def bucket(tmp_path, tiny_base, monkeypatch):
    """gs://bucket as a folder of this machine, with the tiny base in bases/tiny; `opened` lists the files that were read."""
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
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def test_folder_is_taken_as_it_is(tiny_base, tmp_path, monkeypatch):
    """Breaks when a folder is copied, or one that is named like a hub id is looked for on the hub."""
    assert sources.local_folder(tiny_base) == tiny_base == sources.local_folder(str(tiny_base))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta" / "llama").mkdir(parents=True)
    assert sources.local_folder("meta/llama") == pathlib.Path("meta/llama")


@pytest.mark.parametrize("base", ["absent", "./runs/base", "../base", "/absent/base", "a/b/c", "gs:/bucket/base", "~/base", "a/b@", ""])
def test_what_is_neither_folder_nor_hub_id(base, monkeypatch):
    """Breaks when a mistyped path is asked of the hub, or no path is the current folder."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"is not a folder; give a model-hub folder with .*, a hub id such as meta-llama/.*, or gs://"):
        sources.local_folder(base)


# -------------------------------------------------------------------------------------------------------------- the hub


def test_hub_id(tiny_base, monkeypatch):
    """Breaks when the revision is lost, files that loading needs are not fetched, or other copies of the weights are."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tiny_base))
    assert sources.local_folder("meta-llama/Llama-3.2-1B") == tiny_base
    assert sources.local_folder("org/name@refs/pr/1", progress=False) == tiny_base
    assert [(a[0], k["revision"]) for a, k in asked] == [("meta-llama/Llama-3.2-1B", None), ("org/name", "refs/pr/1")]
    needed = {
        "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "LICENSE.txt",
    }  # fmt: skip
    other = {
        "README.md", ".gitattributes", "pytorch_model.bin", "model.gguf", "model.pt", "original/params.json", "original/tokenizer.model",
        "original/consolidated.00.pth", "consolidated.safetensors", "onnx/config.json", "gguf/model.safetensors",
    }  # fmt: skip
    patterns = {k: asked[0][1][k] for k in ("allow_patterns", "ignore_patterns")}
    assert set(huggingface_hub.utils.filter_repo_objects(needed | other, **patterns)) == needed


def test_hub_id_from_the_hubs_cache_without_a_network(tmp_path, tiny_base, monkeypatch):
    """Breaks when a base that was downloaded once needs the network again, or an absent one ends in a traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"base 'org/tiny': there is no such folder here, and the hub says: .*offline|outgoing traffic"):
        sources.local_folder("org/tiny")
    shutil.copytree(tiny_base, tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40))
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    for base in ("org/tiny", "org/tiny@main"):
        assert contents(sources.local_folder(base)) == contents(tiny_base)
    with pytest.raises(ValueError, match="base 'org/tiny@v2': there is no such folder here, and the hub says"):
        sources.local_folder("org/tiny@v2")


def test_repository_without_a_base(tmp_path, monkeypatch):
    """Breaks when a repository of another kind (an adapter, GGUF files) is only found out by a missing file somewhere in a cache."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(ValueError, match=r"base 'org/adapter' has no config\.json"):
        sources.local_folder("org/adapter")


# ------------------------------------------------------------------------------------------------------ object storage


def test_url_is_copied_once(bucket, tiny_base, tmp_path, capsys, monkeypatch):
    """Breaks when a file is not copied, what is not of the base is, or a second start copies again."""
    remote, opened = bucket
    bar = tqdm.tqdm
    monkeypatch.setattr(sources.tqdm, "tqdm", lambda **kw: bar(**kw | {"delay": 0}))
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("{}")
    folder = sources.local_folder(URL)
    assert folder.is_relative_to(tmp_path / "cache" / "bases") and contents(folder) == contents(tiny_base)
    assert f"copying {URL}: 100%" in capsys.readouterr().err
    assert sorted(opened) == sorted(contents(tiny_base))
    opened.clear()
    assert sources.local_folder(URL + "/", progress=False) == folder and not opened and not capsys.readouterr().err


def test_changed_files_are_copied_again_and_removed_ones_go(bucket):
    """Breaks when an old copy is used for a base that was replaced, or old weights are loaded beside new ones."""
    remote, opened = bucket
    sources.local_folder(URL)
    opened.clear()
    config = remote / "config.json"
    config.write_text(config.read_text() + "\n")  # another size
    os.utime(remote / "generation_config.json", (1, 1))  # another time
    (remote / "model.safetensors").rename(remote / "model-00001-of-00001.safetensors")
    assert contents(sources.local_folder(URL)) == contents(remote)
    assert sorted(opened) == ["config.json", "generation_config.json", "model-00001-of-00001.safetensors"]


def test_broken_copying_leaves_no_half_file(bucket, monkeypatch):
    """Breaks when a file that was not copied to its end is taken for whole at the next start."""
    remote, _ = bucket
    copy = sources._copy

    def broken(source, target, bar):
        copy(source, target, bar)
        if source.name == "model.safetensors":
            os.truncate(target, 100)

    monkeypatch.setattr(sources, "_copy", broken)
    with pytest.raises(ValueError, match=r"model\.safetensors is 100 bytes, \d+ expected; run the command again"):
        sources.local_folder(URL)
    monkeypatch.undo()
    monkeypatch.setenv("ICAE_CACHE", str(remote.parents[2] / "cache"))
    assert not list((remote.parents[2] / "cache").rglob("*model.safetensors*"))
    assert contents(sources.local_folder(URL)) == contents(remote)


def test_orbax_copy_at_a_url(bucket, tiny_params, monkeypatch, tmp_path):
    """Breaks when the weights are copied, though every host needs but its parts of them; or when they are not found where they are, or
    taken though there are safetensors files.
    """
    remote, _ = bucket
    weights.save_orbax(remote, tiny_params)
    folder = sources.local_folder(URL)
    assert not weights.is_orbax(folder) and not (folder / weights.ORBAX_URL).exists()
    (remote / "model.safetensors").unlink()
    folder = sources.local_folder(URL)
    assert weights.is_orbax(folder) and not (folder / "params").exists() and not (folder / "model.safetensors").exists()
    assert (folder / weights.ORBAX_URL).read_text() == f"{URL}/params\n"
    # tensorstore reads buckets by itself, without epath: here its path is the folder that stands for the bucket.
    local = types.SimpleNamespace(Path=lambda url: epath.Path(url.replace(URL, str(remote))))
    monkeypatch.setattr(weights, "epath", local)
    loaded = weights.load_params(folder, TINY)
    assert all((got == want).all() for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny_params), strict=True))
    convert_base.convert(folder, tmp_path / "hub")
    assert sorted(contents(tmp_path / "hub")) == sorted({*contents(folder), "model.safetensors"} - {weights.ORBAX_URL})


def test_where_tensorstore_looks():
    """Breaks when a bucket is read as a folder of this machine, or by another storage's driver."""
    assert weights._store(pathlib.Path("/a/params")) == {"driver": "file", "path": "/a/params/"}
    assert weights._store(epath.Path("gs://b/x/params")) == {"driver": "gcs", "bucket": "b", "path": "x/params/"}
    assert weights._store(epath.Path("s3://b/params")) == {"driver": "s3", "bucket": "b", "path": "params/"}


def test_what_a_url_can_lack(bucket, monkeypatch):
    """Breaks when an absent folder, one without a base, or an absent package ends in a traceback, or leaves a folder in the cache."""
    remote, _ = bucket
    with pytest.raises(ValueError, match="base 'gs://bucket/absent' cannot be read: FileNotFoundError"):
        sources.local_folder("gs://bucket/absent")
    (remote / "config.json").unlink()
    with pytest.raises(ValueError, match=r"base 'gs://bucket/bases/tiny' has no config\.json"):
        sources.local_folder(URL)

    def no_package(original, path):
        raise ImportError("Please install gcsfs to access Google Storage")

    with epath.testing.mock_epath(listdir=no_package), pytest.raises(ValueError, match=r"not installed: .*gcsfs.*pip install gcsfs"):
        sources.local_folder(URL)
    assert not (remote.parents[2] / "cache").exists()
