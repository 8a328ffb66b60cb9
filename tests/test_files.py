"""Reading with clear errors, and writing that never loses what was there."""

import errno
import os
import pathlib
import stat
import sys

import numpy as np
import pytest
import safetensors.numpy

from icae_jax import cache, errors, files
from icae_jax.data import tokens
from icae_jax.interop.adapters import folder as adapter
from icae_jax.interop.adapters import tensor_files


def test_file_is_replaced_only_when_whole(tmp_path):
    """Breaks when an error while writing leaves half a file, no file, or a temporary one."""
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": "œ"})
    assert files.read_json(path, "a test") == {"a": "œ"}
    assert "œ" in path.read_text(encoding="utf-8")

    def fail_half_way():
        with files.replacing_file(path) as tmp:
            tmp.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_half_way()
    assert files.read_json(path, "a test") == {"a": "œ"} and os.listdir(path.parent) == ["a.json"]
    files.write_json(path, [2])
    assert files.read_json(path, "a test", list) == [2] and os.listdir(path.parent) == ["a.json"]


def write_folder(path, text, fail=False):
    with files.replacing_folder(path) as tmp:
        (tmp / f"{text}.txt").write_text(text)
        if fail:
            raise RuntimeError("disk full")


def test_folder_is_replaced_only_when_whole(tmp_path):
    """Breaks when an error while writing loses the old folder, mixes old and new, or leaves a
    temporary one.
    """
    path = tmp_path / "adapter"
    write_folder(path, "one")
    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(path, "two", fail=True)
    assert os.listdir(path) == ["one.txt"] and os.listdir(tmp_path) == ["adapter"]
    write_folder(path, "three")
    assert os.listdir(path) == ["three.txt"] and os.listdir(tmp_path) == ["adapter"]


def test_what_takes_a_place_is_on_the_disk_before(tmp_path, monkeypatch):
    """Breaks when a power loss soon after writing leaves empty files of the right names."""
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda f: calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{f}"))) or fsync(f),
    )
    monkeypatch.setattr(os, "rename", lambda *paths: calls.append("renamed") or rename(*paths))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("renamed") or replace(*paths))
    with files.replacing_folder(tmp_path / "adapter") as tmp:
        (tmp / "encoder").mkdir()
        for name in ("a", "encoder/b"):
            (tmp / name).write_text("x")
    assert sorted(calls[:2]) == ["a", "b"] and calls[2:] == ["renamed"]
    calls.clear()
    files.write_text(tmp_path / "c", "x")
    assert calls[0].startswith(".c.") and calls[1:] == ["renamed"]


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """Breaks when both folders can be lost between moving the old one away and the new one in."""
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


def modes(folder):
    """The mode of everything in a folder, by relative path; "." is the folder."""
    return {
        str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode)
        for p in (folder, *folder.rglob("*"))
    }


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_tensors(folder):
    """Writes as adapters do: safetensors makes its files readable by their owner only."""
    with files.replacing_folder(folder) as tmp:
        (tmp / "encoder").mkdir()
        safetensors.numpy.save_file(
            {"a": np.zeros(2, np.float32)}, tmp / "encoder" / "a.safetensors"
        )
        files.write_json(tmp / "icae.json", {})


def test_new_files_follow_the_umask(tmp_path, umask):
    """Breaks when written files are readable to more, or fewer, than the umask says."""
    folder, file, memory = tmp_path / "adapter", tmp_path / "a.json", tmp_path / "m.safetensors"
    write_tensors(folder)
    files.write_json(file, {})
    with files.replacing_file(memory) as tmp:
        safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp)
    assert (
        stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(memory.stat().st_mode) == 0o666 & ~umask
    )
    wanted = {".": 0o777, "encoder": 0o777, "encoder/a.safetensors": 0o666, "icae.json": 0o666}
    assert modes(folder) == {name: mode & ~umask for name, mode in wanted.items()}


def test_a_shared_cache_of_tokens_follows_the_umask(tmp_path, umask):
    """Breaks when only the first of several users can read a shared cache, or the umask is
    exceeded.
    """
    tokens._write(tmp_path / "key", lambda tmp: np.save(tmp / "ids.npy", np.zeros(2)) or {})
    assert (
        modes(tmp_path / "key")["."] == 0o777 & ~umask
        and modes(tmp_path / "key")["ids.npy"] == 0o666 & ~umask
    )
    assert os.listdir(tmp_path) == ["key"]


