"""What is reported of a sweep: states, losses, axis, figure and page, from metrics of training."""

import json

import pytest

from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.workflows import sweep_points, sweep_results

RAW = {
    "base": "base",
    "steps": 4,
    "objectives": {"ae": 0.5, "lm": 0.5},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
}


def losses(value, k=""):
    return {
        f"memory{k}": {"ae": value, "lm": value + 1},
        f"wrong_memory{k}": {"ae": value + 2, "lm": value + 3},
    }


@pytest.fixture
def made(tmp_path):
    """Makes the results of points, each (changes, held-out losses or None, whether it is done)."""

    def make(*points, codes=()):
        listed = []
        for number, (changes, held_out, done) in enumerate(points):
            raw = {k: dict(v) if isinstance(v, dict) else v for k, v in RAW.items()}
            for field, value in changes.items():
                group, _, name = field.partition(".")
                raw.setdefault(group, {})[name] = value
            folder = tmp_path / f"p{number}"
            if held_out:
                folder.mkdir(parents=True)
                first = {kind: {o: x + 5 for o, x in of.items()} for kind, of in held_out.items()}
                lines = [
                    {"step": 0, "eval": first, "eval_loss": first["memory"]["ae"]},
                    {"step": 2, "train": {"ae": 9.0, "lm": 9.0}, "tokens_per_second": 1.0},
                    {"step": 3, "eval": held_out, "eval_loss": held_out["memory"]["ae"] - 0.25},
                    {"step": 3, "train": {"ae": 8.0, "lm": 8.0}, "tokens_per_second": 50.0},
                    {"step": 4, "train": {"ae": 7.0, "lm": 6.0}, "tokens_per_second": 70.0},
                    {"step": 4, "eval": held_out, "eval_loss": held_out["memory"]["ae"]},
                ]
                (folder / "metrics.jsonl").write_text(
                    "".join(json.dumps(line) + "\n" for line in lines)
                )
                if done:
                    (folder / "DONE").write_text("4\n")
            listed.append(sweep_points.Point(folder, changes, from_dict(TrainConfig, raw), []))
        identity = {"config": "a.py", "sweep": "s", "overrides": {"seed": "<1>"}}
        return sweep_results.collect(identity, listed, dict(codes))

    return make


def ranks(*values):
    return [({"lora.rank": r}, losses(r / 4), True) for r in values]


def test_what_a_point_came_to(made, tmp_path):
    """Breaks when a state, the last or best loss, or the speed without compilation is wrong."""
    points = [
        *ranks(2, 4),
        ({"lora.rank": 8}, losses(2.0), False),
        ({"lora.rank": 16}, None, False),
    ]
    results = made(*points, codes={"p2": -9})
    assert [(p["state"], p["exit_code"], p["steps"]) for p in results["points"]] == [
        ("done", 0, 4),
        ("done", 0, 4),
        ("failed", -9, 4),
        ("not started", None, 0),
    ]
    first = results["points"][0]
    assert (
        first["held_out"] == losses(0.5)
        and first["train"] == {"ae": 7.0, "lm": 6.0}
        and first["tokens_per_second"] == 60.0
    )
    assert first["best"] == {"eval_loss": 0.25, "step": 3} and first["eval_loss"] == 0.5
    header, rows = sweep_results.table(results)
    assert header[3:9] == [
        "AE, train",
        "LM, train",
        "AE, memory",
        "LM, memory",
        "AE, wrong memory",
        "LM, wrong memory",
    ]
    assert rows[0] == [
        "p0",
        "done",
        4,
        "7.0000",
        "6.0000",
        "0.5000",
        "1.5000",
        "2.5000",
        "3.5000",
        "0.5000",
        "0.2500 (3)",
        "60",
    ]
    assert rows[3] == ["p3", "not started", 0, *["–"] * 9]
    (tmp_path / "p2" / sweep_points.DIVERGED_NOTE).write_text("")
    point = sweep_points.Point(tmp_path / "p2", {}, from_dict(TrainConfig, RAW), [])
    assert (
        sweep_results.point_outcome(point, None, [])["state"] == "diverged"
        and sweep_results.point_outcome(point, None, [])["exit_code"] == 3
    )


def test_a_loss_that_is_no_number_is_never_the_best(made, tmp_path):
    """Breaks when a NaN loss, with which no comparison holds, hides the best one."""
    made(*ranks(2))
    lines = [
        {"step": step, "eval": {}, "eval_loss": loss}
        for step, loss in enumerate((float("nan"), 2.0, 1.0, float("inf")))
    ]
    for count, best in ((4, {"eval_loss": 1.0, "step": 2}), (1, None)):
        (tmp_path / "p0" / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines[:count])
        )
        point = sweep_points.Point(tmp_path / "p0", {}, from_dict(TrainConfig, RAW), [])
        assert sweep_results.point_outcome(point, None, [])["best"] == best


