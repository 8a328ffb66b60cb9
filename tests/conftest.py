"""What the tests share: the reference data, and a tiny random base in hub format."""

import contextlib
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import socket

# Compiling is most of the tests' time; without optimisation, and in one piece, it takes less than a
# fifth. Read when jax first touches a device, which ends the process at a flag that it does not
# know: the others went with jaxlib 0.11.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

# What one test compiled another need not, nor the next run: the processes that tests start keep
# programs too. Small ones take some KiB.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# PyTorch's threads wait for each other longer than such small models take.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests run in several processes, which must share an accelerator's memory where there is one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import type_checker

type_checker.install()

from icae_jax.runtime import platforms

os.environ.update(platforms.without_absent_tpus())

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from icae_jax.compression import trained
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.models import llama, lora
from icae_jax.objectives import targets
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_num_cpu_devices", 8
)  # not by XLA_FLAGS, which the processes that tests start would take over
EVERY_DEVICE = {name: getattr(jax, name) for name in ("devices", "local_devices")}

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("ICAE_SHARED", ROOT.parent / "shared"))
GOLDEN = pathlib.Path(os.environ.get("ICAE_GOLDEN", SHARED / "golden"))

TINY = llama.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
FRAMING = targets.Framing((1,), targets.AE, 2)  # how an ICAE frames texts with the tokenizer below
WORDS = """
    <unk> <s> </s> [INST] [/INST] Question: Answer: a the cat dog bird fish mouse sat ran ate saw
    on in under over mat tree house red blue green big small old new one two three four five who
    what where why when did does is was and but then so very . , ? ! boy girl king queen milk bread
    sea sky sun
""".split()  # noqa: SIM905
assert len(set(WORDS)) == len(WORDS) == TINY.vocab_size


def head_kernel(params):
    """The output matrix `[D, V]` of a base: its own, or the embedding table transposed."""
    return params["lm_head"] if "lm_head" in params else params["embed"].T


def pytest_collection_modifyitems(items):
    """Files with slow tests first: begun last, one would leave all other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# Tracing makes so many objects that collecting garbage while tests run is a seventh of their time;
# what a file leaves goes when its tests have ended.
gc.disable()


def _keep_for_good():
    """Collects garbage, and sets everything that lives aside, so that the next collection need not
    look through it: late in a run a full one takes a third of a second.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    _keep_for_good()


def pytest_sessionfinish():
    _keep_for_good()  # pytest collects several times when it ends


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled():
    """Every compiled program holds a few memory maps, of which a process may have 65,530 on Linux:
    all tests together make more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if (
        maps.exists() and maps.read_bytes().count(b"\n") > 30_000
    ):  # not sooner: what modules share would be compiled again
        gc.unfreeze()
        jax.clear_caches()
    _keep_for_good()


@contextlib.contextmanager
def seen_devices(count, **backend):
    """Within it JAX shows so many devices only, of the default backend or of `backend`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, every in EVERY_DEVICE.items():
            patch.setattr(
                jax,
                name,
                lambda *args, every=every, **named: every(*args, **backend | named)[:count],
            )
        patch.setattr(jax, "device_count", lambda: len(jax.devices()))
        patch.setattr(jax, "local_device_count", lambda: len(jax.local_devices()))
        yield


@contextlib.contextmanager
def eight_devices():
    """Eight CPU devices, also beside an accelerator."""
    with (
        seen_devices(8, backend="cpu"),
        jax.default_device(None if jax.default_backend() == "cpu" else jax.devices("cpu")[0]),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_device():
    """What says nothing of devices sees one, as on a plain machine."""
    with seen_devices(1):
        yield


def close(got, want, bound=1e-5):
    """Largest difference at most `bound` times the largest wanted value, which must not be zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.abs(want).max() > 0
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


def same(got, want):
    """The same tree of arrays, value for value."""
    jax.tree.map(np.testing.assert_array_equal, got, want)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shared(path):
    """A file of the reference data beside the checkout; the test skips where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {SHARED / path}, which is not here")
    return SHARED / path


def write_jsonl(path, rows):
    """Writes one JSON object a line and returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def edit(path, **fields):
    """Gives a file's JSON object other fields, and makes it where it is not there."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def with_tokenizer(folder, tokenizer):
    """The folder of a base with another tokenizer."""
    tokenizers.save(folder, tokenizer)
    return folder


def training(base, tmp_path, **changes):
    """The configuration of a small training on a base; its last text holds a name."""
    source = write_jsonl(
        tmp_path / "t.jsonl",
        [{"text": "the cat saw the dog " * 4}] * 2 + [{"text": "the <name> saw"}],
    )
    raw = {
        "base": str(base), "batch_size": 2, "compression": {"k": 4, "rate": 4}, "lora": {"rank": 4},
        "data": {"train": source, "context_lengths": [16], "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    return from_dict(TrainConfig, raw | changes)


def random_params(config, seed=0):
    """Random base parameters large enough for every weight to matter (those of `init_params` hardly
    move the logits).
    """
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        noise = rng.standard_normal(like.shape)
        return jnp.asarray(np.float32(1 + 0.1 * noise if path[-1].key == "scale" else 0.2 * noise))

    return jax.tree_util.tree_map_with_path(leaf, llama.param_shapes(config))


def random_lora(config, rank=4, targets=("q_proj", "v_proj"), seed=0):
    """A LoRA tree with A and B both random, as after some training."""
    rng = np.random.default_rng([seed, 1])
    like = jax.eval_shape(
        lambda: lora.init_lora(jax.random.key(0), config, lora.LoraConfig(rank, targets=targets))
    )
    return jax.tree.map(lambda x: jnp.asarray(np.float32(0.2 * rng.standard_normal(x.shape))), like)


def random_trained(config, k, seed=0):
    """The trained tree of a compressor with k memory tokens."""
    table = 0.2 * np.random.default_rng([seed, 2]).standard_normal(
        (k + SPECIAL_ROWS, config.hidden_size)
    )
    return {"lora": random_lora(config, seed=seed), "memory_table": jnp.asarray(np.float32(table))}


def random_trained_of(compression, config=TINY, seed=0):
    """The trained tree of a configuration, all of it random, as after some training."""
    rng = np.random.default_rng([seed, 3])
    like = trained.shapes(config, lora.LoraConfig(4), compression)
    return jax.tree.map(lambda x: jnp.asarray(np.float32(0.2 * rng.standard_normal(x.shape))), like)


def write_adapter(path, base):
    """Writes a random adapter for a loaded base of the `TINY` sizes; returns the path."""
    template = targets.make_template("plain", base.tokenizer)
    identity = {"base_fingerprint": base.fingerprint, "base_identity": base.identity}
    made = (
        CompressionConfig(k=4, rate=4),
        lora.LoraConfig(4, 2.0, 0.0),
        template,
        random_trained(TINY, 4),
        base.path,
    )
    adapters.save_adapter(path, adapters.Adapter(*made, **identity))
    return path


def make_tokenizer(words=WORDS):
    """A word-level tokenizer that sets <s> in front of a text, with a chat template."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_params():
    return random_params(TINY)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tiny_params, tiny_tokenizer):
    """The path of a model-hub folder (float32) with the `TINY` sizes; read it only."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    bases.save_base(folder, TINY, tiny_params, tiny_tokenizer, dtype="float32")
    return folder


@pytest.fixture
def folder(tiny_base, tmp_path):
    """A copy of the tiny base that a test may spoil."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def tensors(folder):
    """Those of `folder`, by their names on the hub."""
    return safetensors.numpy.load_file(folder / "model.safetensors")