def test_what_is_replaced_hands_its_mode_on(tmp_path, umask):
    """Breaks when rewriting a private file opens it to others, or a shared one is closed."""
    folder, file = tmp_path / "adapter", tmp_path / "a.json"
    for mode, within in ((0o700, 0o600), (0o2775, 0o640)):
        write_tensors(folder)
        files.write_json(file, {})
        folder.chmod(mode)
        (folder / "icae.json").chmod(within)
        (folder / "encoder").chmod(mode)
        file.chmod(within)
        write_tensors(folder)
        files.write_json(file, {"new": 1})
        assert (
            stat.S_IMODE(file.stat().st_mode) == within
            and modes(folder)["."] == mode
            and modes(folder)["icae.json"] == within
        )
        assert modes(folder)["encoder"] == mode and files.read_json(file, "a test") == {"new": 1}


def test_nobody_reads_a_private_file_while_it_is_written(tmp_path):
    """Breaks when the temporary sibling of a private file or folder is readable to others."""
    (tmp_path / "a").write_text("")
    (tmp_path / "a").chmod(0o600)
    (tmp_path / "folder").mkdir(0o700)
    with (
        files.replacing_file(tmp_path / "a") as file,
        files.replacing_folder(tmp_path / "folder") as folder,
    ):
        assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(folder.stat().st_mode)) == (
            0o600,
            0o700,
        )


