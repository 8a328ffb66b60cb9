"""The cache's limit: what is removed first, what never, and `icae cache`."""

import errno
import json
import os
import pathlib
import platform
import tempfile
import time

import pytest
from conftest import write_jsonl
from jax._src.lru_cache import LRUCache

from icae_jax import cache
from icae_jax.cli import main as cli
from icae_jax.data import tokens
from icae_jax.errors import UserError
from icae_jax.runtime import compiled

HOUR = 3600


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def key(name):
    """A name of the form of token folders; `left` maps it back."""
    return name if name.startswith(".") else name.encode().hex().rjust(32, "0")


def put(root, name, age, size=1000, version=tokens.CACHE_VERSION):
    """Makes a token folder of this size, last used this many seconds ago."""
    folder = root / "tokens" / key(name)
    folder.mkdir(parents=True)
    (folder / "ids.npy").write_bytes(b"x" * size)
    about = (
        {}
        if version == 1
        else {cache.ABOUT: json.dumps({"version": version, "source": f"{name}.jsonl"})}
    )
    for file, content in about.items():
        (folder / file).write_text(content)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - age,) * 2)
    return folder


def program(root, name, age, size=1000):
    """A compiled program as JAX keeps it."""
    folder = root / "compiled" / "x86_64-0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-cache").write_bytes(b"x" * size)
    (folder / f"{name}-atime").write_bytes(int((time.time() - age) * 1e9).to_bytes(8, "little"))
    return folder / f"{name}-cache"


def left(root):
    names = [p.name for p in [*root.glob("tokens/*"), *root.glob("compiled/*/*-cache")]]
    return sorted(
        bytes.fromhex(name).lstrip(b"\0").decode() if name.startswith("0000") else name
        for name in names
    )


def test_what_was_used_least_recently_goes_first(root):
    """Breaks when the limit is not kept, more is removed than needed, or a more recent entry goes
    first.
    """
    for age, name in enumerate("edcba", 2):
        (put if age % 2 else program)(root, name, age * HOUR)
    assert cache.prune(root, 10_000, tokens.CACHE_VERSION) == []
    removed = cache.prune(root, 3300, tokens.CACHE_VERSION)
    assert [e.used for e in removed] == sorted(e.used for e in removed) and left(root) == [
        "c-cache",
        "d",
        "e-cache",
    ]
    assert not list(root.glob("compiled/*/a-*")), "nothing of a program stays"


def test_earlier_versions_go_first(root):
    """Breaks when outdated entries displace those in use."""
    put(root, "new", 90 * HOUR)
    put(root, "old", 2 * HOUR, version=1)
    assert [e.outdated for e in cache.prune(root, 1500, tokens.CACHE_VERSION)] == [True] and left(
        root
    ) == ["new"]


def test_what_is_in_use_stays(root):
    """Breaks when a running job's arrays are deleted, even by --all; or what was used just now is,
    except by --all.
    """
    used, _, _ = put(root, "used", 90 * HOUR), put(root, "now", 10), put(root, "idle", 90 * HOUR)
    os.chmod(used, 0o755)
    held = cache.hold(used)
    os.utime(used / cache.ABOUT, (0, 0))  # only the lock tells
    assert [e.name for e in cache.prune(root, 0, tokens.CACHE_VERSION)] == ["idle.jsonl"] and left(
        root
    ) == ["now", "used"]
    assert len(cache.prune(root, 0, tokens.CACHE_VERSION, everything=True)) == 1 and left(root) == [
        "used"
    ]
    held.close()
    assert len(cache.prune(root, 0, tokens.CACHE_VERSION)) == 1 and left(root) == []
    assert cache.hold(used) is None


def test_the_remains_of_killed_processes_go(root):
    """Breaks when an unfinished folder stays for ever, or one that is being written is removed."""
    for name, age in ((".new.dead", 48 * HOUR), (".gone.dead", 48 * HOUR), (".new.live", 60)):
        put(root, name, age)
    cache.prune(root, 10_000, tokens.CACHE_VERSION)
    assert sorted(p.name for p in (root / "tokens").iterdir()) == [".new.live"]


