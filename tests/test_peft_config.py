"""adapter_config.json against PEFT itself: which modules have LoRA, of which rank and scale, and
what is refused by name.
"""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY, random_trained

from icae_jax import errors
from icae_jax.compression.config import CompressionConfig
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_config, peft_folder
from icae_jax.interop.hub import base as bases
from icae_jax.models import lora
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives.targets import Template

PLAIN = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 6.0,
    "target_modules": ["q_proj", "v_proj"],
}
MODULES = [
    f"model.layers.{i}.{lora.module_of(name)}.{name}"
    for i in range(TINY.num_layers)
    for name in lora.PROJECTIONS
]


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A PEFT folder of an adapter of rank 4 on q_proj and v_proj."""
    folder = tmp_path_factory.mktemp("peft") / "plain"
    compression, template = CompressionConfig(k=3, rate=5), Template("plain", (), (5,), (6,), 2)
    adapter = adapters.Adapter(
        compression,
        LoraConfig(4, 1.5, 0.1),
        template,
        random_trained(TINY, 3),
        str(base.path),
        base.fingerprint,
    )
    peft_folder.save(folder, adapter, TINY)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "adapter")


def read(tmp_path, **fields):
    """adapter_config.json of a plain LoRA with these fields, `...` for one that is left out."""
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({name: value for name, value in (PLAIN | fields).items() if value is not ...})
    )
    return peft_config.read(path)


# --- computed as PEFT computes it ---

QV = ["q_proj", "v_proj"]
COMPUTED = {
    "ends of names": {"target_modules": ["self_attn.q_proj", "0.mlp.up_proj", "query"]},
    "whole names": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    },
    "a pattern": {"target_modules": r".*\.(q|k)_proj"},
    "a pattern of a layer": {"target_modules": r"model\.layers\.1\..*(o|down)_proj"},
    "all linear modules": {"target_modules": "all-linear"},
    "without some": {
        "target_modules": "all-linear",
        "exclude_modules": ["layers.0.mlp.up_proj", "q_proj"],
    },
    "without a pattern": {"target_modules": QV, "exclude_modules": r".*layers\.0.*q_proj"},
    "some layers": {"target_modules": QV, "layers_to_transform": [1]},
    "one layer": {"target_modules": QV, "layers_to_transform": 0, "layers_pattern": "layers"},
    "some layers, and one by its whole name": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "rsLoRA": {"target_modules": QV, "use_rslora": True, "r": 6},
    "ranks": {
        "target_modules": QV,
        "rank_pattern": {"q_proj": 7, "layers.1.self_attn.v_proj": 2, "proj": 9},
    },
    "alphas": {
        "target_modules": QV,
        "alpha_pattern": {"q_proj": 3, "^model.layers.1.self_attn.v_proj": 20},
    },
    "an alpha of zero": {"target_modules": QV, "alpha_pattern": {"q_proj": 0}},
    "all of it": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, r".*mlp\..*": 2},
        "alpha_pattern": {r"layers\.0\..*": 5, "o_proj": 1},
    },
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "fan_in_fan_out, which PEFT itself takes back": {"target_modules": QV, "fan_in_fan_out": True},
}


def deltas(model):
    """What PEFT adds to each module's weight, `{module: [out, in]}`."""
    found = {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return {
        name.removeprefix("base_model.model."): np.asarray(delta.detach())
        for name, delta in found.items()
    }


def ours(adapter):
    """The same of an adapter, of modules where it is not zero."""
    found = {}
    for module, projections in adapter.trained["lora"]["layers"].items():
        for name, pair in projections.items():
            for i in range(TINY.num_layers):
                delta = adapter.lora.scale * np.asarray(pair["b"][i]).T @ np.asarray(pair["a"][i]).T
                found |= {f"model.layers.{i}.{module}.{name}": delta} if delta.any() else {}
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_what_peft_computes(name, base, tiny_base, folder, tmp_path):
    """Breaks when a module is given LoRA that has none in PEFT, another rank, another scale, or
    saving the adapter changes it.
    """
    peft, torch, transformers = (pytest.importorskip(m) for m in ("peft", "torch", "transformers"))
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | COMPUTED[name]),
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    want = {module: delta for module, delta in deltas(model).items() if delta.any()}
    adapter = adapters.load_adapter(folder, base)
    assert want
    adapters.save_adapter(tmp_path / "native", adapter)
    peft_folder.save(tmp_path / "peft", adapter, TINY)
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        tmp_path / "peft",
    )
    every = [
        ours(adapter),
        *(ours(adapters.load_adapter(tmp_path / form, base)) for form in ("native", "peft")),
        deltas(again),
    ]
    for got in every:
        assert set(want) == {module for module, delta in got.items() if delta.any()}
        for module, delta in want.items():
            np.testing.assert_allclose(got[module], delta, rtol=1e-4, atol=1e-5)


