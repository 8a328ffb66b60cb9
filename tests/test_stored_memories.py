"""Reading from a store: `ask`, `restore` and `evaluate --store`, and the decoder's stored K/V."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from cli_helpers import sentence
from conftest import TINY, close, random_trained, write_jsonl

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.evaluation import evaluate
from icae_jax.evaluation.suites.common import Options
from icae_jax.inference import loading, store, stored
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.workflows import compress_store
from icae_jax.workflows.compress_store import Request

LENGTHS = (10, 12, 70, 14, 30, 11)  # words of the texts, in segments of 16 tokens
SHORT = [i for i, n in enumerate(LENGTHS) if n < 16]
ASK = ["--question", "who ?", "--question", "where ?", "--max_new_tokens", "4", "--json"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """(folder, what compresses, path of its texts); a store with K/V and a memory file of them.

    The template has a head, so that K/V behind it and behind none differ.
    """
    folder, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(4)
    base = bases.load_base(tiny_base)
    for method in ("icae", "x500"):
        adapter = adapters.Adapter(
            CompressionConfig(method=method, k=4, rate=4),
            LoraConfig(4),
            targets.make_template("mistral", base.tokenizer),
            random_trained(TINY, 4),
            str(tiny_base),
            base.fingerprint,
        )
        adapters.save_adapter(folder / method, adapter)
    rows = [{"id": f"t{i}", "text": sentence(rng, n)} for i, n in enumerate(LENGTHS)]
    source = write_jsonl(folder / "texts.jsonl", rows)
    asked = [
        {"id": f"q{i}", "context": rows[i]["text"], "question": "who ?", "answers": ["the cat"]}
        for i in SHORT
    ]
    write_jsonl(folder / "qa.jsonl", asked)
    argv = ["compress", "--adapter", str(folder / "icae"), "--input", source]
    assert cli.main([*argv, "--store", str(folder / "store"), "--kv", "--batch_size", "2"]) == 0
    assert cli.main([*argv, "--output", str(folder / "m.safetensors")]) == 0
    return folder, loading.load(folder / "icae"), source


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- The decoder's K/V ---


def test_stored_prefixes_are_what_the_decoder_reads(world):
    """Breaks when K/V are of another document, or of a row that fills a batch; when they are behind
    no head, or segments that are padding are kept.
    """
    folder, compressor, _ = world
    head = tuple(compressor.adapter.template.head)
    assert head
    with store.open_store(folder / "store") as opened:
        assert opened.info.kv == "mistral" and len(opened) == len(LENGTHS)
        for entry in opened.find():
            want = jax.device_get(entry.memory.read(compressor.decoder, head))
            for name in ("k", "v"):
                close(getattr(entry.prefix, name), getattr(want, name))
            assert (entry.prefix.positions == want.positions).all()
            assert entry.prefix.end == want.end


def test_stored_prefixes_are_used_where_the_head_agrees(world):
    """Breaks when K/V behind a template's head are read where another one, or none, is wanted."""
    folder, compressor, _ = world

    def read(opened, head):
        return next(stored.batches(opened, ["t2", "t0"], head, []))

    with store.open_store(folder / "store") as opened:
        documents = read(opened, compressor.adapter.template.head)
        found = [document.prefix for document in documents]
        assert [len(prefix.k) for prefix in found] == [TINY.num_layers] * 2
        for head in ((), (1, 2)):
            assert [document.prefix for document in read(opened, head)] == [None, None]
        # They are what is read: of another document, another answer is as likely.
        memory = store.memory_of(opened.get(["t2", "t0"]), compressor.config)
        questions, swapped = [["who ?"]] * 2, found[::-1]
        answers = compressor.ask(memory, questions, 4, details=True)
        stored_answers = stored.ask(compressor, documents, ["who ?"], 4)
        others = compressor.ask(memory, questions, 4, details=True, prefixes=swapped)
        for row, own in enumerate(answers):
            assert stored_answers[row][0].log_prob == pytest.approx(own[0].log_prob, abs=1e-3)
            assert others[row][0].log_prob == pytest.approx(answers[1 - row][0].log_prob, abs=1e-3)
        assert abs(answers[0][0].log_prob - answers[1][0].log_prob) > 0.01


def test_memories_that_are_k_v_have_none(world, tmp_path, monkeypatch):
    """Breaks when `--kv` of a method whose memory is K/V already does anything."""
    folder, _, source = world
    monkeypatch.setattr(loading, "load_base", lambda *a, **b: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match="memory of method x500 is K/V already"):
        compress_store.compress_store(
            Request(source, str(tmp_path / "s"), str(folder / "x500"), kv=True)
        )


# --- ask and restore ---


def test_answers_are_those_from_a_memory_file(world, capsys):
    """Breaks when a document is answered from another's memory, or is not found; or when documents
    that are read together are not those that were named, in their order.
    """
    folder, compressor, _ = world
    assert cli.main(["ask", "--memory", str(folder / "m.safetensors"), *ASK]) == 0
    want = printed(capsys)
    ask = ["ask", "--store", str(folder / "store"), *ASK]
    assert cli.main([*ask, "--id", "t2", "--id", "t0"]) == 0
    by_id = {(row["id"], row["question"]): row["answer"] for row in want}
    some = printed(capsys)
    assert [row["id"] for row in some] == ["t2", "t2", "t0", "t0"]
    assert all(row["answer"] == by_id[row["id"], row["question"]] for row in some)
    assert cli.main(ask) == 0
    assert {(row["id"], row["question"]): row["answer"] for row in printed(capsys)} == by_id

    assert cli.main([*ask, "--id", "t2", "--id", "t0", "--join"]) == 0
    joined = printed(capsys)
    memory, _ = compressor.load_memory(folder / "m.safetensors")
    memory = compressor.join([memory[[2]], memory[[0]]])
    answers = compressor.ask(memory, ["who ?", "where ?"], 4)
    assert [(row["id"], row["answer"]) for row in joined] == [(["t2", "t0"], a) for a in answers]
    assert joined[0]["tokens_read"] == int(memory.tokens[0]) == 4 * 6


