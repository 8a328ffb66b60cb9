"""Loading a configuration: files and shipped names, defaults, overrides, and errors."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from icae_jax.errors import UserError
from icae_jax.models.families import sizes
from icae_jax.training import config_file
from icae_jax.training.config import BaseConfig, TrainConfig
from icae_jax.training.config_file import load, nested

FORMS = {
    "ConfigDict": "ConfigDict({'steps': 7, 'lora': {'rank': 4}})",
    "nested": "{'steps': 7, 'lora': {'rank': 4}}",
    "dotted": "{'steps': 7, 'lora.rank': 4}",
}
UNSET = {"base": "b", "data.train": "t"}


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file whose get_config(arg) returns an expression; gives its path."""

    def write(expression):
        path = tmp_path / "mine.py"
        path.write_text(
            "from ml_collections import ConfigDict\n\n"
            f"def get_config(arg='none'):\n    return {expression}\n"
        )
        return str(path)

    return write


@pytest.mark.parametrize("form", FORMS)
def test_a_file_says_what_differs(form, file):
    """Breaks when a field that the file leaves out loses its default, or a form is not read."""
    config = load(TrainConfig, file(FORMS[form]), {}, UNSET)
    assert (config.steps, config.lora.rank) == (7, 4)
    assert (config.batch_size, config.lora.scale, config.data.context_lengths) == (8, 2.0, (512,))


def test_a_file_that_sets_every_field_still_works(file):
    """Breaks when a configuration file of before, which set every field, is refused."""
    groups = nested(config_file.default_fields(TrainConfig), "defaults")
    config = load(TrainConfig, file(repr(groups)), UNSET | {"steps": 3})
    assert config.steps == 3 and config.base == "b"


def test_the_argument_reaches_get_config(file):
    path = file("{'base': '/' + arg}")
    for given, base in ((path, "/none"), (f"{path}:x-y", "/x-y"), (f"{path}:", "/none")):
        assert load(TrainConfig, given, {"data.train": "t"}).base == base


OVERRIDES = {
    "steps": ("12", 12),
    "optimizer.learning_rate": ("1e-3", 1e-3),
    "optimizer.clip": ("1", 1.0),
    "data.strict": ("True", True),
    "objectives.pad_labels": ("false", False),
    "data.context_lengths": ("(16, 32)", (16, 32)),
    "lora.targets": ("q_proj,k_proj", ("q_proj", "k_proj")),
    "draw_k": ("('pretrain','finetune')", ("pretrain", "finetune")),
    "init_from": ("12", "12"),
    "mesh.fsdp": ("-1", -1),
}


@pytest.mark.parametrize("field", OVERRIDES)
def test_overrides_are_read_by_the_fields_types(field, file):
    """Breaks when a text is not read as what its field holds, or a value is not taken as it is."""
    text, value = OVERRIDES[field]
    for given in (text, value):
        config = load(TrainConfig, file("{}"), {field: given}, UNSET)
        for name in field.split("."):
            config = getattr(config, name)
        assert config == value and type(config) is type(value)


def test_overrides_of_a_command_line():
    """Breaks when a spelling of a field is not known, or anything else is taken for one."""
    argv = ["--config.a.b=1=2", "--config.c", "-1", "--config.d", "--config.e="]
    assert config_file.overrides(argv) == {"a.b": "1=2", "c": "-1", "d": True, "e": ""}
    for stray in ("more", "config.a=1", "--a=1"):
        with pytest.raises(UserError, match=f"argument '{stray}'; fields are set by --config"):
            config_file.overrides([stray])


def test_a_named_base_becomes_its_hub_id(file, tmp_path, monkeypatch):
    """Breaks when a word for no base is taken as a folder, or a user's own base is refused."""
    monkeypatch.chdir(tmp_path)
    fill = {"data.train": "t"}
    for name, hub_id in sizes.SHORT_NAMES.items():
        assert load(TrainConfig, file("{'base': arg}") + f":{name}", fill).base == hub_id
        assert sizes.find(hub_id)
    with pytest.raises(UserError, match=r"icae:llama9: 'llama9' is not known.*qwen3_8b"):
        load(TrainConfig, "icae:llama9", fill)
    assert load(TrainConfig, file("{'base': arg}") + ":llama9", fill).base == "llama9"
    assert load(TrainConfig, file("{'base': 'gpt2'}"), fill).base == "gpt2"