def test_links_stay_links(tmp_path):
    """Breaks when a link is replaced by a file, its target keeps the old content, or a folder's
    link stays.
    """
    (tmp_path / "disk").mkdir()
    for name in ("a.json", "adapter"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for content in ("one", "two"):
        files.write_json(tmp_path / "a.json", content)
        write_folder(tmp_path / "adapter", content)
        assert files.read_json(tmp_path / "disk" / "a.json", "a test", str) == content
        assert os.listdir(tmp_path / "disk" / "adapter") == [f"{content}.txt"]
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "adapter").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "adapter", "disk"] and sorted(
        os.listdir(tmp_path / "disk")
    ) == ["a.json", "adapter"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    """Breaks when saving an adapter under a file's name removes the file."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(
        errors.UserError, match="notes is a file, and a folder is to be written there"
    ):
        write_folder(tmp_path / "notes", "one")
    assert (tmp_path / "notes").read_text() == "mine" and os.listdir(tmp_path) == ["notes"]


def failing(monkeypatch, path, *failures):
    """Makes reading that path fail in these ways, one after another, then succeed; returns those
    left.
    """
    left, opening = list(failures), pathlib.Path.read_bytes

    def read_bytes(self):
        if self == path and left:
            code = left.pop(0)
            raise OSError(code, os.strerror(code), str(self))
        return opening(self)

    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    return left


def test_a_file_that_a_network_loses_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """Breaks when a transient failure of a network filesystem ends a command or counts as bad
    input, or a forbidden file does not.
    """
    path = tmp_path / "a.json"
    path.write_text("[1]")
    left = failing(monkeypatch, path, errno.ESTALE, errno.EIO)
    assert files.read_json(path, "a test", list) == [1] and not left
    failing(monkeypatch, path, *[errno.EIO] * errors.TRIES)
    with pytest.raises(OSError) as caught:
        files.read_json(path, "a test")
    assert caught.value.errno == errno.EIO and not errors.is_users(caught.value)
    failing(monkeypatch, path, errno.EACCES)
    with pytest.raises(errors.UserError, match="cannot be read: permission denied"):
        files.read_json(path, "a test")


def test_tensors_that_a_network_loses_for_a_moment_are_read_again(tmp_path, monkeypatch):
    """Breaks when a transient failure of a network filesystem counts as a damaged file, or the
    reverse.
    """
    monkeypatch.setattr(errors, "FIRST_DELAY", 0)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, path)
    hiccups = [
        OSError(errno.ESTALE, "Stale file handle"),
        safetensors.SafetensorError("I/O error: Input/output error (os error 5)"),
    ]

    def read(path):
        if left:
            raise left.pop()
        return safetensors.numpy.load_file(path)

    left = list(hiccups)
    assert files.read_safetensors(path, read)["a"].sum() == 2 and not left
    for hiccup in hiccups:
        left = [hiccup] * errors.TRIES
        with pytest.raises(type(hiccup)) as caught:
            files.read_safetensors(path, read)
        assert not errors.is_users(caught.value) and not left
    left = [PermissionError(errno.EACCES, "Permission denied", str(path))]
    with pytest.raises(errors.UserError, match="cannot be read: permission denied"):
        files.read_safetensors(path, read)
    path.write_bytes(b"half")
    for damaged in (lambda: files.read_safetensors(path, read), lambda: adapter._tensors(path)):
        with pytest.raises(
            errors.UserError, match=r"a\.safetensors: not a readable safetensors file"
        ):
            damaged()


def test_unreadable_json_is_named(tmp_path):
    """Breaks when the error does not say which file, or what it should hold."""
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/a.json: no such file; it should hold the plan$"
    ):
        files.read_json(tmp_path / "a.json", "the plan")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json: not valid JSON"):
        files.read_json(tmp_path / "a.json", "the plan")
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read"):
        files.read_json(tmp_path, "the plan")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(
        errors.UserError, match=f"^{tmp_path}/a.json: not an object; it should hold the plan$"
    ):
        files.read_json(tmp_path / "a.json", "the plan")


def test_fields_are_of_their_types():
    """Breaks when a field of the wrong type passes, or an int is refused where a number is asked
    for.
    """
    files.check_fields(
        {"a": 1, "b": 2, "c": "x", "more": None}, {"a": int, "b": float, "c": str}, "a.json"
    )
    for raw, message in (
        ({"a": True}, "a.json: a is True, which is not a whole number"),
        ({"a": 1.0}, "a.json: a is 1.0, which is not a whole number"),
        ({}, "a.json: a missing"),
    ):
        with pytest.raises(errors.UserError, match=f"^{message}"):
            files.check_fields(raw, {"a": int}, "a.json")
    for raw in ({}, {"a\nb": None}):
        with pytest.raises(errors.UserError, match=r"^a.json: 'a\\nb' "):
            files.check_fields(raw, {"a\nb": int}, "a.json")


def test_torch_is_named_where_it_is_missing(monkeypatch):
    """Breaks when the missing package ends in a traceback."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="the export needs PyTorch: pip install torch"):
        errors.need_torch("the export")


def test_only_new_folders_are_written(tmp_path):
    """Breaks when a folder with content, or a file, counts as free, or a new one as taken."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    (tmp_path / "empty").mkdir()
    for free in ("empty", "new", "new/deeper"):
        files.check_new_folder(tmp_path / free)
    for taken in ("taken", "taken/x"):
        with pytest.raises(
            ValueError, match=r"--to .* exists and is not an empty folder; give a new one"
        ):
            files.check_new_folder(tmp_path / taken)


def test_cache_folder(monkeypatch):
    """Breaks when the configured folder does not win over $ICAE_CACHE, or that over the home
    folder.
    """
    monkeypatch.setenv("ICAE_CACHE", "/somewhere")
    assert (str(cache.folder("/mine")), str(cache.folder())) == ("/mine", "/somewhere")
    monkeypatch.delenv("ICAE_CACHE")
    assert cache.folder().parts[-2:] == (".cache", "icae_jax")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Breaks when a workdir below a file, or in a read-only folder, gives a traceback, which
    launchers would retry.
    """
    (tmp_path / "file").write_text("")
    message = r"file/x: cannot be written: .*; give a place that can be"
    for replacing in (files.replacing_file, files.replacing_folder):
        with pytest.raises(errors.UserError, match=message), replacing(tmp_path / "file" / "x"):
            pass
    assert (tmp_path / "file").read_text() == "" and len(list(tmp_path.iterdir())) == 1


PLACEHOLDERS = {
    "empty": (b"", "empty"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 268\n",
        "Git LFS pointer",
    ),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><head><title>429</title>", "page of HTML"),
    "annex": (b"/annex/objects/SHA256E-s3--4d7a.jsonl\n", "pointer of git-annex"),
    "GitHub's answer": (b"404: Not Found", "a server said"),
    "a bucket's answer": (
        b"<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>AccessDenied</Code>",
        "a server said",
    ),
    "page in capitals": (b"<HTML><BODY>Not found", "page of HTML"),
}


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_what_stands_in_a_files_place_is_named(name, tmp_path):
    """Breaks when a pointer, a server's error page or an empty file is called damaged JSON or
    tensors.
    """
    content, said = PLACEHOLDERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    readers = (
        lambda: files.read_json(path, "a configuration"),
        lambda: files.read_safetensors(path, safetensors.numpy.load_file),
        lambda: tensor_files.open_tensors(path),
    )
    for read in readers:
        with pytest.raises(errors.UserError, match=f"model.safetensors: .*{said}.*again"):
            read()


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    """Breaks when a configuration saved by an editor on Windows (with a BOM) is refused."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"r": 4}')
    assert files.read_json(path, "a test") == {"r": 4}
