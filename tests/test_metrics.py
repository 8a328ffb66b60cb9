"""Metrics files that survive restarts and kills."""

import json

from icae_jax.training import metrics


def steps(path):
    return [line["step"] for line in metrics.read(path)]


def written(workdir, resume_step, *numbers):
    file = metrics.MetricsFile(workdir, resume_step)
    for n in numbers:
        file.write({"step": n, "loss": n / 2})
    return file.path


def test_lines_past_the_resumed_step_are_dropped(tmp_path):
    """Breaks when steps done twice appear twice, or a resumed run loses the step that it resumed from."""
    path = written(tmp_path, -1, 0, 5, 10, 15)
    assert steps(path) == [0, 5, 10, 15]
    assert steps(written(tmp_path, 10, 12)) == [0, 5, 10, 12]
    assert steps(written(tmp_path, -1, 0)) == [0], "from scratch: nothing of an earlier run stays"


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    """Breaks when a broken last line stops the run, or the next line is glued to it."""
    path = written(tmp_path, -1, 1, 2)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert steps(path) == [1, 2]
    assert steps(written(tmp_path, 3, 4)) == [1, 2, 4]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 1.0, 2.0]


def test_means_leave_out_objectives_without_labels():
    """Breaks when a batch without LM targets reports a loss of nan or 0."""
    assert metrics.means({"ae": 6.0, "lm": 0.0}, {"ae": 4.0, "lm": 0.0}) == {"ae": 1.5}
