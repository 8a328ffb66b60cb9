"""Checkpoints: which are kept, and that they come back bit by bit."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax import errors, files
from icae_jax.training import checkpoint, checkpoint_files
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.trained import find as find_trained
from icae_jax.workflows import inspection


def state(value, rows=3):
    """A small train state with all that Orbax must carry: float32, bfloat16, integers, empty and
    nested containers.
    """
    x = jnp.asarray(np.random.default_rng(value).standard_normal((rows, 2)), jnp.float32)
    opt_state = ((), {"mu": x.astype(jnp.bfloat16), "count": jnp.asarray(value, jnp.int32)})
    return {
        "step": jnp.asarray(value, jnp.int32),
        "trained": {"w": x * 1e-40, "b": x / 3},
        "opt_state": opt_state,
    }


def on_disk(workdir):
    return sorted(int(p.name.removeprefix("step_")) for p in (workdir / "checkpoints").iterdir())


def test_the_latest_two_and_the_best_are_kept_while_others_go(tmp_path):
    """Breaks when the best is deleted for being old, or one of the latest for being worse or not
    evaluated; when nothing is deleted; or when a resumed run forgets the best.
    """
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.best() is None
    kept = []
    for step, held_out_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        checkpoints.save(step, state(step), held_out_loss)
        checkpoints.wait()
        kept.append(on_disk(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4]]
    assert (checkpoints.latest(), checkpoints.best()) == (4, 2)
    checkpoints.close()

    again = Checkpoints(tmp_path)  # another process, later
    assert (again.latest(), again.best()) == (4, 2)
    for step in (2, 4):
        like = jax.tree.map(jnp.zeros_like, state(0))
        got, want = checkpoint.restore(tmp_path / "checkpoints" / f"step_{step}", like), state(step)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert g.dtype == w.dtype and np.asarray(g).tobytes() == np.asarray(w).tobytes()
    again.save(5, state(5))
    again.wait()
    assert on_disk(tmp_path) == [2, 4, 5] and again.best() == 2
    again.close()


def failing(checkpoints, monkeypatch, error):
    """Makes saves fail."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)


@pytest.mark.parametrize(
    "words",
    [
        "tensorstore's own words\nwriting x: No space left on device",
        'UNKNOWN: Error writing "w/0.0": No space left on device',
    ],
)
def test_a_save_that_fails_says_so(words, tmp_path, monkeypatch):
    """Breaks when a failed save ends in another kind of error than OSError, which the command line
    can report.
    """
    checkpoints = Checkpoints(tmp_path)
    failing(checkpoints, monkeypatch, ValueError(words))
    with pytest.raises(OSError, match="checkpoint of step 1 failed: No space left on device"):
        checkpoints.save(1, state(1))
    with pytest.raises(OSError, match="latest checkpoint failed: No space left on device"):
        checkpoints.wait()


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_lost_process_is_no_full_disk(kind, tmp_path, monkeypatch):
    """Breaks when the death of another process, noticed while saving, is reported as a full disk,
    after which launchers do not restart.
    """
    checkpoints = Checkpoints(tmp_path)
    failing(
        checkpoints, monkeypatch, kind("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    )
    for save in (lambda: checkpoints.save(1, state(1)), checkpoints.wait):
        with pytest.raises(kind, match=r"^UNKNOWN: Gloo"):
            save()


def test_the_trained_tree_alone_is_read_from_any_of_its_paths(tmp_path):
    """Breaks when a workdir, its checkpoints and a step do not mean the same checkpoint, the latest
    is taken for the best, or another folder for a checkpoint.
    """
    checkpoints = Checkpoints(tmp_path / "w")
    for step, held_out_loss in ((1, 1.0), (2, 3.0)):
        checkpoints.save(step, state(step), held_out_loss)
    checkpoints.wait()
    checkpoints.close()
    best, latest = (tmp_path / "w" / "checkpoints" / f"step_{step}" for step in (1, 2))
    assert [
        checkpoint_files.step_folder(path) for path in (tmp_path / "w", best.parent, best, latest)
    ] == [best, best, best, latest]
    for step, path in ((1, best), (2, latest)):
        jax.tree.map(
            np.testing.assert_array_equal,
            checkpoint_files.read_trained(path),
            jax.device_get(state(step)["trained"]),
        )
    for other in (tmp_path, tmp_path / "absent", best / "metrics"):
        assert checkpoint_files.step_folder(other) is None


def everything(folder):
    """`{path: (time of change, size)}` of all that a folder holds."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_reading_changes_nothing(tmp_path):
    """Breaks when a reader deletes the checkpoint that is being written, or writes anything."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), 2.0)
        checkpoints.save(2, state(2), 3.0)
    half = tmp_path / "checkpoints" / "step_3.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    (half / "default" / "_METADATA").write_text("{}")
    (tmp_path / "checkpoints" / "step_4" / "default").mkdir(parents=True)  # half deleted
    files.write_json(tmp_path / "config.json", {"compression.method": "icae", "base": "b"})
    before = everything(tmp_path)
    assert checkpoint_files.step_folder(tmp_path).name == "step_1"
    assert checkpoint_files.saved_steps(tmp_path) == {1: 2.0, 2: 3.0}
    assert find_trained(tmp_path).path.name == "step_1"
    assert inspection.describe(tmp_path)["what"].endswith("step_1")
    assert checkpoint_files.read_selected(tmp_path)[0].name == "step_1"
    assert everything(tmp_path) == before


def test_a_checkpoint_that_goes_while_it_is_read_is_chosen_anew(tmp_path, monkeypatch, capsys):
    """Breaks when a reader fails or reports damage because a running training deleted its old best,
    or retries a broken file for ever.
    """
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), 2.0)
        checkpoints.save(2, state(2), 3.0)
    read = checkpoint_files.read_trained

    def losing(folder):
        if folder.name == "step_1":
            shutil.rmtree(folder)
        return read(folder)

    monkeypatch.setattr(checkpoint_files, "read_trained", losing)
    folder, trained = checkpoint_files.read_selected(tmp_path)
    assert folder.name == "step_2" and capsys.readouterr().err == ""
    jax.tree.map(np.testing.assert_array_equal, trained, jax.device_get(state(2)["trained"]))

    def broken(folder):
        raise ValueError("not a checkpoint")

    monkeypatch.setattr(checkpoint_files, "read_trained", broken)
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint_files.read_selected(tmp_path)