def test_what_is_not_the_caches_stays(root, monkeypatch, capsys):
    """Breaks when a user's own files in the cache folder are listed or removed, or one of them
    breaks the list.
    """
    put(root, "ours", 90 * HOUR), put(root, "odd", 90 * HOUR)
    (root / "tokens" / key("odd") / cache.ABOUT).write_text("[1]")
    names = (
        "tokens/corpus/shard0.bin",
        "tokens/thesis.txt",
        "tokens/.git/HEAD",
        "hashes/notes.md",
        f"tokens/{'f' * 32}",
    )
    theirs = [root / name for name in names]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 5000)
        for one in (path, path.parent):
            os.utime(one, (0, 0))
    monkeypatch.setenv("ICAE_CACHE", str(root))
    assert cli.main(["cache", "list"]) == 0
    told = capsys.readouterr().out
    assert "ours.jsonl" in told and not any(
        word in told for word in ("corpus", "thesis", "git", "hashes", "fff")
    )
    assert cli.main(["cache", "prune", "--all"]) == 0 and "2 removed" in capsys.readouterr().out
    assert all(path.exists() for path in theirs) and not (root / "tokens" / key("ours")).exists()
    monkeypatch.setenv("ICAE_CACHE", str(theirs[0]))
    assert (
        cli.main(["cache", "list"]) == 2 and "shard0.bin: no such folder" in capsys.readouterr().err
    )


def test_tokenising_keeps_the_bound(root, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    """Breaks when the cache is not pruned after a write, that is not said, or the new entry, which
    is in use, goes.
    """
    monkeypatch.setenv(cache.VARIABLE, "0")
    put(root, "old", 90 * HOUR)
    data = tokens.tokenise(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}]), tiny_tokenizer, str(root)
    )
    assert (
        left(root) == [data.key[:32]]
        and data.text(0).size == 2
        and "1 unused for longest removed" in capsys.readouterr().err
    )
    assert cache.prune(root, 0, tokens.CACHE_VERSION, everything=True) == [], "it is in use"
    os.utime(root / "tokens" / data.key[:32] / cache.ABOUT, (0, 0))
    again = tokens.tokenise(str(tmp_path / "a.jsonl"), tiny_tokenizer, str(root))
    assert time.time() - (root / "tokens" / again.key[:32] / cache.ABOUT).stat().st_mtime < 60, (
        "its use is noted"
    )


def test_jax_bounds_its_programs(root, monkeypatch):
    """Breaks when JAX keeps programs without a limit, or cannot evict those kept before there was
    one.
    """
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "")  # so that it is restored
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    monkeypatch.setenv(cache.VARIABLE, str(4 * 2500 / (1 << 30)))
    folder = program(root, "older", 0).parent
    for name, age in (("older", 9 * HOUR), ("newer", 2 * HOUR)):
        program(root, name, age)
        (folder / f"{name}-atime").unlink()
        os.utime(folder / f"{name}-cache", (time.time() - age,) * 2)
    cache.bound_compiled(folder)
    most = int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"])
    assert 2490 < most <= 2500
    LRUCache(str(folder), max_size=most).put("new", b"x" * 1000)
    assert left(root) == ["new-cache", "newer-cache"]


