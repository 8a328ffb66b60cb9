"""Reading with clear errors, and writing that never loses what was there."""

import os
import sys

import pytest

from icae_jax.interop import files


def test_file_is_replaced_only_when_whole(tmp_path):
    """Breaks when an error while writing leaves half a file, no file, or a temporary one."""
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": "œ"})
    assert files.read_json(path, "a test") == {"a": "œ"} and "œ" in path.read_text(encoding="utf-8")

    def fail_half_way():
        with files.replacing_file(path) as tmp:
            tmp.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_half_way()
    assert files.read_json(path, "a test") == {"a": "œ"} and os.listdir(path.parent) == ["a.json"]
    files.write_json(path, [2])
    assert files.read_json(path, "a test") == [2] and os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644, "others may read it, unlike a temporary file"


def write_folder(path, text, fail=False):
    with files.replacing_folder(path) as tmp:
        (tmp / f"{text}.txt").write_text(text)
        if fail:
            raise RuntimeError("disk full")


def test_folder_is_replaced_only_when_whole(tmp_path):
    """Breaks when an error while writing loses the old folder, mixes old and new, or leaves a temporary one."""
    path = tmp_path / "adapter"
    write_folder(path, "one")
    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(path, "two", fail=True)
    assert os.listdir(path) == ["one.txt"] and os.listdir(tmp_path) == ["adapter"]
    write_folder(path, "three")
    assert os.listdir(path) == ["three.txt"] and os.listdir(tmp_path) == ["adapter"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """Breaks when the moment between moving the old folder away and the new one in can lose both."""
    path = tmp_path / "adapter"
    write_folder(path, "one")
    rename = os.rename

    def no_new_one(source, target):
        if target == path and not str(source).endswith(".old"):
            raise OSError("cannot move")
        rename(source, target)

    monkeypatch.setattr(os, "rename", no_new_one)
    with pytest.raises(OSError, match="cannot move"):
        write_folder(path, "two")
    assert os.listdir(path) == ["one.txt"] and os.listdir(tmp_path) == ["adapter"]


def test_unreadable_json_is_named(tmp_path):
    """Breaks when the error does not say which file, or what it should hold."""
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json: no such file; it should hold the plan$"):
        files.read_json(tmp_path / "a.json", "the plan")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json: not valid JSON"):
        files.read_json(tmp_path / "a.json", "the plan")
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read"):
        files.read_json(tmp_path, "the plan")


def test_torch_is_named_where_it_is_missing(monkeypatch):
    """Breaks when the missing package ends in a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="the export needs PyTorch: pip install torch"):
        files.need_torch("the export")


def test_only_new_folders_are_written(tmp_path):
    """Breaks when a folder with something in it, or a file, is taken for free, or a new one for taken."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    (tmp_path / "empty").mkdir()
    for free in ("empty", "new", "new/deeper"):
        files.check_new_folder(tmp_path / free)
    for taken in ("taken", "taken/x"):
        with pytest.raises(ValueError, match=r"--to .* exists and is not an empty folder; give a new one"):
            files.check_new_folder(tmp_path / taken)


def test_cache_folder(monkeypatch):
    """Breaks when the configured folder does not win over $ICAE_CACHE, or that over the home folder."""
    monkeypatch.setenv("ICAE_CACHE", "/somewhere")
    assert (str(files.cache_folder("/mine")), str(files.cache_folder())) == ("/mine", "/somewhere")
    monkeypatch.delenv("ICAE_CACHE")
    assert files.cache_folder().parts[-2:] == (".cache", "icae_jax")
