"""What is given as a base and is none: the error says what it is, and what to give instead."""

import huggingface_hub
import pytest

from icae_jax import errors
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations

PEFT = '{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}'


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "give one in the model hub's format .the folder is empty"),
        ({"README.md": ""}, "; give one in the model hub's format$"),
        (
            {"adapter_config.json": PEFT, "adapter_model.safetensors": ""},
            r"a LoRA adapter of (\S+), not a base; merge it .*, or give \1$",
        ),
        (
            {"adapter_config.json": "[]"},
            r"a LoRA adapter, not a base; merge it first .peft: merge_and_unload.$",
        ),
        (
            {"adapter_config.json": '{"base_model_name_or_path": null}'},
            "a LoRA adapter, not a base",
        ),
        (
            {"icae.json": "{}", "adapter_config.json": PEFT},
            "an adapter of this package; give it as the adapter",
        ),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "the model's original files"),
        ({"consolidated.safetensors": ""}, "the model's original files"),
        ({"m-Q4_K_M.gguf": "GGUF"}, r"it holds m-Q4_K_M\.gguf; give the file, .*given.m-Q4_K_M"),
        (
            {"checkpoint-10/config.json": "{}", "trainer_state.json": "{}"},
            "checkpoint-10 in it has one; give that folder",
        ),
        (
            {"snapshots/abc/config.json": "{}", "refs/main": "abc"},
            "snapshots/abc in it has one; give that folder",
        ),
    ],
    ids=lambda value: ", ".join(value) or "nothing" if isinstance(value, dict) else None,
)
def test_what_is_no_base_is_told(held, message, tmp_path, monkeypatch):
    """Breaks when the error blames the tokenizer, or does not say what to give instead; for folders
    here and on the hub."""
    folder = tmp_path / "given"
    folder.mkdir()
    for name, text in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    for base in (folder, "org/given"):
        for load in (bases.load_base, bases.sizes, bases.identify):
            with pytest.raises(
                errors.UserError, match=f"base '{base}' has no config.json.*?{message}"
            ):
                load(base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", r"model\.gguf: the file is empty"),
        ("x/model.safetensors", "is a file; give"),
    ],
)
def test_a_file_is_no_base(name, message, tmp_path, monkeypatch):
    """Breaks when the hub is asked for a file, or the error says only that it is no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for base in (name, tmp_path / name):
        with pytest.raises(errors.UserError, match=message):
            locations.local_folder(base)


def test_a_workdir_is_no_base(tiny_base, tmp_path):
    """Breaks when a training run's folder is refused for its tokenizer or its sizes."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"phase": "pretrain", "base": "org/b", "compression.method": "icae"}'
    )
    with pytest.raises(
        errors.UserError,
        match=r"run/config\.json: the configuration of a training run, .* its base is 'org/b'",
    ):
        bases.load_base(folder)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "https://huggingface.co/org/name",
            "https:// is not read; give a folder, the hub id org/name, or gs://",
        ),
        (
            "https://hf.co/org/name/tree/v1.0/adapter",
            "give a folder, the hub id org/name@v1.0, or gs://",
        ),
        ("http://host/base", "http:// is not read; give a folder, the hub id org/name, or gs://"),
        ("file:///data/base", "file:// is not read; give the path alone, /data/base"),
    ],
)
def test_a_url_that_is_no_storages(url, message):
    """Breaks when a URL that is no storage's ends in a traceback, or its remedy is not named."""
    for ask, kind in ((locations.local_folder, "base"), (locations.local_adapter, "adapter")):
        with pytest.raises(errors.UserError) as error:
            ask(url)
        assert str(error.value).startswith(f"{kind} {url!r}: ") and message in str(error.value)