def test_nan_is_never_the_best(tmp_path):
    """Breaks when a held-out loss of NaN evicts the best checkpoint, or one that an earlier version
    kept ranks first.
    """
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in enumerate((0.5, float("nan"), 0.7, 0.6), 1):
            checkpoints.save(step, state(step), loss)
            checkpoints.wait()
        assert on_disk(tmp_path) == [1, 3, 4] and checkpoints.best() == 1
    assert (
        checkpoint_files.best_step({1: float("nan"), 2: 0.6, 3: None}) == 2
        and checkpoint_files.best_step({1: float("nan")}) is None
    )
    (tmp_path / "checkpoints" / "step_4" / "metrics" / "metrics").write_text('{"loss": NaN}')
    assert checkpoint_files.step_folder(tmp_path).name == "step_1"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() == 1
        checkpoints.save(5, state(5), 0.9)
    assert on_disk(tmp_path) == [1, 4, 5]


def test_a_save_that_a_network_interrupts_is_made_again(tmp_path, monkeypatch):
    """Breaks when one stale file handle ends a run, or loses a save, at its start or in the
    background.
    """
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    with Checkpoints(tmp_path) as checkpoints:
        manager, failures = checkpoints._manager, iter([OSError(errno.ESTALE, "Stale file handle")])
        save, finish = manager.save, manager.wait_until_finished

        def failing_save(*args, **kwargs):
            for error in failures:
                raise error
            return save(*args, **kwargs)

        monkeypatch.setattr(manager, "save", failing_save)
        checkpoints.save(1, state(1), 1.0)
        checkpoints.wait()
        assert checkpoints.latest() == 1 and next(failures, None) is None

        checkpoints.save(2, state(2), 0.5)
        failures = iter([ValueError("UNAVAILABLE: Error writing x")])

        def failing_finish():
            for error in failures:
                finish()
                shutil.rmtree(
                    tmp_path / "checkpoints" / "step_2"
                )  # as if it had never been finished
                manager.reload()
                raise error
            return finish()

        monkeypatch.setattr(manager, "wait_until_finished", failing_finish)
        monkeypatch.setattr(manager, "save", lambda *a, **k: save(*a, **k))
        checkpoints.wait()
        assert next(failures, None) is None and checkpoints.latest() == 2
    assert on_disk(tmp_path) == [1, 2]