def test_modules_are_matched_as_peft_does(tmp_path):
    """Breaks when a name or pattern matches other modules than in PEFT: the head, an end within a
    word, a nested number.
    """
    utils, others = (
        pytest.importorskip("peft.tuners.tuners_utils"),
        pytest.importorskip("peft.utils.other"),
    )
    peft = pytest.importorskip("peft")
    odd = [
        "lm_head",
        "model.embed_tokens",
        "layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.my_q_proj",
        "a.h.1.layers.0.q_proj",
    ]
    more = [
        {"target_modules": ["lm_head", "proj", "j"]},
        {"target_modules": "q_proj"},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ]
    for fields in [*COMPUTED.values(), *more]:
        if fields["target_modules"] == "all-linear":  # which PEFT spells out by the model
            continue
        stated, config = (
            read(tmp_path, **fields),
            peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | fields),
        )
        for module in [*MODULES, *odd]:
            assert stated.has_lora(module) == bool(
                utils.check_target_module_exists(config, module)
            ), (fields, module)
            rank = config.rank_pattern.get(
                others.get_pattern_key(config.rank_pattern, module), config.r
            )
            assert stated.rank_of(module) == rank
            alpha = config.alpha_pattern.get(
                others.get_pattern_key(config.alpha_pattern, module), config.lora_alpha
            )
            assert stated.scale_of(module) == pytest.approx(
                alpha / rank**0.5 if config.use_rslora else alpha / rank
            )


def test_every_field_of_peft_is_known(tmp_path):
    """Breaks when a field of the installed PEFT was never decided on, or its default is refused."""
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= peft_config.COMPUTED | peft_config.HARMLESS | peft_config.REFUSED
    defaults = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]).to_dict()
    read(
        tmp_path,
        **{
            name: list(value) if isinstance(value, set) else value
            for name, value in defaults.items()
        },
    )


# --- refused ---

