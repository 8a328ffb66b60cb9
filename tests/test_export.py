"""`icae export`: the verb's flags, its files, and what it refuses before anything is written."""

import json
import sys

import numpy as np
import pytest
from conftest import TINY, WORDS, random_trained

from icae_jax.cli import compress, export
from icae_jax.compression.config import CompressionConfig
from icae_jax.inference import loading
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.export import vllm_kv
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(3)
TEXTS = [" ".join(RNG.choice(WORDS[8:], size=n)) for n in (20, 5, 9)]


def run(*argv):
    return export.run([str(a) for a in argv])


@pytest.fixture(scope="module", params=["icae", "x500"])
def memory_file(request, tiny_base, tmp_path_factory):
    """A memory file of three texts a, b, c, whose adapter and base it names."""
    folder = tmp_path_factory.mktemp("memory")
    base = bases.load_base(tiny_base)
    compression = CompressionConfig(method=request.param, k=4, rate=4)
    template = targets.make_template("plain", base.tokenizer)
    adapter = adapters.Adapter(
        compression,
        LoraConfig(4, 2.0, 0.0),
        template,
        random_trained(TINY, 4),
        str(tiny_base),
        base.fingerprint,
    )
    adapters.save_adapter(folder / "adapter", adapter)
    compressor = loading.load(folder / "adapter")
    compressor.save(folder / "m.safetensors", compressor.compress(TEXTS), ["a", "b", "c"])
    return folder / "m.safetensors", request.param


def test_prompt_embeds(memory_file, tmp_path, capsys):
    """Breaks when a flag is lost on the way, K/V get through, or a user is not told that a chat is
    framed otherwise than trained.
    """
    path, method = memory_file
    argv = [
        "prompt_embeds",
        "--memory",
        path,
        "--to",
        tmp_path / "out",
        "--question",
        "who ?",
        "--question",
        "why ?",
        "--restore",
    ]
    argv += [
        "--id",
        "c",
        "--id",
        "a",
        "--dtype",
        "float16",
        "--model",
        "tiny",
        "--url",
        "http://example:1",
    ]
    if method == "x500":
        with pytest.raises(
            ValueError, match="has no export prompt_embeds; what it has: `icae export hf_cache`"
        ):
            run(*argv)
        assert not (tmp_path / "out").exists()
        return
    assert run(*argv) == 0
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert "trained with template plain" in printed and "10 requests of 2 texts" in printed
    assert "--dtype float16 --served-model-name tiny --enable-prompt-embeds" in printed
    requests = [
        json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    ]
    want = [
        ("chat", "who ?"),
        ("chat", "why ?"),
        ("ask", "who ?"),
        ("ask", "why ?"),
        ("restore", None),
    ]
    assert [(r["id"], r["kind"], r["question"]) for r in requests] == [
        (name, *rest) for name in "ac" for rest in want
    ]
    assert {r["body"]["model"] for r in requests} == {"tiny"}
    assert torch.load(tmp_path / "out" / "memory-0.pt", weights_only=True).dtype == torch.float16
    assert "http://example:1" in (tmp_path / "out" / "request.py").read_text()


