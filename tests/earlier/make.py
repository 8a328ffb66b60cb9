"""Writes the files of this folder, and `expected.json`: what that revision's code reads out of
them.

Run with revision 3641a2d, the last before the package was taken apart: the files show that what
users wrote with it is read alike ever after, so they are never made anew with later code. From a
checkout of that revision, with this folder put into it:

    PYTHONPATH=. python tests/earlier/make.py

Everything is made in a folder of a neutral name, which is gone when the files are read: whoever
reads them is elsewhere, too.
"""

import json
import os
import pathlib
import shutil
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
)  # as the tests' conftest.py
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from earlier import observe
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from icae_jax import cli
from icae_jax.compression.encoder import SPECIAL_ROWS, CompressionConfig
from icae_jax.evaluation import run
from icae_jax.interop import adapter as adapters
from icae_jax.interop import base as bases
from icae_jax.models import llama, lora
from icae_jax.objectives import targets
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.train import PREEMPTED, train

HERE, WORK = pathlib.Path(__file__).resolve().parent, pathlib.Path("/tmp/icae_earlier")
WORDS = """
    <unk> <s> </s> [INST] [/INST] Question: Answer: a the cat dog bird fish mouse sat ran ate saw
    on in under over mat tree house red blue green big small old new one two three four five who
    what where why when did does is was and but then so very . , ? ! boy girl king queen milk bread
    sea sky sun
""".split()  # noqa: SIM905
SIZES = llama.ModelConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=128,
)
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Layout, template, what has LoRA, trigger, ks
ADAPTERS = {
    "servable": ("servable", "plain", ("q_proj", "v_proj"), "", ()),
    "sequential": ("sequential", "mistral", ("q_proj", "v_proj"), "", ()),
    "uniform": ("uniform", "v1", EVERY, "bos", (2, 4)),
    "padded": ("padded", "none", ("v_proj", "down_proj"), "", ()),
    "clean": ("clean", "plain", ("q_proj", "v_proj"), "", (1, 4)),
    "sequential_x500": ("sequential", "chat", ("q_proj", "up_proj"), "trained", ()),
    "uniform_x500": ("uniform", "plain", ("k_proj", "o_proj"), "", ()),
    "reference": ("reference", "none", ("q_proj", "v_proj"), "", ()),
}
SENTENCES = (5, 11, 17, 20)  # words of the documents: one segment or two, of 12 tokens


def tokenizer():
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    return made


def random_params(rng):
    """Large enough for every weight to matter."""

    def leaf(path, like):
        noise = rng.standard_normal(like.shape)
        return jnp.asarray(np.float32(1 + 0.1 * noise if path[-1].key == "scale" else 0.3 * noise))

    return jax.tree_util.tree_map_with_path(leaf, llama.param_shapes(SIZES))


def sentence(rng, words):
    return " ".join(rng.choice(WORDS[7:], size=words))


def write_rows(path, rows):
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(rng):
    write_rows("text.jsonl", [{"text": sentence(rng, 46)} for _ in range(6)])
    contexts = [sentence(rng, 11) for _ in range(6)]
    rows = [
        {"context": c, "question": sentence(rng, 4), "answers": [sentence(rng, 2)]}
        for c in contexts
        for _ in range(2)
    ]
    rows.append({"context": contexts[0], "question": "who ?", "answers": []})  # left out, counted
    write_rows("qa.jsonl", rows)
    ids = ["first", "second", "third", "fourth"]
    write_rows(
        "documents.jsonl",
        [{"id": i, "text": sentence(rng, n)} for i, n in zip(ids, SENTENCES, strict=True)],
    )


def write_adapter(name, base, seed):
    layout, template, named, trigger, ks = ADAPTERS[name]
    rng = np.random.default_rng([seed, 7])
    compression = CompressionConfig(
        "x500" if name in observe.LAYOUTS["x500"] else "icae", 4, 3.0, ks, layout, trigger=trigger
    )
    config = lora.LoraConfig(2, 2.0, 0.05, named)
    like = jax.eval_shape(lambda: lora.init_lora(jax.random.key(0), SIZES, config))
    tree = jax.tree.map(lambda x: jnp.asarray(np.float32(0.3 * rng.standard_normal(x.shape))), like)
    table = jnp.asarray(
        np.float32(0.3 * rng.standard_normal((4 + SPECIAL_ROWS, SIZES.hidden_size)))
    )
    made = targets.make_template(template, base.tokenizer)
    identity = {"base_fingerprint": base.fingerprint, "base_identity": base.identity}
    trained = {"lora": tree, "memory_table": table}
    adapters.save_adapter(
        f"adapters/{name}", adapters.Adapter(compression, config, made, trained, "base", **identity)
    )