REFUSED = [
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("modules_to_save", ["norm"]),
    ("trainable_token_indices", [3]),
    ("target_parameters", ["mlp.experts"]),
    ("layer_replication", [[0, 2]]),
    ("use_qalora", True),
    ("megatron_config", {"a": 1}),
    ("alora_invocation_tokens", [4]),
    ("arrow_config", {"top_k": 3}),
    ("use_bdlora", {"a": 1}),
    ("kasa_config", {"a": 1}),
    ("velora_config", {"a": 1}),
    ("monteclora_config", {"a": 1}),
    ("enable_lora", [True]),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "of-next-year"),
    ("a_new_field", True),
    ("a_new_field", False),
    ("a_new_field", "x"),
    ("a_new_field", 0),
    ("peft_type", "ADALORA"),
    ("peft_type", "lora"),
    ("peft_type", None),
    ("r", None),
    ("r", 0),
    ("r", -4),
    ("r", "4"),
    ("r", 4.5),
    ("r", True),
    ("r", 10**400),
    ("lora_alpha", None),
    ("lora_alpha", 0),
    ("lora_alpha", "8"),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400),
    ("lora_dropout", "0.1"),
    ("lora_dropout", 1.5),
    ("use_rslora", 1),
    ("use_rslora", "true"),
    ("target_modules", None),
    ("target_modules", []),
    ("target_modules", [1]),
    ("target_modules", {"q_proj": 1}),
    ("target_modules", "(q_proj"),
    ("exclude_modules", 3),
    ("exclude_modules", "("),
    ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": "4"}),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"(": 4}),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"q_proj": float("nan")}),
    ("alpha_pattern", 3),
    ("layers_to_transform", ["1"]),
    ("layers_to_transform", 1.5),
    ("layers_pattern", "layers"),
    ("layers_pattern", 3),
    ("revision", 3),
    ("base_model_name_or_path", ["base"]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(name, value, tmp_path):
    """Breaks when a field that changes what PEFT computes, or nobody knows, or that holds nonsense,
    is passed over in silence.
    """
    with pytest.raises(errors.UserError, match=rf"adapter_config\.json: {name}") as error:
        read(tmp_path, **{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_what_must_be_there(name, tmp_path):
    """Breaks when PEFT's silent defaults stand in for what is missing."""
    with pytest.raises(errors.UserError, match=rf"adapter_config\.json: {name} missing"):
        read(tmp_path, **{name: ...})


def test_harmless_values(tmp_path):
    """Breaks when notes, floats for whole numbers, nulls, or fields of old and new versions at
    values that do nothing, are refused.
    """
    stated = read(
        tmp_path,
        r=8.0,
        lora_alpha=16,
        lora_dropout=None,
        rank_pattern=None,
        alpha_pattern=None,
        layers_to_transform=[],
        use_rslora=None,
        layers_pattern="",
        exclude_modules=[],
        modules_to_save=[],
        use_dora=None,
        bias=None,
        a_new_field=None,
        merge_weights=False,
        enable_lora=None,
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        init_lora_weights="eva",
        task_type="FEATURE_EXTRACTION",
        auto_mapping={"parent_library": "transformers"},
        runtime_config={"ephemeral_gpu_offload": False},
        peft_version="9.9",
        revision=None,
        base_model_name_or_path=None,
        megatron_core="megatron.core",
        qalora_group_size=16,
        ensure_weight_tying=True,
    )
    assert (stated.rank, stated.scale, stated.dropout, stated.base) == (
        8,
        2.0,
        0.0,
        "",
    ) and stated.rank_of(MODULES[0]) == 8
    assert read(tmp_path, base_model_name_or_path="org/base", revision="v2").base == "org/base@v2"
    assert read(tmp_path, base_model_name_or_path=str(tmp_path), revision="v2").base == str(
        tmp_path
    )


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"r": 8},
            r"lora_A\.weight: \(4, 32\), with this base and r 8 in adapter_config\.json it is \(8",
        ),
        (
            {"rank_pattern": {"q_proj": 2}},
            r"q_proj\.lora_A\.weight: \(4, 32\), .* r 2 .*it is \(2, 32\)",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "k_proj"]},
            r"missing base_model\.model\.model\.layers\.0\.self_attn\.k_proj\.lora_A",
        ),
        (
            {"target_modules": ["q_proj"]},
            r"unexpected .*v_proj\.lora_A\.weight: by adapter_config\.json .*v_proj has no LoRA",
        ),
        ({"target_modules": "all-linear"}, r"missing .*mlp\.up_proj\.lora_A\.weight"),
        (
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            "missing lm_head: adapter_config.json gives it LoRA",
        ),
        ({"target_modules": ["query"]}, "unexpected .*q_proj has no LoRA"),
        ({"layers_to_transform": [1]}, r"unexpected .*layers\.0\.self_attn\.q_proj has no LoRA"),
        ({"exclude_modules": ["q_proj"]}, r"unexpected .*q_proj has no LoRA"),
        (
            {"alpha_pattern": {"q_proj": 1e300}},
            "alpha_pattern gives q_proj scales beyond what float32 holds",
        ),
    ],
)
def test_configuration_and_tensors_disagree(changes, message, folder, base):
    """Breaks when one of two statements that contradict each other is taken in silence."""
    edit(folder, **changes)
    with pytest.raises(errors.UserError, match=message):
        adapters.load_adapter(folder, base)


PREFIX = "base_model.model.model."
Q_A = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}layers.0.self_attn.q_proj.lora_B.bias",
        f"{PREFIX}layers.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}norm.weight",
        f"{PREFIX}embed_tokens.lora_embedding_A",
        f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.lm_head.lora_A.weight",
        f"{PREFIX}vision.model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}layers.0.self_attn.q_proj.lora_A.other.weight",
    ],
)
def test_every_tensor_is_read_or_named(name, folder, base):
    """Breaks when a tensor that changes what PEFT computes is left out in silence, though no field
    of the configuration tells of it.
    """
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(path) | {name: np.ones((4, 32), np.float32)}, path
    )
    with pytest.raises(
        errors.UserError, match=r"adapter_model\.safetensors: .* would not be read"
    ) as error:
        adapters.load_adapter(folder, base)
    assert name in str(error.value)


TABLE = adapters.MEMORY_TABLE