def test_a_disk_without_room_is_told_apart(tmp_path, monkeypatch):
    """Breaks when a full disk is no user error (exit code 2), or another failed save is one."""
    full = ValueError(
        "RESOURCE_EXHAUSTED: Error writing x: Failed to write: No space left on device "
        "[os_error_code='28']"
    )
    for error, users in ((full, True), (ValueError("DATA_LOSS: Error writing x: checksum"), False)):
        with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
            failing(checkpoints, patch, error)
            with pytest.raises(
                (OSError, RuntimeError), match="Earlier checkpoints are whole"
            ) as raised:
                checkpoints.save(1, state(1))
            assert errors.is_users(raised.value) == users and "os_error_code" not in str(
                raised.value
            )
            patch.undo()


# ------------------------------------------------------------------------------------------- damage


def large(value):
    """One whose arrays do not fit into the index."""
    return state(value, 2000)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 1, 2 and 3, the first the best; to be copied."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir) as checkpoints:
        for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
            checkpoints.save(step, large(step), loss)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "w")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def half_zero(path):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def empty(path):
    path.write_bytes(b"")


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def harm(workdir, step, pattern, how):
    """Does something to the largest of a checkpoint's files, or a folder, that a pattern finds."""
    found = sorted(
        (workdir / "checkpoints" / f"step_{step}").glob(pattern),
        key=lambda path: path.stat().st_size,
    )
    how(found[-1])


DAMAGES = [
    ("default/_METADATA", empty, "default/_METADATA is empty"),
    ("default/_METADATA", cut, "default/_METADATA is garbled"),
    ("default/_METADATA", zero, "default/_METADATA is garbled"),
    ("default/_METADATA", gone, "default/_METADATA is missing"),
    ("default", gone, "default/_METADATA is missing"),
    ("default/array_metadatas/*", cut, "garbled"),
    ("default/manifest.ocdbt", empty, "default/manifest.ocdbt is empty"),
    ("default/manifest.ocdbt", cut, "does not match actual length"),
    ("default/manifest.ocdbt", gone, "its index of arrays is missing"),
    ("default/d", gone, "NOT_FOUND"),
    ("default/d/*", empty, "is empty"),
    ("default/d/*", cut, "OUT_OF_RANGE"),
    ("default/d/*", zero, "DATA_LOSS"),
    ("default/d/*", half_zero, "Error decoding"),
    ("default/ocdbt.process_0/d/*", empty, "is empty"),
    ("default/ocdbt.process_0/d/*", cut, "OUT_OF_RANGE"),
    ("default/ocdbt.process_0/d/*", zero, ""),
    ("default/ocdbt.process_0/d/*", gone, ""),
    ("metrics/metrics", empty, "metrics/metrics is empty"),
    ("metrics/metrics", zero, "metrics/metrics is garbled"),
    (
        "metrics/metrics",
        lambda path: path.write_text('{"loss": null}'),
        "metrics/metrics holds no loss",
    ),
]


def alike(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize(
    ("pattern", "how", "why"),
    DAMAGES,
    ids=[f"{pattern}-{how.__name__}" for pattern, how, _ in DAMAGES],
)
def test_a_damaged_latest_checkpoint_is_gone_back_from(pattern, how, why, workdir, capsys):
    """Breaks when a checkpoint damaged by a power loss ends a run, is chosen again, deleted or not
    reported; or when a reader uses it, or fails.
    """
    harm(workdir, 3, pattern, how)
    for step in (1, 2):  # else readers would take a better one
        shutil.rmtree(workdir / "checkpoints" / f"step_{step}" / "metrics")
    folder, trained = checkpoint_files.read_selected(workdir)
    # Damage to the optimizer's state alone does not concern a reader.
    assert folder.name == "step_2" or (
        folder.name == "step_3" and pattern == "default/ocdbt.process_0/d/*"
    )
    assert ("step_3 is damaged" in capsys.readouterr().err) == (folder.name == "step_2")
    alike(trained, large(int(folder.name[-1]))["trained"])

    said = []
    step, restored = checkpoint.resume(workdir, jax.tree.map(jnp.zeros_like, large(0)), said.append)
    assert step == 2
    alike(restored, large(2))
    assert (
        len(said) == 2
        and f"{workdir}/checkpoints/step_3 is damaged" in said[0]
        and why in said[0]
        and "damaged_step_3" in said[0]
    )
    assert (
        said[1] == "going back from step 3 to step 2, the latest whole checkpoint: "
        "1 step to train again"
    )
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
        "damaged_step_3",
        "step_1",
        "step_2",
    ]
    assert "Traceback" not in capsys.readouterr().err
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(3, large(3), 0.5)
    assert checkpoint.resume(workdir, large(0), said.append)[0] == 3 and len(said) == 2
    assert (workdir / "checkpoints" / "damaged_step_3").is_dir()


