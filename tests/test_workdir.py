"""What a workdir records: which changes may continue it, and what counts as trained."""

import dataclasses
import json
import re

import pytest

from icae_jax.errors import UserError
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.workdir import check_workdir, nothing_trained, steps_done

RAW = {"base": "base", "data": {"train": "a.jsonl", "context_lengths": [16, 32]}, "steps": 100}
CONFIG = from_dict(TrainConfig, RAW)
IDENTITY = {"base": "b1", "data.train": "d1"}


def changed(**fields):
    """CONFIG with changes; `optimizer__clip` means optimizer.clip."""
    config = CONFIG
    for name, value in fields.items():
        outer, _, inner = name.partition("__")
        config = dataclasses.replace(
            config,
            **{
                outer: dataclasses.replace(getattr(config, outer), **{inner: value})
                if inner
                else value
            },
        )
    return config


def test_what_done_tells(tmp_path):
    """Breaks when a DONE that was damaged ends in a traceback, or counts as the end of training."""
    assert steps_done(tmp_path) == 0
    for content, steps in (
        (b"12\n", 12),
        (b"", 0),
        (b"half\n", 0),
        (b"\xff\x00", 0),
        (b"-3", 0),
        (b"1.5", 0),
    ):
        (tmp_path / "DONE").write_bytes(content)
        assert steps_done(tmp_path) == steps


def test_a_continued_workdir_may_change_what_is_no_mathematics(tmp_path):
    """Breaks when a harmless change is refused or not recorded, or none counts as a change."""
    assert (
        check_workdir(tmp_path, CONFIG, IDENTITY) == []
        and check_workdir(tmp_path, CONFIG, IDENTITY) == []
    )
    now = changed(
        log_every=3,
        eval_every=7,
        checkpoint_every=9,
        remat="full",
        steps=200,
        data__cache_dir="elsewhere",
        base="moved/base",
    )
    now = dataclasses.replace(now, data=dataclasses.replace(now.data, strict=True))
    lines = check_workdir(tmp_path, now, IDENTITY)
    names = [
        "base",
        "checkpoint_every",
        "data.cache_dir",
        "data.strict",
        "eval_every",
        "log_every",
        "remat",
        "steps",
    ]
    assert [line.split(":")[0] for line in lines] == names and lines[-1] == "steps: 100 -> 200"
    assert check_workdir(tmp_path, now, IDENTITY) == []


@pytest.mark.parametrize(
    ("config", "identity", "names"),
    [
        (
            changed(seed=1, optimizer__clip=1.0, lora__rank=4),
            {},
            ["lora.rank", "optimizer.clip", "seed"],
        ),
        (changed(data__context_lengths=(16, 64)), {}, ["data.context_lengths"]),
        (changed(data__train_weights=(1.0,)), {}, ["data.train_weights"]),
        (changed(data__no_answer="none"), {}, ["data.no_answer"]),
        (changed(batch_size=16, log_every=3), {}, ["batch_size"]),
        (changed(steps=50), {}, ["steps"]),
        (CONFIG, {"base": "b2"}, ["identity.base"]),
        (CONFIG, {"data.train": "d2"}, ["identity.data.train"]),
        (CONFIG, {"init_from": "i1"}, ["identity.init_from"]),
    ],
)
def test_a_continued_workdir_may_not_change_the_mathematics(tmp_path, config, identity, names):
    """Breaks when a run continues with other mathematics, a field is not listed, or a refused
    configuration is recorded."""
    check_workdir(tmp_path, CONFIG, IDENTITY)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="started with another configuration") as error:
        check_workdir(tmp_path, config, IDENTITY | identity)
    listed = str(error.value).split("mathematics: ")[1].split(". Give")[0]
    assert [part.split(":")[0] for part in listed.split("; ")] == names
    assert (tmp_path / "config.json").read_text() == before and json.loads(before)["steps"] == 100


def test_a_workdir_from_before_a_field_goes_on_with_its_default(tmp_path):
    """Breaks when a run of an earlier version cannot be continued, or may be with another value of
    a newer field."""
    check_workdir(tmp_path, CONFIG, IDENTITY)
    path = tmp_path / "config.json"
    older = {
        name: value
        for name, value in json.loads(path.read_text()).items()
        if name not in ("data.train_weights", "draw_k")
    }
    path.write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"data\.train_weights: \[\] -> \[1\.0\]"):
        check_workdir(tmp_path, changed(data__train_weights=(1.0,)), IDENTITY)
    assert (
        check_workdir(tmp_path, CONFIG, IDENTITY) == []
        and json.loads(path.read_text())["data.train_weights"] == []
    )


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_a_workdir_from_before_the_encoders_mask_goes_on(tmp_path, method):
    """Breaks when a field whose default depends on others counts as that default's name, or another
    mask than the one there was continues the run.
    """
    config = from_dict(TrainConfig, RAW | {"compression": {"method": method}})
    check_workdir(tmp_path, config, IDENTITY)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    later = ("decoder_lora", "encoder_mask", "encoder_layers", "anchor_vectors")
    for name in later:
        del raw[f"compression.{name}"]
    path.write_text(json.dumps(raw))
    other = dataclasses.replace(
        config, compression=dataclasses.replace(config.compression, encoder_mask="all")
    )
    with pytest.raises(UserError, match="encoder_mask: 'causal' -> 'all'"):
        check_workdir(tmp_path, other, IDENTITY)
    assert check_workdir(tmp_path, config, IDENTITY) == []