def test_restored_texts_are_those_of_a_memory_file(world, capsys):
    """Breaks when `restore` reads stored K/V behind the head of questions, or mixes documents."""
    folder, _, _ = world
    more = ["--max_new_tokens", "5", "--json"]
    assert cli.main(["restore", "--memory", str(folder / "m.safetensors"), *more]) == 0
    want = printed(capsys)
    assert cli.main(["restore", "--store", str(folder / "store"), *more]) == 0
    assert sorted(printed(capsys), key=lambda row: row["id"]) == want
    for source in (["--memory", str(folder / "m.safetensors")], ["--store", str(folder / "store")]):
        assert cli.main(["restore", *source, "--id", "t4", *more]) == 0
        assert printed(capsys) == [want[4]]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--id", "t9"], "has no entry 't9'"),
        (["--join"], "give --store and their --id"),
        (["--adapter", "x500"], "method"),
        (["--memory", "m"], "not allowed with argument"),
        (["--ladder", "1,2"], "a memory has its k"),
    ],
)
def test_what_cannot_be_asked_is_told(world, more, message, capsys):
    """Breaks when an unknown document, another adapter or flags that say nothing pass."""
    folder, _, _ = world
    more = [str(folder / "x500") if argument == "x500" else argument for argument in more]
    try:
        code = cli.main(["ask", "--store", str(folder / "store"), *ASK, *more])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


# --- evaluate ---


def test_a_damaged_document_is_its_own_error(world, tmp_path, capsys):
    """Breaks when one document whose bytes were changed keeps the others from being asked."""
    shutil.copytree(world[0] / "store", tmp_path / "library")
    with store.open_store(tmp_path / "library") as opened:
        first = next(iter(opened.find()))
        names, path = list(opened), next((tmp_path / "library" / "shards").glob("*"))
        at = first.spans["memory"].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    for verb, more in (("ask", ["--question", "who ?"]), ("restore", [])):
        code = cli.main(
            [verb, "--store", str(tmp_path / "library"), "--max_new_tokens", "4", "--json", *more]
        )
        out, err = capsys.readouterr()
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 2 and first.id in err and path.stem in err
        assert [row["id"] for row in rows if "error" not in row] == names[1:]
        assert [row["id"] for row in rows if "error" in row] == [first.id]


@pytest.mark.parametrize("suite, data", [("qa", "qa.jsonl"), ("autoencode", "texts.jsonl")])
def test_scores_from_a_store_are_those_of_compressing(world, suite, data, tmp_path):
    """Breaks when a text is measured behind another's memory, or compressed although it is stored;
    or when bytes are not those on disk.
    """
    folder, compressor, _ = world
    options = Options(max_new_tokens=4, arms=("memory",), batch_size=4, context_lengths=())
    if suite == "autoencode":  # texts of one segment, which compressing takes whole too
        rows = [json.loads(line) for line in (folder / data).read_text().splitlines()]
        source = write_jsonl(tmp_path / "short.jsonl", [rows[i] for i in SHORT])
    else:
        source = str(folder / data)
    request = evaluate.Request(suite, {"a": str(folder / "icae")}, source, options=options)
    want = evaluate.evaluate(dataclasses.replace(request, out=tmp_path / "a")).result
    half = str(tmp_path / "half")
    compress_store.compress_store(
        Request(source, half, str(folder / "icae"), dtype="bfloat16", batch_size=2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(compressor), "compress_ids", lambda *a, **b: pytest.fail("compressed"))
        results = [
            evaluate.evaluate(
                dataclasses.replace(request, adapters={}, store=path, out=tmp_path / name)
            ).result
            for name, path in (("b", str(folder / "store")), ("c", half))
        ]
    for metric, arms in want["scores"].items():
        for result in results:
            bound = 1e-4 if result is results[0] else 0.1
            assert result["scores"][metric]["memory"]["mean"] == pytest.approx(
                arms["memory"]["mean"], rel=bound, abs=bound
            )
    assert [r["store"]["entries"] for r in results] == [len(LENGTHS), len(SHORT)]
    assert results[0]["identity"]["store"] != results[1]["identity"]["store"]
    sizes = [r["sizes"]["memory"]["bytes"] for r in (want, *results)]
    assert sizes[0] == sizes[1] == 2 * sizes[2]


def test_an_evaluation_needs_its_texts_in_the_store(world, tmp_path):
    """Breaks when texts without a memory are compressed or left out silently, or a suite that
    reads parts of texts takes a store.
    """
    folder, _, _ = world
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "t0", "text": "a dog"}] * 2)
    request = evaluate.Request(
        "autoencode", {}, other, store=str(folder / "store"), out=tmp_path / "out"
    )
    with pytest.raises(UserError, match=r"has no memory of text 't0' \(3 tokens, k 4\)"):
        evaluate.evaluate(request)
    for changes, message in (
        ({"suite": "span"}, "which suite span does not read"),
        ({"options": Options(context_lengths=(8,))}, "--context_lengths is"),
        ({"suite": "qa", "options": Options(ladder=(2, 4))}, "--ladder is"),
        ({"store": None}, "--adapter is not given"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(request, **changes)