def test_damaged_ones_before_the_latest_go_aside_too(workdir):
    """Breaks when readers or the manager later fail on a damaged best, or steps are reported lost
    that are not.
    """
    harm(workdir, 1, "metrics/metrics", cut)
    (workdir / "checkpoints" / "damaged_step_1").mkdir()
    said = []
    assert checkpoint.resume(workdir, large(0), said.append)[0] == 3
    assert len(said) == 1 and said[0].endswith("it is kept as damaged_step_1.2")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.best() == 3


def test_without_a_whole_one_each_is_named_and_nothing_is_touched(workdir):
    """Breaks when a run whose checkpoints are all damaged starts from scratch, or changes them."""
    harm(workdir, 1, "default/_METADATA", empty)
    harm(workdir, 2, "default/ocdbt.process_0/d/*", zero)
    harm(workdir, 3, "default", gone)
    before = everything(workdir)
    for read in (
        lambda: checkpoint.resume(workdir, large(0), print),
        lambda: checkpoint_files.read_selected(workdir),
    ):
        for _ in range(2):
            with pytest.raises(
                errors.UserError,
                match=r"no checkpoint there is whole \(step_1: .* is empty; step_2: .+; step_3: ",
            ) as raised:
                read()
            assert "\n" not in str(raised.value)
    assert everything(workdir) == before
    assert checkpoint.resume(workdir / "absent", large(0), print)[0] is None


@pytest.mark.parametrize(
    ("pattern", "how"),
    [("default/manifest.ocdbt", empty), ("default", gone), ("default/ocdbt.process_0/d/*", zero)],
)
def test_a_damaged_one_that_is_asked_for_is_not_replaced(pattern, how, workdir):
    """Breaks when somebody who names a checkpoint gets another one, or a traceback."""
    harm(workdir, 2, pattern, how)
    with pytest.raises(
        errors.UserError, match=r"step_2: the checkpoint is damaged \(.+\); name another"
    ):
        checkpoint_files.read_selected(workdir / "checkpoints" / "step_2")
    assert checkpoint_files.read_selected(workdir / "checkpoints")[0].name == "step_1"


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    """Breaks when a link to a missing disk is noticed only at the first save, with a traceback."""
    (tmp_path / "checkpoints").symlink_to(tmp_path / "absent" / "disk")
    with pytest.raises(
        errors.UserError,
        match=f"^--workdir {tmp_path}: no folder of checkpoints can be made: .*; put in place",
    ):
        Checkpoints(tmp_path)


FAULTS = [
    OSError(errno.EIO, "Input/output error"),
    ValueError("UNAVAILABLE: Error reading x"),
    ValueError(
        f"FAILED_PRECONDITION: Error reading x: Stale file handle [os_error_code='{errno.ESTALE}']"
    ),
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ValueError("RESOURCE_EXHAUSTED: Error reading x: Too many open files [os_error_code='24']"),
    PermissionError(errno.EACCES, "Permission denied"),
    jax.errors.JaxRuntimeError("FAILED_PRECONDITION: another process died"),
]


@pytest.mark.parametrize(
    "fault", FAULTS, ids=[f"{type(fault).__name__}-{i}" for i, fault in enumerate(FAULTS)]
)
def test_what_is_no_damage_is_not_taken_for_it(fault, workdir, monkeypatch):
    """Breaks when a network, a memory or a closed file costs a run its latest steps."""
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    tried = []

    def failing(*_, **__):
        tried.append(1)
        try:
            raise fault
        except Exception as error:  # as Orbax wraps them
            raise Exception("Encountered error while reading array index") from error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", failing)
        with pytest.raises(Exception, match="Encountered error") as raised:
            checkpoint.resume(workdir, large(0), print)
    assert not errors.is_users(raised.value) and len(tried) == (
        errors.TRIES if errors.transient(fault) else 1
    )
    assert checkpoint.resume(workdir, large(0), print)[0] == 3
