"""Checkpoints: which are kept, and that they come back bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax.training import checkpoint
from icae_jax.training.checkpoint import Checkpoints


def state(value):
    """A small train state with all that Orbax must carry: float32, bfloat16, integers, empty and nested containers."""
    x = jnp.asarray(np.random.default_rng(value).standard_normal((3, 2)), jnp.float32)
    opt_state = ((), {"mu": x.astype(jnp.bfloat16), "count": jnp.asarray(value, jnp.int32)})
    return {"step": jnp.asarray(value, jnp.int32), "trained": {"w": x * 1e-40, "b": x / 3}, "opt_state": opt_state}


def on_disk(workdir):
    return sorted(int(p.name.removeprefix("step_")) for p in (workdir / "checkpoints").iterdir())


def test_latest_and_best_are_kept_while_others_go(tmp_path):
    """Breaks when the best is deleted for being old, the latest for being worse or unscored, nothing is ever deleted, or a
    resumed run has forgotten which was the best.
    """
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.best() is None
    kept = []
    for step, held_out_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        checkpoints.save(step, state(step), held_out_loss)
        checkpoints.wait()
        kept.append(on_disk(tmp_path))
    assert kept == [[1], [2], [2, 3], [2, 4]]
    assert (checkpoints.latest(), checkpoints.best()) == (4, 2)
    checkpoints.close()

    again = Checkpoints(tmp_path)  # another process, later
    assert (again.latest(), again.best()) == (4, 2)
    for step in (2, 4):
        like = jax.tree.map(jnp.zeros_like, state(0))
        got, want = again.restore(step, like), state(step)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert g.dtype == w.dtype and np.asarray(g).tobytes() == np.asarray(w).tobytes()
    again.save(5, state(5))
    again.wait()
    assert on_disk(tmp_path) == [2, 5] and again.best() == 2
    again.close()


def failing(checkpoints, monkeypatch, error):
    """Makes saves fail."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)


@pytest.mark.parametrize(
    "words", ["tensorstore's own words\nwriting x: No space left on device", 'UNKNOWN: Error writing "w/0.0": No space left on device']
)
def test_a_save_that_fails_says_so(words, tmp_path, monkeypatch):
    """Breaks when a failed save ends in another kind of error than OSError, which the command line can report."""
    checkpoints = Checkpoints(tmp_path)
    failing(checkpoints, monkeypatch, ValueError(words))
    with pytest.raises(OSError, match="checkpoint of step 1 failed: No space left on device"):
        checkpoints.save(1, state(1))
    with pytest.raises(OSError, match="latest checkpoint failed: No space left on device"):
        checkpoints.wait()


@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_a_lost_process_is_no_full_disk(kind, tmp_path, monkeypatch):
    """Breaks when the death of another process, noticed while saving, is told as a full disk, after which launchers do not start again."""
    checkpoints = Checkpoints(tmp_path)
    failing(checkpoints, monkeypatch, kind("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    for save in (lambda: checkpoints.save(1, state(1)), checkpoints.wait):
        with pytest.raises(kind, match=r"^UNKNOWN: Gloo"):
            save()


def test_the_trained_tree_alone_is_read_from_any_of_its_paths(tmp_path):
    """Breaks when a workdir, its checkpoints or a step do not mean the same, the latest passes for the best, or another folder for one."""
    checkpoints = Checkpoints(tmp_path / "w")
    for step, held_out_loss in ((1, 1.0), (2, 3.0)):
        checkpoints.save(step, state(step), held_out_loss)
    checkpoints.wait()
    checkpoints.close()
    best, latest = (tmp_path / "w" / "checkpoints" / f"step_{step}" for step in (1, 2))
    assert [checkpoint.step_folder(path) for path in (tmp_path / "w", best.parent, best, latest)] == [best, best, best, latest]
    for step, path in ((1, best), (2, latest)):
        jax.tree.map(np.testing.assert_array_equal, checkpoint.read_trained(path), jax.device_get(state(step)["trained"]))
    for other in (tmp_path, tmp_path / "absent", best / "metrics"):
        assert checkpoint.step_folder(other) is None
