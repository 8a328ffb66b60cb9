"""Base models: saving and loading, tokenizer, stop ids, identity."""

import dataclasses
import json
import re

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from conftest import ROOT, TINY, close, head_kernel, random_params, same

from icae_jax import errors
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub import weights
from icae_jax.models import llama, rope
from icae_jax.workflows import convert_base
from icae_jax.workflows.quickstart import SHIPPED_BASE

LLAMA3 = rope.Llama3Scaling(8.0, 1.0, 4.0, 64)


def test_bfloat16_round_trip_through_transformers(tmp_path, tiny_params, tiny_tokenizer):
    """Breaks when a saved base loads differently here or in transformers: names, transposition,
    rounding, config, tokenizer.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    bases.save_base(tmp_path / "saved", TINY, tiny_params, tiny_tokenizer)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params)
    same(weights.load_params(tmp_path / "saved", TINY, jnp.bfloat16), rounded)
    base = bases.load_base(tmp_path / "saved")
    same(base.params, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert (
        base.config == TINY
        and base.tokenizer("the cat")["input_ids"] == [1, 8, 9]
        and tokenizers.bos_id(base.tokenizer) == 1
    )

    ids = np.random.default_rng(0).integers(0, 64, (1, 12))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    )
    with torch.no_grad():
        want = model(torch.from_numpy(ids)).logits.numpy()

    @jax.jit
    def logits(params, ids):
        hidden, _ = llama.Llama(TINY).apply(
            {"params": params}, ids, jnp.arange(12)[None], llama.causal_mask(12)
        )
        return hidden @ head_kernel(params)

    close(logits(base.params, jnp.asarray(ids)), want, 1e-4)


def test_stop_ids(folder, tiny_tokenizer):
    """Breaks when generation_config's list of eos ids, or the tokenizer's own, is left out."""
    assert bases.stop_ids(folder, tiny_tokenizer) == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert bases.stop_ids(folder, tiny_tokenizer) == (2, 5, 7)
    (folder / "generation_config.json").write_text("{}")
    assert bases.stop_ids(folder, tiny_tokenizer) == (2,)


def test_folder_without_tokenizer_is_named(folder, tmp_path):
    """Breaks when a wrong path is taken for a name on the hub and downloaded."""
    with pytest.raises(ValueError, match="is not a folder; give a model-hub folder"):
        tokenizers.load_tokenizer(tmp_path / "absent")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        tokenizers.load_tokenizer(folder)


def test_the_shipped_tokenizer_is_found_without_looking_for_its_class(monkeypatch):
    """Breaks when every start imports all that `AutoTokenizer` may choose from (PyTorch too),
    which takes seconds, or what is loaded instead is another tokenizer.
    """
    found = transformers.AutoTokenizer.from_pretrained(str(SHIPPED_BASE), local_files_only=True)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("looked for")
    )
    ours = tokenizers.load_tokenizer(SHIPPED_BASE)
    assert type(ours) is type(found) and ours.init_kwargs == found.init_kwargs
    assert ours.backend_tokenizer.to_str() == found.backend_tokenizer.to_str()


CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({ran!r}).touch()
class X(PreTrainedTokenizerFast): pass
"""


def own_code(folder, name="tokenizer_config.json", tokenizer_class="X"):
    """Makes the folder's tokenizer custom code; returns the file that the code creates when it
    runs.
    """
    ran = folder / "RAN"
    (folder / "tokenization_x.py").write_text(CODE.format(ran=str(ran)))
    path = folder / name
    told = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    }
    path.write_text(
        json.dumps(
            told | ({"tokenizer_class": tokenizer_class} if name == "tokenizer_config.json" else {})
        )
    )
    return ran


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_tokenizers_own_code_is_never_run(folder, monkeypatch, tmp_path, name):
    """Breaks when a base's Python code runs, or a prompt asks whether it may: a yes on stdin would
    suffice.
    """
    ran, asked = own_code(folder, name), []
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    if name == "config.json":  # transformers knows a Llama's tokenizer without
        assert bases.load_base(folder).tokenizer("the cat")["input_ids"] == [1, 8, 9]
    else:
        with pytest.raises(
            errors.UserError, match=r"auto_map: tokenization_x\.X\), which is never run here"
        ) as caught:
            bases.load_base(folder)
        assert "\n" not in str(caught.value)
    assert not asked and not ran.exists()


def test_a_tokenizer_of_transformers_needs_no_code_of_its_own(folder, monkeypatch, tmp_path):
    """Breaks when a base that names code beside a transformers class is refused, or the code is run
    or copied.
    """
    ran = own_code(folder, tokenizer_class="PreTrainedTokenizerFast")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    assert (
        bases.load_base(folder).tokenizer("the cat")["input_ids"] == [1, 8, 9] and not ran.exists()
    )
    convert_base.convert(folder, tmp_path / "to")
    assert (
        not list((tmp_path / "to").glob("*.py")) and (tmp_path / "to" / "tokenizer.json").exists()
    )


def test_nothing_that_is_loaded_by_transformers_may_run_code():
    """Breaks when a call of the package, of the launchers, or in code that they generate trusts
    what it loads.
    """
    sources = [
        path.read_text()
        for folder in ("icae_jax", "launch")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md")
    ]
    calls = [
        call
        for text in sources
        for call in re.findall(r"\.Auto\w+\.from_pretrained\(([^()]*(?:\([^()]*\)[^()]*)*)\)", text)
    ]
    assert len(calls) >= 4 and all("trust_remote_code=False" in call for call in calls)