def test_a_cache_that_is_no_folder_or_closed_is_named(root, monkeypatch):
    """Breaks when an unusable cache gives a traceback that does not say what to set, or an empty
    one is refused.
    """
    assert cache.hold(root / "tokens" / "key") is None
    root.write_text("")
    with pytest.raises(
        UserError,
        match=rf"^cache {root}/tokens: cannot be read: not a directory .*; "
        r"set data.cache_dir or \$ICAE_CACHE",
    ):
        cache.hold(root / "tokens" / "key")

    def closed(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(UserError, match=r"cannot be read: permission denied"):
        cache.hold(root.parent / "tokens" / "key")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """This test's own temporary directory, and no memory of which folders can be written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for known in (cache.can_write, cache._temporary_folder):
        known.cache_clear()
    yield tmp_path / "temporary" / f"icae_jax-{os.getuid()}"
    cache._temporary_folder.cache_clear()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ICAE_CACHE": "/proc/nope"}, "cache /proc/nope: cannot be written"),
        ({"ICAE_CACHE": "{file}"}, "cache {file}: cannot be written"),
        ({"ICAE_CACHE": "{file}/within"}, "cache {file}/within: cannot be written"),
        (
            {"ICAE_CACHE": "", "HOME": "/proc/nope"},
            "cache /proc/nope/.cache/icae_jax: cannot be written",
        ),
        ({"ICAE_CACHE": "", "HOME": ""}, "cache: there is no home folder"),
        ({"ICAE_CACHE": "", "HOME": "relative"}, "cache: there is no home folder"),
    ],
)
def test_a_cache_that_cannot_be_written_falls_back(
    environment, said, elsewhere, tmp_path, tiny_tokenizer, monkeypatch, capsys
):
    """Breaks when a container's or a node's missing home ends the run, or the fallback is not said,
    or said repeatedly.
    """
    (tmp_path / "file").touch()
    fill = lambda text: text.format(file=tmp_path / "file")  # noqa: E731
    for name, value in environment.items():
        monkeypatch.setenv(name, fill(value))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the cat"}])
    data = [tokens.tokenise(source, tiny_tokenizer) for _ in range(2)]
    assert left(elsewhere) == [data[0].key[:32]] and elsewhere.stat().st_mode & 0o777 == 0o700
    err = capsys.readouterr().err
    assert (
        err.startswith(fill(said))
        and f"{elsewhere} is used instead" in err
        and "$ICAE_CACHE" in err
        and err.count("\n") == 1
    )
    if environment["ICAE_CACHE"] != "{file}":
        assert cli.main(["cache", "list"]) == 0 and f"{elsewhere}: " in capsys.readouterr().out, (
            "what is listed is what is used"
        )


@pytest.mark.parametrize("planted", ["link", "file", "open"])
def test_another_users_folder_is_not_taken_for_the_fallback(
    planted, elsewhere, tmp_path, monkeypatch
):
    """Breaks when someone who plants a link or a folder in the shared temporary directory can read
    or supply cache content.
    """
    monkeypatch.setenv("ICAE_CACHE", "/proc/nope")
    (tmp_path / "theirs").mkdir()
    if planted == "link":
        elsewhere.symlink_to(tmp_path / "theirs")
    elif planted == "file":
        elsewhere.touch()
    else:
        elsewhere.mkdir()
        elsewhere.chmod(0o777)
    folder = cache.folder()
    assert (
        folder.parent == elsewhere.parent
        and folder != elsewhere
        and folder.stat().st_mode & 0o777 == 0o700
    )
    assert list((tmp_path / "theirs").iterdir()) == []


def test_without_any_folder_the_variables_are_named(elsewhere, monkeypatch):
    """Breaks when a machine without a writable folder gives a traceback."""
    monkeypatch.setenv("ICAE_CACHE", "/proc/nope")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nope")
    with pytest.raises(
        UserError,
        match=r"^cache /proc/nope: cannot be written, nor can a temporary folder .*"
        r"set \$ICAE_CACHE .*\$TMPDIR",
    ):
        cache.folder()


def test_a_cache_that_may_only_be_read_is_read(
    root, elsewhere, tmp_path, tiny_tokenizer, monkeypatch, capsys
):
    """Breaks when a read-only shared cache is not used, or ends the run over what it lacks."""
    monkeypatch.setenv("ICAE_CACHE", str(root))
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"the {name}"}])
        for name in ("cat", "dog")
    ]
    kept = tokens.tokenise(sources[0], tiny_tokenizer).key
    monkeypatch.setattr(cache, "can_write", lambda folder: not folder.is_relative_to(root))
    monkeypatch.setattr(tokens, "_write", lambda *args: pytest.fail("made again"))
    assert (
        tokens.tokenise(sources[0], tiny_tokenizer).key == kept
        and not elsewhere.exists()
        and capsys.readouterr().err == ""
    )
    monkeypatch.undo()
    monkeypatch.setenv("ICAE_CACHE", str(root))
    monkeypatch.setattr(cache, "can_write", lambda folder: not folder.is_relative_to(root))
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere.parent))
    new = tokens.tokenise(sources[1], tiny_tokenizer).key
    assert left(elsewhere) == [new[:32]] and left(root) == [kept[:32]]


def test_programs_are_kept_only_where_they_can_be(root, elsewhere, monkeypatch, capsys):
    """Breaks when JAX is given a folder that cannot be written: it warns of every program, or the
    command fails.
    """
    names = (
        "JAX_COMPILATION_CACHE_MAX_SIZE",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    )
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("ICAE_CACHE", str(root))
    compiled.keep_compiled()
    assert os.environ.pop("JAX_COMPILATION_CACHE_DIR").startswith(str(root / "compiled"))
    cache.bound_compiled(root / "compiled")
    with monkeypatch.context() as closed:  # as on a read-only disk
        closed.setattr(cache, "can_write", lambda folder: folder.is_relative_to(elsewhere))
        compiled.keep_compiled()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(elsewhere / "compiled"))
        closed.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/nope")  # the user's own
        compiled.keep_compiled()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(elsewhere / "compiled"))
        assert "$JAX_COMPILATION_CACHE_DIR /proc/nope: cannot be written" in capsys.readouterr().err
        root.mkdir(exist_ok=True)
        closed.setenv("JAX_COMPILATION_CACHE_DIR", str(root))  # the user's own, to be read
        compiled.keep_compiled()
        assert (
            os.environ["JAX_COMPILATION_CACHE_DIR"] == str(root)
            and float(os.environ[names[2]]) > 1e6
        )
        closed.setattr(tempfile, "tempdir", "/proc/nope")  # nowhere at all
        cache._temporary_folder.cache_clear()
        os.environ.pop("JAX_COMPILATION_CACHE_DIR")
        compiled.keep_compiled()
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_a_bad_bound_is_named(value, monkeypatch):
    """Breaks when a value that is not a number counts as a limit, or as none."""
    monkeypatch.setenv(cache.VARIABLE, value)
    with pytest.raises(UserError, match=f"^ICAE_CACHE_GIB is '{value}'"):
        cache.limit()


def test_the_verb(root, monkeypatch, capsys):
    """Breaks when the list omits a kind, its size or use, or prune does not do what it says."""
    monkeypatch.setenv("ICAE_CACHE", str(root))
    (
        put(root, "a", 9 * HOUR),
        put(root, "old", 3 * HOUR, version=1),
        program(root, "p", 5 * HOUR),
        program(root, "q", 4 * HOUR),
    )
    (root / "bases" / "gs%3A").mkdir(parents=True)
    (root / "bases" / "gs%3A" / "model").write_bytes(b"x" * 5000)
    held = cache.hold(root / "tokens" / key("a"))
    assert cli.main(["cache", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["what"], r["name"], r["count"], r["in_use"], r["outdated"]) for r in rows] == [
        ("tokens", "a.jsonl", 1, True, False),
        ("tokens", key("old"), 1, False, True),
        ("compiled", "x86_64-0", 2, False, False),
        ("bases", "gs%3A", 1, False, False),
    ]
    assert rows[2]["bytes"] == 2000 and rows[0]["used"][:3] == "202"
    assert cli.main(["cache", "list"]) == 0 and "a.jsonl (in use)" in capsys.readouterr().out
    assert (
        cli.main(["cache", "prune"]) == 0 and "freed 0.0 MiB (0 removed)" in capsys.readouterr().out
    )
    assert cli.main(["cache", "prune", "--max_gib", str(2200 / (1 << 30)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 2 and left(root) == ["a", "q-cache"]
    assert (
        cli.main(["cache", "prune", "--all"]) == 0
        and "in use or used just now" in capsys.readouterr().out
    )
    assert left(root) == ["a"] and (root / "bases" / "gs%3A" / "model").exists()
    held.close()
    assert cli.main(["cache", "prune", "--all"]) == 0 and left(root) == []
    assert (
        cli.main(["cache", "prune", "--max_gib", "x"]) == 2
        and "--max_gib is 'x'" in capsys.readouterr().err
    )
    assert (
        cli.main(["cache", "list", "--cache_dir", str(root / "no")]) == 2
        and "no such folder" in capsys.readouterr().err
    )


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    """Breaks when a user's own folder, or choice to keep nothing, is overruled, or machines with
    other CPUs share programs.
    """
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "")  # so that it is restored
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    compiled.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(5 << 30)
    kept = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert kept.parent == tmp_path / "compiled" and kept.name.startswith(platform.machine())
    monkeypatch.setattr(compiled.platform, "machine", lambda: "another")
    for own in ("", "/elsewhere"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", own)
        compiled.keep_compiled()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == own
