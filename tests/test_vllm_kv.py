"""Memories of keys and values for vLLM: what is exported, and the connector without vLLM.

`test_vllm.py` asks a real server.
"""

import http.server
import json
import runpy
import shutil
import threading

import numpy as np
import pytest
import vllm_stand_in as stand_in
from conftest import TINY
from export_helpers import IDS, NEW, QUESTIONS, make, ours, reader_of

from icae_jax.interop.export import vllm_kv
from icae_jax.interop.export.vllm_kv import save_vllm_kv
from icae_jax.interop.export.vllm_requests import Requests
from icae_jax.interop.hub import base as bases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = TINY.num_layers, TINY.num_kv_heads, TINY.head_dim
ROWS = [0, 1, 3]  # of 2, 1 and 3 segments


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def hub_model(tiny_base):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture
def few_bits(monkeypatch):
    """The tests' words and memories are few; no text of theirs begins with a memory's ids."""
    monkeypatch.setattr(vllm_kv, "LEAST_BITS", 20)


def texts_of(memory, rows):
    return [(IDS[row], memory[[row]]) for row in rows]


def export(folder, compressor, memory, rows=ROWS, **requests):
    requests = Requests(tuple(requests.pop("questions", QUESTIONS[:2])), **requests)
    return save_vllm_kv(folder, texts_of(memory, rows), reader_of(compressor), requests)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def start(module, role, sizes=SIZES, **config):
    return module.MemoryConnector(*stand_in.config(role, sizes, **config))


def two_sides(module):
    """The connector of a scheduler and that of a worker."""
    return [start(module, role) for role in ("scheduler", "worker")]


def decode(model, layers, blocks, prompt, computed, count, stops):
    """What follows a prompt greedily whose first ids' keys and values are in the layers' blocks."""
    pairs = [layer.read(blocks, computed) for layer in layers]
    cache = transformers.DynamicCache(ddp_cache_data=[(k[None], v[None]) for k, v in pairs])
    ids, answer = prompt[computed:], []
    for _ in range(count):
        position = torch.arange(cache.get_seq_length(), cache.get_seq_length() + len(ids))
        logits = model(
            input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=position[None]
        ).logits
        ids = [int(logits[0, -1].argmax())]
        if ids[0] in stops:
            break
        answer += ids
    return answer