def interrupt(step):
    """A watcher of a training that has SIGTERM come at a step."""
    return lambda at, _: os.kill(os.getpid(), signal.SIGTERM) if at == step else None


def write_files():
    rng = np.random.default_rng(0)
    bases.save_base("base", SIZES, random_params(rng), tokenizer(), dtype="float32")
    write_data(rng)
    observe.icae("convert", "base", "--from", "base", "--to", "base_orbax", "--format", "orbax")
    base = bases.load_base("base", jnp.float32)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(name, base, seed)

    convert = ("convert", "adapter", "--base", "base", "--force", "--from")
    observe.icae(*convert, "adapters/servable", "--to", "adapters/peft", "--format", "peft")
    for name, form in (("sequential", "icae-v1"), ("sequential", "icae-v2"), ("reference", "x500")):
        observe.icae(*convert, f"adapters/{name}", "--to", f"formats/{form}", "--format", form)

    observe.train("icae", "icae")
    observe.train("x500", "x500")
    shutil.rmtree("workdirs/x500/checkpoints/step_3")
    config, workdir = cli.load_config(
        TrainConfig, ["--config", "config.py:finetune", "--workdir", "workdirs/interrupted"]
    )
    assert (
        train(config, CompressorTask(config, workdir=workdir), workdir, watch=interrupt(3))
        == PREEMPTED
    )

    compress = ("compress", "--base", "base", "--input", "documents.jsonl", "--adapter")
    for name in ADAPTERS:
        observe.icae(*compress, f"adapters/{name}", "--output", f"memories/{name}.safetensors")
    observe.icae(
        *compress, "adapters/clean", "--k", "1", "--output", "memories/clean_k1.safetensors"
    )
    observe.icae(*compress, "workdirs/icae", "--output", "memories/trained.safetensors")
    compressor = observe.load("servable")
    first, second, third, fourth = observe.documents()
    joined = compressor.join(
        [compressor.compress([first, second]), compressor.compress([fourth, third])]
    )  # of one segment, of two
    compressor.save("memories/joined.safetensors", joined, ["first and fourth", 23])
    observe.export("hf-cache")

    for name in ("autoencode", "qa"):
        observe.evaluate(name)
    run.Progress.remove = lambda self: None
    observe.evaluate("stopped")
    shutil.copytree("evaluations/stopped", "evaluations/whole")
    for path in pathlib.Path("evaluations/stopped").iterdir():
        if path.name != "progress.0.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    progress = pathlib.Path("evaluations/stopped/progress.0.jsonl")
    progress.write_text(
        "".join(progress.read_text().splitlines(keepends=True)[:3])
    )  # as after a kill behind the first batch of two

    observe.sweep()
    large = [
        f"sweeps/k/*/{name}" for name in ("checkpoints", "adapter")
    ]  # which nothing here reads again
    for pattern in (
        *large,
        "**/tensorboard",
        "**/report.html",
        "**/sweep.png",
        "hf-cache/use_cache.py",
    ):
        for path in pathlib.Path().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def expected():
    found = {"versions": run.versions()}
    found["adapters"] = {
        name: observe.adapter(name)[1] for name in (*ADAPTERS, "peft", "workdirs/icae")
    }
    found["memories"] = {name: observe.kept(name) for name in observe.KEPT}
    found["inspected"] = {path: observe.inspected(path) for path in observe.INSPECTED}
    found["sweep"] = observe.sweep("--table")[0]
    for name in ("report.html", "sweep.png"):
        pathlib.Path("sweeps/k", name).unlink()
    for name in ("autoencode", "qa"):
        found[name] = observe.evaluate(name)[0]
    whole = json.loads(pathlib.Path("evaluations/whole/results.json").read_text())
    found["stopped"] = {name: whole[name] for name in ("scores", "examples")}
    shutil.rmtree("evaluations/whole")
    return found


def resumed():
    """What trainings give that go on from the kept files. They are changed by it."""
    for name in observe.RESUMED:
        observe.resume(name)
    return {name: observe.lines(f"workdirs/{name}") for name in observe.RESUMED}


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    for folder in ("adapters", "formats", "memories", "evaluations"):
        (WORK / folder).mkdir(parents=True)
    shutil.copy(HERE / "config.py", WORK)
    os.chdir(WORK)
    write_files()
    found = expected()
    made = sorted(
        path.name for path in WORK.iterdir() if path.name not in ("config.py", "__pycache__")
    )
    for name in made:
        shutil.rmtree(HERE / name) if (HERE / name).is_dir() else (HERE / name).unlink(
            missing_ok=True
        )
        shutil.copytree(WORK / name, HERE / name) if (WORK / name).is_dir() else shutil.copy(
            WORK / name, HERE / name
        )
    found["resumed"] = resumed()
    parts = [
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in found.items()
    ]
    (HERE / "expected.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
