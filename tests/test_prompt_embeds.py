"""Prompt embeddings: what vLLM takes, decoded by transformers instead."""

import base64
import copy
import dataclasses
import http.server
import io
import json
import pathlib
import runpy
import threading

import numpy as np
import pytest
from conftest import TINY
from export_helpers import IDS, NEW, QUESTIONS, make, named, ours, reader_of

from icae_jax.interop.export import hf_cache
from icae_jax.interop.export.prompt_embeds import Requests, save_prompt_embeds
from icae_jax.interop.hub import base as bases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def hub_model(tiny_base):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def vllm_reads(data):
    """A tensor as vLLM reads it out of a request."""
    x = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
    assert x.ndim == 2 and x.shape[1] == TINY.hidden_size
    return x


def requests_of(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "layout", "template", "decoder_lora"),
    [
        ("icae", "servable", "plain", False),
        ("icae", "servable", "chat", False),
        ("icae", "servable", "v1", False),
        ("icae", "servable", "plain", True),
        ("icae", "sequential", "mistral", False),
        ("icae", "padded", "v1", False),
        ("pooled", "servable", "plain", False),
    ],
)
def test_prompts_read_by_transformers(
    base, tiny_base, hub_model, tmp_path, method, layout, template, decoder_lora
):
    """Breaks when a prompt misses its head, its special rows, a slot, or holds another text's, or
    the decoder's LoRA is lost: another model decodes it, from ids 0 on.
    """
    compressor, memory = make(base, method, layout, template, decoder_lora)
    questions, rows = QUESTIONS[:2], [0, 1, 3]  # of 2, 1 and 3 segments
    names = [IDS[i] for i in rows]
    requests = Requests(tuple(questions), restore=True, dtype="float32", model="tiny")
    save_prompt_embeds(
        tmp_path / "out", named(memory[rows], names), reader_of(compressor), requests
    )
    assert (tmp_path / "out" / "decoder_lora").exists() == decoder_lora
    if decoder_lora:
        peft = pytest.importorskip("peft")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        hub_model = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "decoder_lora")
        hub_model = hub_model.get_base_model()
    asked = [ours(compressor, memory, "ask", [q] * 5) for q in questions]
    want = {(IDS[i], q): ids[i] for q, ids in zip(questions, asked, strict=True) for i in rows}
    restored = ours(compressor, memory, "restore")
    want |= {(IDS[i], None): restored[i] for i in rows}
    got = {}
    for request in requests_of(tmp_path / "out"):
        if request["kind"] == "chat":
            continue
        body = request["body"]
        x = vllm_reads(body["prompt_embeds"])
        assert (
            body["prompt"] is None
            and body["model"] == "tiny"
            and body["temperature"] == 0
            and request["path"] == "/v1/completions"
        )
        stops = sorted(
            {base.tokenizer.eos_token_id, compressor.adapter.template.stop}
            if request["kind"] == "ask"
            else base.stop_ids
        )
        assert body["stop_token_ids"] == stops
        torch.testing.assert_close(
            torch.load(tmp_path / "out" / request["file"], weights_only=True), x, rtol=0, atol=0
        )
        out = hub_model.generate(
            inputs_embeds=x[None],
            attention_mask=torch.ones(1, len(x)),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=stops,
            pad_token_id=0,
        )[0].tolist()
        got[request["id"], request["question"]] = out[
            : next((i for i, token in enumerate(out) if token in stops), NEW)
        ]
    assert got == want and len(got) == 9 and len({tuple(ids) for ids in got.values()}) >= 7