@pytest.mark.parametrize(
    ("file", "name", "change", "message"),
    [
        ("memory", "other", lambda x: x, "other would not be read"),
        ("memory", TABLE, lambda x: x * np.nan, f"unreadable {TABLE}: it holds NaN or infinity"),
        ("memory", TABLE, lambda x: x.astype(np.int32), f"unreadable {TABLE}: of type int32"),
        ("memory", TABLE, lambda x: x[None], "expected"),
        ("adapter_model", Q_A, lambda x: x * np.inf, f"unreadable {Q_A}: it holds NaN or infinity"),
        (
            "adapter_model",
            Q_A,
            lambda x: x.astype(np.float64) * 1e300,
            f"unreadable {Q_A}: it holds NaN or infinity",
        ),
        ("adapter_model", Q_A, lambda x: x > 0, f"unreadable {Q_A}: of type bool"),
        ("adapter_model", Q_A, lambda x: x[0], f"mis-shaped {Q_A}"),
        (
            "adapter_model",
            Q_A.replace(".weight", ".default.weight"),
            lambda x: x,
            "is the same tensor of the same layer",
        ),
    ],
)
def test_tensors_that_are_no_numbers(file, name, change, message, folder, base):
    """Breaks when NaN, integers, two copies of a tensor, or a tensor beside the table, get as far
    as a memory.
    """
    path = folder / f"{file}.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[name] = np.ascontiguousarray(
        change(tensors.get(name, tensors[Q_A if file == "adapter_model" else TABLE]))
    )
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(errors.UserError, match=message):
        adapters.load_adapter(folder, base)


def test_spellings_of_names(plain, folder, base):
    """Breaks when tensors that PEFT trained on the inner model (AutoModel), or that carry an
    adapter's name, are not read.
    """
    want = adapters.load_adapter(plain, base).trained
    tensors = safetensors.numpy.load_file(plain / "adapter_model.safetensors")
    for old, new in (
        (PREFIX, "base_model.model."),
        (PREFIX, "model."),
        (".weight", ".default.weight"),
    ):
        renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        safetensors.numpy.save_file(renamed, folder / "adapter_model.safetensors")
        jax.tree.map(
            np.testing.assert_array_equal, adapters.load_adapter(folder, base).trained, want
        )


def test_files_that_are_there_otherwise(folder, base, capsys):
    """Breaks when a pickle is read or passed over without a word, safetensors do not come first, or
    one of two configurations is taken.
    """
    (folder / "adapter_model.bin").write_bytes(b"never read")
    adapters.load_adapter(folder, base)
    assert (
        "adapter_model.safetensors is read, as by peft; adapter_model.bin beside it is not"
        in capsys.readouterr().err
    )
    kept = (folder / "adapter_model.safetensors").rename(folder / "kept")
    with pytest.raises(
        errors.UserError,
        match=r"no such file, and adapter_model\.bin beside it is a pickle, which is never read",
    ):
        adapters.load_adapter(folder, base)
    kept.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    kept.rename(folder / "adapter_model.safetensors")
    with pytest.raises(errors.UserError, match=r"adapter_model\.safetensors: a Git LFS pointer"):
        adapters.load_adapter(folder, base)
    (folder / "encoder").mkdir()
    shutil.copy(folder / "adapter_config.json", folder / "encoder")
    with pytest.raises(
        errors.UserError, match=r"holds adapter_config\.json twice, in itself and in encoder/"
    ):
        adapters.load_adapter(folder, base)
    shutil.copytree(folder, folder / "adapter")
    with pytest.raises(
        errors.UserError,
        match=r"holds icae\.json twice, in itself and in adapter/; name that folder, or move it",
    ):
        adapters.locate(folder)
    (folder / "icae.json").unlink()
    with pytest.raises(
        errors.UserError,
        match=r"has no icae\.json, so it is an ordinary PEFT adapter, without memory tokens",
    ):
        adapters.load_adapter(folder, base)


JUNK = [None, True, "x", "", [], [[]], {"a": None}, float("nan"), -1, 10**400, "(", [1.5]]


def test_nonsense_is_never_a_traceback(folder, base):
    """Breaks when any value of a field of either file raises anything but a UserError."""
    for file in ("adapter_config.json", "icae.json"):
        path = folder / file
        whole = json.loads(path.read_text())
        known = (
            peft_config.COMPUTED | {"use_dora", "task_type"}
            if file == "adapter_config.json"
            else set()
        )
        groups = [
            (whole, sorted({*whole, *known})),
            *((value, sorted(value)) for value in whole.values() if isinstance(value, dict)),
        ]
        for group, names in groups:
            for name in names:
                absent, before = name not in group, group.get(name)
                for junk in JUNK:
                    group[name] = junk
                    path.write_text(json.dumps(whole))
                    with contextlib.suppress(errors.UserError):
                        adapters.load_adapter(folder, base)
                group.pop(name) if absent else group.update({name: before})
        path.write_text(json.dumps(whole))
    adapters.load_adapter(folder, base)