def test_an_identity_of_an_earlier_version_counts_as_the_same(tmp_path):
    """Breaks when a run that fingerprinted its data by their times cannot be continued by a version
    that does by content, or any run may be."""
    check_workdir(tmp_path, CONFIG, IDENTITY | {"data.train": "by time"})
    with pytest.raises(ValueError, match=r"identity\.data\.train: 'by time' -> 'other'"):
        check_workdir(tmp_path, CONFIG, IDENTITY | {"data.train": ("other", "by another time")})
    now = IDENTITY | {"data.train": ("by content", "by time")}
    assert check_workdir(tmp_path, CONFIG, now) == [
        "identity.data.train: 'by time' -> 'by content'"
    ]
    assert (
        check_workdir(
            tmp_path, CONFIG, IDENTITY | {"data.train": ("by content", "by another time")}
        )
        == []
    )
    assert json.loads((tmp_path / "config.json").read_text())["identity.data.train"] == "by content"


def test_a_cosine_run_may_go_on_only_where_its_decay_is_fixed(tmp_path):
    """Breaks when more steps stretch the cosine: earlier steps had other learning rates then."""
    cosine = changed(optimizer__schedule="cosine")
    check_workdir(tmp_path / "to_the_end", cosine, IDENTITY)
    with pytest.raises(ValueError, match="steps: 100 -> 200"):
        check_workdir(tmp_path / "to_the_end", dataclasses.replace(cosine, steps=200), IDENTITY)
    fixed = changed(optimizer__schedule="cosine", optimizer__decay_steps=500)
    check_workdir(tmp_path / "fixed", fixed, IDENTITY)
    assert check_workdir(tmp_path / "fixed", dataclasses.replace(fixed, steps=200), IDENTITY) == [
        "steps: 100 -> 200"
    ]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", "100", "steps is '100'; expected int, such as 100"),
        ("steps", None, "steps is None; expected int"),
        ("steps", True, "steps is True; expected int"),
        ("steps", [100], "steps is [100]; expected int"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate is 'fast'; expected float"),
        ("objectives.pad_labels", 0, "objectives.pad_labels is 0; expected bool"),
        ("data.context_lengths", 16, "data.context_lengths is 16; expected list"),
        ("base", 7, "base is 7; expected str"),
        ("compression", {"k": 4}, "compression is {'k': 4}; expected fields by their dotted names"),
        ("identity.base", 7, "identity.base is 7; expected a fingerprint"),
    ],
)
def test_a_run_s_file_that_was_edited_is_named(field, value, said, tmp_path):
    """Breaks when a wrong type in a workdir's config.json is a traceback, or is overwritten."""
    check_workdir(tmp_path, CONFIG, IDENTITY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    before = path.read_text()
    with pytest.raises(UserError, match=re.escape(f"{path}: {said}")) as raised:
        check_workdir(tmp_path, CONFIG, IDENTITY)
    assert "\n" not in str(raised.value) and path.read_text() == before


def test_what_counts_as_trained(tmp_path):
    """Breaks when another configuration may take a workdir with a checkpoint, damaged or not, or
    with metrics of a step."""
    assert nothing_trained(tmp_path) and nothing_trained(tmp_path / "absent")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n')
    assert nothing_trained(tmp_path)
    for made in ("checkpoints/step_2", "checkpoints/damaged_step_2"):
        (tmp_path / made).mkdir(parents=True)
        assert not nothing_trained(tmp_path)
        (tmp_path / made).rmdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert not nothing_trained(tmp_path)


def test_where_nothing_was_trained_another_configuration_takes_over(tmp_path):
    """Breaks when a start that failed binds its workdir, or the change goes unsaid."""
    check_workdir(tmp_path, CONFIG, IDENTITY)
    assert check_workdir(tmp_path, changed(seed=1), IDENTITY, binding=False) == [
        f"the run itself, as nothing has been trained in {tmp_path} yet", "seed: 0 -> 1",
    ]  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert check_workdir(tmp_path, changed(seed=1), IDENTITY, binding=False) == []