def test_a_decoder_lora_is_served(base, tmp_path, capsys, monkeypatch):
    """Breaks when requests name the base, which would read without the LoRA, or nothing says how
    the server gets it.
    """
    compressor, memory = make(base, decoder_lora=True)
    out = tmp_path / "out"
    save_prompt_embeds(out, named(memory), reader_of(compressor), Requests(("why ?",)))
    assert {request["body"]["model"] for request in requests_of(out)} == {"decoder_lora"}
    monkeypatch.setattr("sys.argv", ["request.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(out / "request.py"), run_name="__main__")
    flags = "--enable-lora --max-lora-rank 8 --lora-modules decoder_lora=./decoder_lora"
    assert flags in capsys.readouterr().out
    named_otherwise = Requests(("why ?",), model="mine")
    written = save_prompt_embeds(
        tmp_path / "mine", named(memory), reader_of(compressor), named_otherwise
    )
    assert written.serve.endswith("--lora-modules mine=./decoder_lora")
    assert "--served-model-name" not in written.serve, "else the base takes the name"
    assert "--lora-target-modules q_proj v_proj --enable-lora" in written.serve
    assert {request["body"]["model"] for request in requests_of(tmp_path / "mine")} == {"mine"}


def test_parts_of_a_chat(base, tmp_path):
    """Breaks when a part holds anything but the text's own slots, in the dtype that was asked for,
    or misses vLLM's field names.
    """
    compressor, memory = make(base)
    requests = Requests(tuple(QUESTIONS[:2]), dtype="bfloat16")
    written = save_prompt_embeds(tmp_path / "out", named(memory), reader_of(compressor), requests)
    assert written.requests == 20
    chats = [r for r in requests_of(tmp_path / "out") if r["kind"] == "chat"]
    assert [(r["id"], r["question"]) for r in chats] == [(i, q) for i in IDS for q in QUESTIONS[:2]]
    for request in chats:
        (message,) = request["body"]["messages"]
        part, text = message["content"]
        assert (
            request["path"] == "/v1/chat/completions"
            and message["role"] == "user"
            and part["type"] == "prompt_embeds"
        )
        assert text == {"type": "text", "text": request["question"]}
        assert "model" not in request["body"], "a server answers 404 for a wrong name"
        x = vllm_reads(part["data"])
        row = IDS.index(request["id"])
        assert x.dtype == torch.bfloat16 and len(x) == memory.tokens[row]
        want = torch.tensor(np.asarray(memory.slots[row, : len(x)])).to(torch.bfloat16)
        torch.testing.assert_close(x, want, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.load(tmp_path / "out" / request["file"], weights_only=True), want, rtol=0, atol=0
        )


class Server(http.server.BaseHTTPRequestHandler):
    """Stands for vLLM: keeps what it is sent, answers in the form of either API."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.heard.append((self.path, body))
        choice = (
            {"message": {"content": "from a chat"}}
            if self.path == "/v1/chat/completions"
            else {"text": "completed"}
        )
        known = body["model"] == "tiny"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(
            json.dumps({"choices": [choice]} if known else {"error": "no such model"}).encode()
        )

    def log_message(self, *args):
        pass


def test_request_script(base, tmp_path, capsys, monkeypatch):
    """Breaks when the script that is written does not run alone, picks another request, or sends it
    to another path.
    """
    compressor, memory = make(base)
    out = tmp_path / "out"
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.heard = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    requests = Requests(tuple(QUESTIONS[:2]), restore=True, model="tiny", url=url)
    save_prompt_embeds(out, named(memory), reader_of(compressor), requests)
    lines = requests_of(out)

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["request.py", *argv])
        try:
            runpy.run_path(str(out / "request.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                return str(end.code)
        return capsys.readouterr().out.strip()

    def line(kind, name, question):
        return next(
            r["body"]
            for r in lines
            if (r["kind"], r["id"], r["question"]) == (kind, name, question)
        )

    assert json.loads(run("ask", "--id", "c", "--question", QUESTIONS[1], "--dry_run")) == line(
        "ask", "c", QUESTIONS[1]
    )
    assert json.loads(run("restore", "--dry_run")) == line("restore", "a", None)
    changed = json.loads(run("ask", "--max_tokens", "7", "--model", "other", "--dry_run"))
    assert changed == line("ask", "a", QUESTIONS[0]) | {"max_tokens": 7, "model": "other"}
    chat = json.loads(run("chat", "--id", "b", "--question", "something new ?", "--dry_run"))
    part = line("chat", "b", QUESTIONS[0])["messages"][0]["content"][0]
    assert chat["messages"] == [
        {"role": "user", "content": [part, {"type": "text", "text": "something new ?"}]}
    ]
    assert not server.heard
    assert run("ask", "--id", "d") == "completed" and run("chat", "--id", "d") == "from a chat"
    assert server.heard == [
        ("/v1/completions", line("ask", "d", QUESTIONS[0])),
        ("/v1/chat/completions", line("chat", "d", QUESTIONS[0])),
    ]
    assert "no such request" in run("ask", "--question", "not exported ?") and QUESTIONS[1] in run(
        "ask", "--id", "nobody"
    )
    assert "answered 404" in run("ask", "--model", "other")
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in run("ask")


def test_what_a_server_cannot_read_is_refused(base, tmp_path):
    """Breaks when prompt embeddings are written that a server would read at other positions than
    trained, or K/V pass for slots.
    """

    def save(compressor, memory, ids=IDS, requests=None):
        save_prompt_embeds(
            tmp_path / "out", named(memory, ids), reader_of(compressor), requests or Requests()
        )

    with pytest.raises(
        ValueError, match=r"layout of the adapter is uniform.*train with layout servable"
    ):
        save(*make(base, "icae", "uniform"))
    with pytest.raises(
        ValueError,
        match=r"x500 .* has no export prompt_embeds; what it has: `icae export hf_cache`",
    ):
        save(*make(base, "x500"))
    compressor, memory = make(base)
    with pytest.raises(
        ValueError, match="the prompt of memory and question takes 307 positions, the base has 256"
    ):
        save(compressor, memory, requests=Requests(("cat " * 297,)))
    with pytest.raises(ValueError, match="4 ids for 5 memories"):
        save(compressor, memory, IDS[1:])
    with pytest.raises(ValueError, match="--dtype is int8; choose from float32"):
        Requests(dtype="int8")
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_chat_template_gets_one(base, tmp_path):
    """Breaks when chats of such a base are not served as trained, or the command that is printed
    serves another dtype than that of the tensors, no name, or without the chat template.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = None
    compressor, memory = make(dataclasses.replace(base, tokenizer=tokenizer))
    written = save_prompt_embeds(
        tmp_path / "out", named(memory), reader_of(compressor), Requests(("why ?",))
    )
    jinja = (tmp_path / "out" / "chat.jinja").read_text()
    assert jinja == written.framing.jinja and "Question:" in jinja
    name = pathlib.Path(base.path).name
    assert written.serve == (
        f"vllm serve {base.path} --dtype float32 --served-model-name {name} --enable-prompt-embeds "
        "--chat-template-content-format string --chat-template chat.jinja"
    )
    assert written.serve in (tmp_path / "out" / "request.py").read_text()
    x = torch.load(tmp_path / "out" / "memory-0.pt", weights_only=True)
    assert x.dtype == torch.float32, "other dtypes lose bits by which answers differ"


def test_nothing_is_overwritten(base, tmp_path):
    """Breaks when an export goes into a folder with other files, or in a file's place."""
    compressor, memory = make(base)
    (tmp_path / "mine.txt").write_text("precious")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            save_prompt_embeds(folder, named(memory), reader_of(compressor), Requests())
        with pytest.raises(ValueError, match="is not an empty folder"):
            hf_cache.save_cache(folder, named(memory), reader_of(compressor))
    assert (tmp_path / "mine.txt").read_text() == "precious"