def test_numeric_axis(made):
    """Breaks when points are joined out of order, a loss is left out, or the axis is not linear."""
    left, right = sweep_results.figure(made(*ranks(8, 2, 4))).axes
    assert (
        left.get_xlabel() == "lora.rank"
        and left.get_xscale() == "linear"
        and list(left.get_xticks()) == [8, 2, 4]
    )
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert drawn["AE, memory"] == [[2, 0.5], [4, 1.0], [8, 2.0]] and drawn["LM, wrong memory"] == [
        [2, 3.5],
        [4, 4.0],
        [8, 5.0],
    ]
    assert len(drawn) == 4
    curves = {line.get_label(): line.get_xydata().tolist() for line in right.get_lines()}
    assert curves["p1"] == [[0, 5.5], [3, 0.25], [4, 0.5]] and len(curves) == 3
    assert right.get_yscale() == "log"


def test_wide_axis_several_k_and_missing_losses(made):
    """Breaks when a wide range has no log axis, or a point without losses stops the figure."""
    rates = [
        ({"optimizer.learning_rate": r}, losses(1.0) | losses(2.0, "_k2"), True)
        for r in (1e-4, 1e-3)
    ]
    alone = (
        {"optimizer.learning_rate": 2e-4},
        {"memory": {"ae": 1.0}, "wrong_memory": {"ae": 2.0}},
        True,
    )
    left, _ = sweep_results.figure(
        made(*rates, alone, ({"optimizer.learning_rate": 3e-4}, None, False))
    ).axes
    assert left.get_xscale() == "log"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines()}
    assert [x for x, _ in drawn["AE, memory"]] == [1e-4, 2e-4, 1e-3] and [
        x for x, _ in drawn["AE k 2, memory"]
    ] == [1e-4, 1e-3]


def test_names_and_grids_are_categories(made):
    """Breaks when names, or values that points share, are drawn on a numeric axis."""
    methods = [({"compression.method": m}, losses(1.0), True) for m in ("icae", "x500")]
    left, _ = sweep_results.figure(made(*methods)).axes
    assert [t.get_text() for t in left.get_xticklabels()] == [
        "icae",
        "x500",
    ] and left.get_xlabel() == "compression.method"
    assert {line.get_linestyle() for line in left.get_lines()} == {"None"}


def test_values_stand_in_the_figure_as_they_are(made, tmp_path):
    """Breaks when a value such as a file's name is typeset as a formula, or fails as one."""
    results = made(
        *(({"data.eval": name}, losses(1.0), True) for name in ("5$_a_$6.jsonl", "$\\undefined$"))
    )
    sweep_results.write(tmp_path, results)
    left, _ = (figure := sweep_results.figure(results)).axes
    figure.draw_without_rendering()
    assert [t.get_text().replace(r"\$", "$") for t in left.get_xticklabels()] == [
        "5$_a_$6.jsonl",
        "$\\undefined$",
    ]


def test_grid(made):
    grid = [
        ({"lora.rank": r, "lora.scale": s}, losses(1.0), True) for r in (2, 4) for s in (1.0, 2.0)
    ]
    left, _ = sweep_results.figure(made(*grid)).axes
    assert [t.get_text() for t in left.get_xticklabels()] == [
        "p0",
        "p1",
        "p2",
        "p3",
    ] and left.get_xlabel() == "lora.rank, lora.scale"


def test_files(made, tmp_path):
    """Breaks when the page is not self-contained or unescaped, or says weights differ if not."""
    results = made(*ranks(2, 4))
    sweep_results.write(tmp_path, results)
    text = sweep_results.text(tmp_path, results)
    page = (tmp_path / "report.html").read_text()
    assert (
        'src="data:image/png;base64,iVBOR' in page
        and "--config.seed=&lt;1&gt;" in page
        and "0.2500 (3)" in page
    )
    assert "weigh their objectives differently" not in text and "sweep.png" in text
    assert json.loads((tmp_path / "results.json").read_text())["points"][1]["at"] == {
        "lora.rank": 4
    }


def test_weights_that_differ_are_said(made, tmp_path):
    points = [({"objectives.ae": w, "objectives.lm": 1 - w}, losses(w), True) for w in (0.25, 0.5)]
    text = sweep_results.text(tmp_path, made(*points))
    assert "weigh their objectives differently" in text


def test_without_held_out_losses_there_is_no_figure(made, tmp_path):
    results = made(({"lora.rank": 2}, None, False))
    sweep_results.write(tmp_path, results)
    text = sweep_results.text(tmp_path, results)
    assert (
        not (tmp_path / "sweep.png").exists()
        and "sweep.png" not in text
        and (tmp_path / "report.html").exists()
    )
    assert len(json.loads((tmp_path / "results.json").read_text())["points"]) == 1