def test_a_tokenizer_that_no_library_reads_is_named(folder):
    """Breaks when a bare Exception of a tokenizer's library ends in a traceback, which launchers
    would retry.
    """
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"model": {"type": "OfTheFuture"}}))
    with pytest.raises(errors.UserError, match="no tokenizer could be loaded"):
        tokenizers.load_tokenizer(folder)


def test_stop_ids_without_a_tokenizer(folder):
    """Breaks when config.json's eos ids are not used where generation_config.json has none, or are
    added where it has.
    """
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert bases.stop_ids(folder) == (7,)
    (folder / "generation_config.json").unlink()
    assert bases.stop_ids(folder) == (2,)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [9, 4]}))
    assert bases.stop_ids(folder) == (4, 9)
    for damaged in ('"x"', "[2, {}]", "true"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {damaged}}}')
        with pytest.raises(
            errors.UserError,
            match=r"generation_config\.json: eos_token_id is .*, "
            "which is not a whole number or a list",
        ):
            bases.stop_ids(folder)


@pytest.mark.parametrize(
    "damaged",
    [
        '{"auto_map": "x"}',
        '{"auto_map": {"AutoTokenizer": [3, "y"]}, "tokenizer_class": "X"}',
        "[]",
    ],
)
def test_a_damaged_tokenizer_config_is_named(folder, damaged):
    """Breaks when a field of the wrong type gives a traceback from within an error handler."""
    (folder / "tokenizer_config.json").write_text(damaged)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.UserError, match=f"^{folder}"):
        tokenizers.load_tokenizer(folder)


def test_base_from_the_hub(folder, monkeypatch):
    """Breaks when a base of the hub is not what the folder holds, or its path becomes that of a
    cache.
    """
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    base, here = bases.load_base("org/tiny"), bases.load_base(folder)
    assert (base.path, here.path) == (
        "org/tiny",
        str(folder),
    ) and base.fingerprint == here.fingerprint
    same(base.params, here.params)


def test_sharding_and_dtype_reach_the_weights(folder):
    """Breaks when a base is loaded whole onto one device, though it was to be split."""
    where = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.asarray(jax.devices()), ("x",)), jax.sharding.PartitionSpec()
    )
    base = bases.load_base(folder, jnp.bfloat16, sharding=lambda path, shape: where, progress=True)
    assert {x.sharding for x in jax.tree.leaves(base.params)} == {where} and base.params[
        "embed"
    ].dtype == jnp.bfloat16


def test_base_without_a_tokenizer(folder):
    """Breaks when a folder of weights alone is refused though no tokenizer is needed, or accepted
    though one is.
    """
    assert bases.load_base(folder, need_tokenizer=False).tokenizer is not None
    for file in folder.glob("tokenizer*"):
        file.unlink()
    base = bases.load_base(folder, need_tokenizer=False)
    assert base.tokenizer is None and base.stop_ids == (2,)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        bases.load_base(folder)


def test_fingerprint(tiny_params):
    """Breaks when one base has two fingerprints (by dtype), or two bases have one."""
    own = bases.fingerprint(TINY, tiny_params)
    assert (
        bases.fingerprint(
            TINY, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), tiny_params)
        )
        == own
    )
    assert (
        bases.fingerprint(dataclasses.replace(TINY, max_position_embeddings=999), tiny_params)
        == own
    )
    others = [
        bases.fingerprint(TINY, random_params(TINY, seed=1)),
        bases.fingerprint(
            TINY, tiny_params | {"norm": {"scale": tiny_params["norm"]["scale"] * 1.1}}
        ),
        bases.fingerprint(TINY, tiny_params | {"embed": tiny_params["embed"].at[40].multiply(1.1)}),
        bases.fingerprint(dataclasses.replace(TINY, rope_theta=5e5), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, rms_norm_eps=1e-6), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, rope_scaling=LLAMA3), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, windows=(4, 0)), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, qk_norm=True), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, qkv_bias=True), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, qkv_bias=True, o_bias=True), tiny_params),
        bases.fingerprint(dataclasses.replace(TINY, mlp_bias=True), tiny_params),
    ]
    assert len({own, *others}) == 12


def test_fingerprint_stays_what_it_was():
    """Breaks when a new field of the model's configuration changes the identity of bases that
    adapters were trained on.
    """
    params = {
        "norm": {"scale": np.ones(32, np.float32)},
        "embed": np.arange(64 * 32, dtype=np.float32).reshape(64, 32),
    }
    assert bases.fingerprint(TINY, params).startswith("924c04442c26")


def test_identity_without_the_weights(tiny_base, monkeypatch):
    """Breaks when a base's identity differs from that of the loaded base, or all of it is read."""
    whole = bases.load_base(tiny_base)
    read = []
    monkeypatch.setattr(
        weights, "_read_shard", lambda *args, f=weights._read_shard: read.append(1) or f(*args)
    )
    assert bases.identify(str(tiny_base)) == (whole.config, whole.fingerprint)
    assert len(read) == 2