WRONG = {
    "no file": (None, {}, "--config is not given; .* icae, quickstart, tiny_base, x500"),
    "absent": ("absent", {}, "absent: no such file, and not one of the shipped .* icae, quick"),
    "unknown": ("icae", {"compresion.k": "4"}, "k is not a field of .*; is compression.k meant"),
    "a group": ("icae", {"lora": "4"}, "^lora is a group of fields"),
    "of another command": (
        "tiny_base",
        {},
        r"is not a field of .*`icae train` but of one for `icae train base`",
    ),
    "below a field": ("icae", {"steps.more": "4"}, r"steps\.more is not a field"),
    "wrong type": ("icae", {"steps": "many"}, r"config\.steps is 'many'; expected int"),
    "no number": ("icae", {"steps": "1.5"}, r"config\.steps is '1\.5'; expected int"),
    "no truth": ("icae", {"data.strict": "perhaps"}, r"strict is 'perhaps'; expected bool"),
    "no tuple": ("icae", {"data.context_lengths": "a,b"}, r"lengths is 'a,b'; expected a tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    """Breaks when an error names neither the field nor what would do."""
    config, overrides, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        load(TrainConfig, config, overrides, UNSET)
    assert "\n" not in str(error.value)


def test_a_base_is_trained_in_full_precision():
    """Breaks when `icae train base` takes a scheme and trains codes, or only calls it unknown."""
    message = "^`icae train base` has no quantize: it trains every parameter, in full precision"
    with pytest.raises(UserError, match=message):
        load(BaseConfig, "tiny_base", {"quantize": "int8"})


def test_no_get_config_is_told(tmp_path):
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match=r"empty\.py defines no get_config"):
        load(BaseConfig, str(tmp_path / "empty.py"))


@pytest.mark.parametrize("flat", [{"lora": 1, "lora.rank": 4}, {"lora.rank": 4, "lora": 1}])
def test_a_name_is_a_field_or_a_group(flat):
    """Breaks when a run's file that names a group as a field ends in a traceback."""
    with pytest.raises(UserError, match=r"file: lora.* is a group of fields"):
        nested(flat, "file")
    assert nested({"a": 1, "b.c": 2, "b.d.e": 3}, "file") == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


WHEEL = """
import sys
from icae_jax.training import config_file
from icae_jax.training.config import TrainConfig
print(config_file.load(TrainConfig, "icae:llama2_7b", {"data.train": "t"}).base)
"""


def test_configurations_are_in_the_wheel(tmp_path):
    """Breaks when `--config icae:llama2_7b` needs the repository, or the wheel lacks its files."""
    build = [sys.executable, "setup.py", "-q", "build", "-b", tmp_path, "egg_info", "-e", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (installed,) = tmp_path.glob("lib*")
    assert (installed / "icae_jax" / "py.typed").exists()
    out = subprocess.run(
        [sys.executable, "-c", WHEEL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert out.stdout == "meta-llama/Llama-2-7b-hf\n", out.stderr


def test_what_a_file_derives_follows_an_override(tmp_path):
    """Breaks when a field that a file computes by a FieldReference keeps its value under an
    override.
    """
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict, FieldReference\n"
        "def get_config():\n"
        "    k = FieldReference(4)\n"
        "    compression = ConfigDict({'k': k, 'rate': 12.0 / k})\n"
        "    data = ConfigDict({'train': 't'})\n"
        "    return ConfigDict({'base': 'b', 'compression': compression, 'data': data})\n"
    )
    made = config_file.load(TrainConfig, str(path), {"compression.k": "2"})
    assert (made.compression.k, made.compression.rate) == (2, 6.0)


def test_a_base_of_a_file_is_the_users(tmp_path, monkeypatch):
    """Breaks when the folder or name that a user's file gives is taken for a shipped word, or a
    word of a shipped file for a folder that happens to be here.
    """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.py"
    path.write_text("def get_config(arg):\n    return {'base': arg, 'data.train': 't'}\n")

    def base_of(config, **overrides):
        return config_file.load(TrainConfig, config, {"data.train": "t"} | overrides).base

    assert base_of(f"{path}:gpt2") == "gpt2"
    assert base_of(f"{path}:mistral_7b") == sizes.hub_id("mistral_7b")
    assert base_of("icae:pretrain", base="llama2_7b") == sizes.hub_id("llama2_7b")
    (tmp_path / "mistral_7b").mkdir()
    (tmp_path / "foo").mkdir()
    assert base_of(f"{path}:mistral_7b") == "mistral_7b"
    for overrides in ({}, {"base": "b"}):
        with pytest.raises(UserError, match="icae:foo: 'foo' is not known"):
            base_of("icae:foo", **overrides)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.base", "config.base is True; expected str"),
        ("--config.steps", "config.steps is True; expected int"),
        ("--config.compression.k_choices={[]:1}", "k_choices is .*; expected a tuple of int"),
        ("--config.data=1", "data is a group of fields"),
        ("--config.=1", "'' is not a field"),
        ("--config.compression.rate=nan", "compression.rate is nan; expected a finite number"),
        ("--config.optimizer.b1=inf", "optimizer.b1 is inf; expected a finite number"),
        ("config.steps=1", "unknown argument"),
    ],
)
def test_what_is_no_override(argument, said):
    """Breaks when a switch becomes the text "true", or an odd value ends in a traceback."""
    with pytest.raises(UserError, match=said):
        config_file.load(TrainConfig, "icae:pretrain", config_file.overrides([argument]))


def test_spellings_of_overrides():
    """Breaks when a spelling that absl's flags took is refused."""
    arguments = ["-config.steps=0x10", "--noconfig.data.strict", "--config.lora.targets=q_proj"]
    made = config_file.load(
        TrainConfig,
        "icae:pretrain",
        config_file.overrides([*arguments, "--config.base", "b", "--config.data.train=t"]),
    )
    assert (made.steps, made.data.strict, made.base) == (16, False, "b")
    assert made.lora.targets == ("q_proj",)