def test_hf_cache(memory_file, tmp_path, capsys):
    """Breaks when a flag is lost: what the cache is for, of which texts, in which dtype."""
    import safetensors

    path, method = memory_file
    assert run("hf_cache", "--memory", path, "--to", tmp_path / "ask") == 0
    assert (
        run(
            "hf_cache",
            "--memory",
            path,
            "--to",
            tmp_path / "out",
            "--for",
            "restore",
            "--id",
            "b",
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    assert "the cache of 1 text, to restore" in capsys.readouterr().out
    for folder, objective, ids, dtype in (
        ("ask", "ask", ["a", "b", "c"], "float32"),
        ("out", "restore", ["b"], "bfloat16"),
    ):
        with safetensors.safe_open(tmp_path / folder / "cache.safetensors", "pt") as f:
            info = {name: json.loads(text) for name, text in f.metadata().items()}
            key = f.get_tensor("key")
        assert (info["objective"], info["ids"], info["dtype"], info["method"]) == (
            objective,
            ids,
            dtype,
            method,
        )
        assert key.dtype == getattr(torch, dtype) and key.shape[1] == len(ids)
        assert (tmp_path / folder / "use_cache.py").exists()


def test_vllm_kv(memory_file, tmp_path, capsys, monkeypatch):
    """Breaks when a flag is lost, a text of a store is not written or is another's, or the command
    that serves the export is not printed.
    """
    monkeypatch.setattr(vllm_kv, "LEAST_BITS", 20)
    path, _ = memory_file
    argv = ["vllm_kv", "--memory", path, "--question", "who ?", "--restore", "--id", "c"]
    assert run(*argv, "--to", tmp_path / "out", "--id", "a", "--url", "http://example:1") == 0
    printed = capsys.readouterr().out
    assert "4 requests of 2 texts" in printed and '"kv_connector": "MemoryConnector"' in printed
    lines = (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    kinds = [(line["id"], line["kind"]) for line in map(json.loads, lines)]
    assert kinds == [("a", "ask"), ("a", "restore"), ("c", "ask"), ("c", "restore")]
    assert "http://example:1" in (tmp_path / "out" / "request.py").read_text()

    texts = "".join(
        json.dumps({"id": name, "text": text}) + "\n"
        for name, text in zip("abc", TEXTS, strict=True)
    )
    (tmp_path / "texts.jsonl").write_text(texts)
    store = tmp_path / "store"
    argv = ["--adapter", path.parent / "adapter", "--input", tmp_path / "texts.jsonl"]
    assert compress.run([str(a) for a in [*argv, "--store", store]]) == 0
    capsys.readouterr()
    argv = ["vllm_kv", "--store", store, "--to", tmp_path / "stored", "--question", "who ?"]
    assert run(*argv, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["texts"], told["requests"]) == (3, 3) and told["bytes"] > 0
    stored = [
        json.loads(line)
        for line in (tmp_path / "stored" / "requests.jsonl").read_text().splitlines()
    ]
    asked = {line["id"]: line for line in map(json.loads, lines) if line["kind"] == "ask"}
    assert {line["id"] for line in stored} == {"a", "b", "c"}
    for line in stored:
        if line["id"] in asked:
            assert len(line["before"]) == len(asked[line["id"]]["before"])
    for wrong in ([], ["--memory", path, "--store", store]):
        with pytest.raises(ValueError, match="give one of --memory, a memory file, and --store"):
            run("vllm_kv", "--to", tmp_path / "new", *wrong)
    assert not (tmp_path / "new").exists()


def test_bad_input_is_named_before_anything_is_written(memory_file, tmp_path, monkeypatch):
    """Breaks when a typing error costs the loading of a model, an older export, or ends in a
    traceback.
    """
    path, _ = memory_file
    for kind in ("prompt_embeds", "hf_cache", "vllm_kv"):
        with pytest.raises(ValueError, match="--id x: the memory holds a, b, c"):
            run(kind, "--memory", path, "--to", tmp_path / "out", "--id", "x")
        with pytest.raises(ValueError, match="no such file; `icae compress` writes"):
            run(kind, "--memory", tmp_path / "absent", "--to", tmp_path / "out")
        monkeypatch.setattr(
            loading, "load_with_memory", lambda *args, **how: pytest.fail("loaded a model first")
        )
        with pytest.raises(ValueError, match="is not an empty folder; give a new one"):
            run(kind, "--memory", path, "--to", path.parent)
        for wrong in (
            [],
            [kind, "--memory", path],
            ["gguf"],
            [kind, "--memory", path, "--to", tmp_path / "out", "--dtype", "int8"],
        ):
            with pytest.raises(SystemExit, match="2"):
                run(*wrong)
        monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="prompt_embeds needs PyTorch: pip install torch"):
        run("prompt_embeds", "--memory", path, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_lists_all_kinds(capsys):
    """Breaks when a kind or a flag has no help."""
    kinds = ("prompt_embeds", "hf_cache", "vllm_kv")
    for argv in (["--help"], *([kind, "--help"] for kind in kinds)):
        with pytest.raises(SystemExit, match="0"):
            run(*argv)
    printed = capsys.readouterr().out
    for word in (
        "prompt_embeds",
        "hf_cache",
        "vllm_kv",
        "--store",
        "--question",
        "--restore",
        "--for",
        "--memory",
        "--adapter",
        "--base",
        "--id",
        "--dtype",
    ):
        assert word in printed


def test_old_names_of_kinds(memory_file, tmp_path, capsys):
    """Breaks when a script that spells a kind with a hyphen fails, or is not told the new name."""
    path, _ = memory_file
    assert run("hf-cache", "--memory", path, "--to", tmp_path / "out") == 0
    assert "note: hf-cache is now hf_cache" in capsys.readouterr().err
    assert (tmp_path / "out" / "cache.safetensors").exists()