@pytest.mark.parametrize(
    ("method", "layout", "template", "decoder_lora"),
    [
        ("x500", "", "plain", False),
        ("x500", "uniform", "mistral", False),
        ("x500", "reference", "chat", False),
        ("x500", "clean", "none", True),
        ("sac", "", "plain", False),
        ("icae", "uniform", "chat", False),
        ("icae", "servable", "mistral", False),
        ("pooled", "", "plain", True),
    ],
)
def test_a_paged_cache_is_filled_so_that_answers_are_ours(
    base,
    tiny_base,
    hub_model,
    tmp_path,
    monkeypatch,
    few_bits,
    method,
    layout,
    template,
    decoder_lora,
):
    """Breaks when keys are rotated to other positions than a server counts, a token of head, memory
    or template is lost, a block, an offset or a layer is taken for another, or text comes back with
    its first word lost: another model decodes what the connector wrote.
    """
    compressor, memory = make(base, method, layout, template, decoder_lora)
    questions = QUESTIONS[:2]
    out = tmp_path / "out"
    written = export(out, compressor, memory, restore=True)
    assert written.texts == 3 and written.requests == 9 == len(lines_of(out))
    if decoder_lora:
        peft = pytest.importorskip("peft")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        hub_model = peft.PeftModel.from_pretrained(plain, out / "decoder_lora").get_base_model()
    asked = [ours(compressor, memory, "ask", [q] * 5) for q in questions]
    want = {(IDS[i], q): ids[i] for q, ids in zip(questions, asked, strict=True) for i in ROWS}
    restored = ours(compressor, memory, "restore")
    want |= {(IDS[i], None): restored[i] for i in ROWS}

    scheduler, worker = two_sides(stand_in.load_connector(out, monkeypatch))
    layers = [stand_in.Layer(*SIZES[1:]) for _ in range(SIZES[0])]
    got, free = {}, iter(np.random.default_rng(3).permutation(64).tolist())
    for line in lines_of(out):
        body = line["body"]
        prompt, lora = body["prompt"], object() if decoder_lora else None
        assert prompt[: len(line["before"])] == line["before"]
        blocks = [next(free) for _ in range(-(-len(prompt) // 4))]
        request = stand_in.request(prompt, lora=lora)
        matched = stand_in.step(scheduler, worker, [(request, blocks)], layers)["r"]
        assert matched == len(line["before"]) < len(prompt)
        answer = decode(
            hub_model,
            layers,
            blocks,
            prompt,
            matched,
            NEW - len(line["given"]),
            body["stop_token_ids"],
        )
        got[line["id"], line["question"]] = [*line["given"], *answer]
        assert scheduler.request_finished(request, blocks) == (False, {"memory": line["memory"]})
        free = iter([*free, *blocks])
    assert got == want and len({tuple(ids) for ids in got.values()}) >= 7


@pytest.fixture
def exported(base, tmp_path, few_bits):
    """(a folder with an export of an x500 memory, its requests to ask by the text's id)."""
    compressor, memory = make(base, "x500")
    export(tmp_path / "out", compressor, memory, range(5), questions=QUESTIONS[:1])
    return tmp_path / "out", {line["id"]: line for line in lines_of(tmp_path / "out")}


def test_what_is_computed_already_is_not_loaded(exported, monkeypatch):
    """Breaks when tokens that the prefix cache has are written again, into blocks that others
    share, or the rest comes from the memory's start.
    """
    folder, lines = exported
    scheduler, worker = two_sides(stand_in.load_connector(folder, monkeypatch))
    prompt, size = lines["d"]["body"]["prompt"], len(lines["d"]["before"])
    whole, rest = ([stand_in.Layer(*SIZES[1:]) for _ in range(2)] for _ in range(2))
    blocks = [7, 3, 9, 1, 5]
    for layers, computed in ((whole, 0), (rest, 8)):
        requests = [(stand_in.request(prompt), blocks)]
        matched = stand_in.step(scheduler, worker, requests, layers, computed)
        assert matched == {"r": size - computed}
    for one, other in zip(whole, rest, strict=True):
        assert torch.isnan(other.read(blocks, 8)).all()
        assert torch.equal(one.read(blocks, size)[:, :, 8:], other.read(blocks, size)[:, :, 8:])
        assert torch.isnan(one.read(blocks, 20)[:, :, size:]).all(), "what follows is the server's"
    requests = [(stand_in.request(prompt), blocks)]
    assert stand_in.step(scheduler, worker, requests, [], 16) == {"r": 0}
    assert not worker.metadata.loads
    assert scheduler.request_finished(requests[0][0], [])[1], "the prefix cache has the memory"


def test_prompts_without_a_memory_are_left_alone(exported, monkeypatch):
    """Breaks when a text, or another memory's beginning, is taken for a memory, when nothing is
    left to compute, or a reply says that a memory was read that was not.
    """
    folder, lines = exported
    scheduler, _ = two_sides(stand_in.load_connector(folder, monkeypatch))
    run = lines["a"]["before"]
    for prompt in (None, [], [5], run, run[:-1] + [run[-1] + 1, 5, 6], [5, *run, 6]):
        request = stand_in.request(prompt)
        assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        assert scheduler.request_finished(request, []) == (False, None)
    skips = stand_in.request([*run, 5], skip=True)
    assert scheduler.get_num_new_matched_tokens(skips, 0) == (0, False)
    assert scheduler.request_finished(skips, []) == (False, None)
    assert scheduler.get_num_new_matched_tokens(stand_in.request([*run, 5]), 0)[0] == len(run)


def test_a_run_that_begins_like_another_is_told_apart(exported, monkeypatch):
    """Breaks when the shorter of two runs is taken where a prompt holds the longer one."""
    folder, lines = exported
    index = json.loads((folder / "memories.json").read_text())
    short = lines["b"]["before"]
    long = index["memories"][0]
    long["ids"] = [*short, *long["ids"]]
    (folder / "memories.json").write_text(json.dumps(index))
    memories = stand_in.load_connector(folder, monkeypatch).Memories(folder)
    assert memories.find([*long["ids"], 9]) == long["name"]
    assert memories.find([*short, 9]) == lines["b"]["memory"] != long["name"]


def test_a_memory_that_cannot_be_read_fails_its_request_alone(exported, monkeypatch):
    """Breaks when a damaged file ends the engine, fails other requests, or passes unseen."""
    folder, lines = exported
    (folder / f"{lines['a']['memory']}.safetensors").write_bytes(b"nonsense")
    (folder / f"{lines['c']['memory']}.safetensors").unlink()
    scheduler, worker = two_sides(stand_in.load_connector(folder, monkeypatch))
    layers = [stand_in.Layer(*SIZES[1:]) for _ in range(2)]
    blocks = {name: list(range(8 * i, 8 * i + 8)) for i, name in enumerate("acd")}
    requests = [
        (stand_in.request(lines[name]["body"]["prompt"], name), blocks[name]) for name in "acd"
    ]
    stand_in.step(scheduler, worker, requests, layers)
    sizes = {name: -(-len(lines[name]["before"]) // 4) for name in "ac"}
    failed = {block for name, size in sizes.items() for block in blocks[name][:size]}
    assert worker.get_block_ids_with_load_errors() == failed
    assert worker.get_block_ids_with_load_errors() == set()
    size = len(lines["d"]["before"])
    assert not torch.isnan(layers[1].read(blocks["d"], size)).any()


@pytest.mark.parametrize(("total", "ranks"), [(4, 1), (4, 2), (4, 4), (2, 4)])
def test_heads_of_tensor_parallel_workers(exported, monkeypatch, total, ranks):
    """Breaks when a worker takes another's heads."""
    here = max(total // ranks, 1)
    taken = []
    for rank in range(ranks):
        module = stand_in.load_connector(exported[0], monkeypatch, rank, ranks)
        taken += list(range(total))[module.own_heads(total, here)]
    assert taken == sorted([*range(total)] * (ranks * here // total))


def test_another_server_is_refused_at_its_start(exported, monkeypatch, tmp_path):
    """Breaks when memories of another base, format or kind of cache give wrong answers instead."""
    folder = exported[0]
    module = stand_in.load_connector(folder, monkeypatch)

    with pytest.raises(ValueError, match=r"memories are of a base of .*\(2, 2, 8\).*\(2, 4, 8\)"):
        start(module, 1, (2, 4, 8))
    with pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"):
        start(module, 1, groups=2)
    with pytest.raises(ValueError, match="kv_load_failure_policy is fail"):
        start(module, 1, policy="recompute")
    assert start(module, 1, folder=folder).memories.shortest == 5
    shutil.copytree(folder, tmp_path / "newer")
    index = json.loads((folder / "memories.json").read_text())
    (tmp_path / "newer" / "memories.json").write_text(json.dumps(index | {"format_version": 2}))
    with pytest.raises(ValueError, match="has format 2, and this connector reads 1"):
        start(module, 1, folder=tmp_path / "newer")


def test_a_decoder_lora_must_be_named(base, tmp_path, monkeypatch, few_bits):
    """Breaks when the base alone reads a memory that was written for a decoder with a LoRA."""
    compressor, memory = make(base, "x500", decoder_lora=True)
    written = export(tmp_path / "out", compressor, memory)
    assert "decoder_lora=./decoder_lora" in written.serve
    scheduler, _ = two_sides(stand_in.load_connector(tmp_path / "out", monkeypatch))
    body = lines_of(tmp_path / "out")[0]["body"]
    assert body["model"] == "decoder_lora"
    request = stand_in.request(body["prompt"])
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.request_finished(request, []) == (False, None)
    request = stand_in.request(body["prompt"], lora=object())
    assert scheduler.get_num_new_matched_tokens(request, 0)[0] > 0


def test_ids_stand_for_what_they_were_drawn_for(base, tmp_path, few_bits):
    """Breaks when two memories, or two ways of reading one, have the same ids, when they differ
    from one export to the next, or are control tokens.
    """
    compressor, memory = make(base, "x500")
    for name in ("one", "two"):
        export(tmp_path / name, compressor, memory, range(5), restore=True)
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    runs = {line["memory"]: tuple(line["before"]) for line in one}
    assert len(runs) == len(set(runs.values())) == 10
    control = {
        base.tokenizer.bos_token_id,
        base.tokenizer.eos_token_id,
        base.tokenizer.unk_token_id,
    }
    assert not control & {i for ids in runs.values() for i in ids}
    export(tmp_path / "half", compressor, memory, range(5), restore=True, dtype="bfloat16")
    assert not set(runs) & {line["memory"] for line in lines_of(tmp_path / "half")}


def test_what_cannot_be_served_is_refused(base, tmp_path, few_bits, monkeypatch):
    """Breaks when a prompt is written whose last token has no id, that does not fit, or that a text
    could begin with.
    """
    out = tmp_path / "out"
    compressor, memory = make(base, "x500", template="v1")
    with pytest.raises(ValueError, match=r"template v1 .* has a trained token behind the question"):
        export(out, compressor, memory)
    compressor, memory = make(base, "x500")
    with pytest.raises(ValueError, match=r"the question takes 298 tokens, and .* fit behind"):
        export(out, compressor, memory, questions=("cat " * 297,))
    monkeypatch.setattr(vllm_kv, "LEAST_BITS", 40)
    with pytest.raises(ValueError, match=r"5 ids of 61 do not tell a memory .* \(30 bits; .* 40"):
        export(out, compressor, memory, [1])
    assert not out.exists()
    export(out, compressor, memory, [3])  # 13 ids


class Server(http.server.BaseHTTPRequestHandler):
    """Stands for vLLM: knows a memory by its name, spells a question with one id for each word."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append((self.path, body))
        if self.path == "/tokenize":
            reply = {"tokens": [40] * len(body["prompt"].split())}
        else:
            choice = {"text": "the answer"}
            reply = {"choices": [choice], "kv_transfer_params": self.server.params}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


def test_request_script(base, tmp_path, capsys, monkeypatch, few_bits):
    """Breaks when the script asks another memory, puts a new question elsewhere, loses the first
    word of a text, or takes an answer for the memory's that a server gave without it.
    """
    compressor, memory = make(base, "icae")
    out = tmp_path / "out"
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.heard = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    export(out, compressor, memory, questions=QUESTIONS[:1], restore=True, url=url)
    lines = {(line["id"], line["kind"]): line for line in lines_of(out)}

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["request.py", *argv])
        try:
            runpy.run_path(str(out / "request.py"), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out.strip()

    ask, restore = lines["d", "ask"], lines["d", "restore"]
    server.params = {"memory": ask["memory"]}
    assert run("ask", "--id", "d") == "the answer"
    assert server.heard == [("/v1/completions", ask["body"])]
    assert run("ask", "--id", "d", "--question", "a new one ?") == "the answer"
    assert server.heard[1] == ("/tokenize", {"prompt": "a new one ?", "add_special_tokens": False})
    prompt = [*ask["before"], 40, 40, 40, 40, *ask["after"]]
    assert server.heard[2] == ("/v1/completions", ask["body"] | {"prompt": prompt})
    server.params = {"memory": restore["memory"]}
    assert len(restore["given"]) == 1 and restore["after"] == restore["given"]
    assert run("restore", "--id", "d") == f"{restore['given_text']}the answer"
    assert server.heard[3] == ("/v1/completions", restore["body"])
    for server.params in (None, {"memory": "another"}):
        assert "the server did not read the memory" in run("ask", "--id", "d")
    assert "no such request" in run("ask", "--id", "nobody")
    server.shutdown()
    server.server_close()
