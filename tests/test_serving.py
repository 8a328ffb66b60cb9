"""Memories for other programs: what vLLM takes as prompt embeddings, what transformers takes as a cache, read by transformers itself."""

import base64
import dataclasses
import http.server
import importlib.util
import io
import json
import runpy
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WORDS, close, random_params, random_trained

import icae_jax
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.method import METHODS
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.export import serving
from icae_jax.interop.hub import base as bases
from icae_jax.models import rope
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(7)
TEXTS = [
    " ".join(RNG.choice(WORDS[8:], size=n)) for n in (30, 5, 17, 40, 9)
]  # of 2, 1, 2, 3 and 1 segments
QUESTIONS = [
    "who saw the cat ?",
    "where ?",
    "what did the old king eat in the house ?",
    "when did it run",
    "why ?",
]
IDS = ["a", "b", "c", "d", "e"]
NEW = 10
MEMORIES = {}  # of (base, method, layout): what a template asks in is none of a memory's business
LAYOUTS = [(method, layout) for method in METHODS for layout in METHODS[method].layouts]


@pytest.fixture(scope="module")
def base(tiny_base):
    return bases.load_base(tiny_base)


@pytest.fixture(scope="module")
def hub_model(tiny_base):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def make(base, method="icae", layout="", template="plain"):
    """(`Compressor` with a random adapter, its memory of TEXTS)."""
    adapter = adapters.Adapter(
        CompressionConfig(method=method, k=4, rate=4, layout=layout),
        LoraConfig(4, 2.0, 0.0),
        targets.make_template(template, base.tokenizer),
        random_trained(TINY, 4),
        str(base.path),
        base.fingerprint,
    )
    compressor = Compressor(base, adapter, "adapter")
    if (base.path, method, layout) not in MEMORIES:
        MEMORIES[base.path, method, layout] = compressor.compress(TEXTS)
    return compressor, MEMORIES[base.path, method, layout]


def ours(compressor, memory, objective, questions=QUESTIONS):
    """What we decode: ids of each text. Not vacuous: nothing is a tie, texts differ, and each is more than one word repeated."""
    done = (
        compressor.ask(memory, questions, NEW, details=True)
        if objective == "ask"
        else compressor.restore(memory, NEW, details=True)
    )
    assert not any(g.ties for g in done)
    ids = [g.ids for g in done]
    assert (
        len({tuple(row) for row in ids}) >= len(ids) - 1
        and len({token for row in ids for token in row}) >= 6
    )
    return ids


# ------------------------------------------------------------------------------------------------------- prompt embeddings


def vllm_reads(data):
    """A tensor as vLLM reads it out of a request."""
    x = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
    assert x.ndim == 2 and x.shape[1] == TINY.hidden_size
    return x


def requests_of(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "template"),
    [
        ("servable", "plain"),
        ("servable", "chat"),
        ("servable", "v1"),
        ("sequential", "mistral"),
        ("padded", "v1"),
    ],
)
def test_prompts_read_by_transformers(base, hub_model, tmp_path, layout, template):
    """Breaks when a prompt misses its head, its special rows, a slot, or holds another text's: another model decodes it, from ids 0 on."""
    compressor, memory = make(base, "icae", layout, template)
    questions, rows = QUESTIONS[:2], [0, 1, 3]  # of 2, 1 and 3 segments
    names = [IDS[i] for i in rows]
    serving.save_prompt_embeds(
        tmp_path / "out",
        compressor,
        memory[rows],
        names,
        questions,
        restore=True,
        dtype="float32",
        model="tiny",
    )
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
        out = hub_model.generate(inputs_embeds=x[None], attention_mask=torch.ones(1, len(x)), do_sample=False, max_new_tokens=NEW,
                                 eos_token_id=stops, pad_token_id=0)[0].tolist()  # fmt: skip
        got[request["id"], request["question"]] = out[
            : next((i for i, token in enumerate(out) if token in stops), NEW)
        ]
    assert got == want and len(got) == 9 and len({tuple(ids) for ids in got.values()}) >= 7


def test_parts_of_a_chat(base, tmp_path):
    """Breaks when a part holds anything but the text's own slots, in the dtype that was asked for, or misses vLLM's field names."""
    compressor, memory = make(base)
    assert (
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS, QUESTIONS[:2]) == 20
    )
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
        assert text == {"type": "text", "text": request["question"]} and request["body"][
            "model"
        ] == str(base.path)
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
    """Breaks when the script that is written does not run alone, picks another request, or sends it to another path."""
    compressor, memory = make(base)
    out = tmp_path / "out"
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.heard = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    serving.save_prompt_embeds(
        out, compressor, memory, IDS, QUESTIONS[:2], restore=True, model="tiny", url=url
    )
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
    """Breaks when prompt embeddings are written that a server would read at other positions than trained, or K/V as if it were slots."""
    compressor, memory = make(base, "icae", "uniform")
    with pytest.raises(
        ValueError, match=r"layout of the adapter is uniform.*train with layout servable"
    ):
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS)
    compressor, memory = make(base, "x500")
    with pytest.raises(ValueError, match="icae export hf-cache"):
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS)
    compressor, memory = make(base)
    with pytest.raises(
        ValueError, match="the prompt of memory and question takes 307 positions, the base has 256"
    ):
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS, ["cat " * 297])
    with pytest.raises(ValueError, match="4 ids for 5 memories"):
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS[1:])
    with pytest.raises(ValueError, match="--dtype is int8; choose from bfloat16"):
        serving.save_prompt_embeds(tmp_path / "out", compressor, memory, IDS, dtype="int8")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").write_text("precious")
    for save in (serving.save_prompt_embeds, serving.save_cache):
        for folder in (tmp_path, tmp_path / "mine.txt"):
            with pytest.raises(ValueError, match="is not an empty folder"):
                save(folder, compressor, memory, IDS)
    assert (tmp_path / "mine.txt").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------- transformers' cache


def script(folder):
    """The module use_cache.py of an export."""
    spec = importlib.util.spec_from_file_location("use_cache", folder / "use_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(base, folder, objective, *how):
    """(use_cache module, what we decode, compressor, memory)."""
    compressor, memory = make(base, *how)
    serving.save_cache(folder, compressor, memory, IDS, objective)
    return script(folder), ours(compressor, memory, objective), compressor, memory


def theirs(used, model, base, objective):
    return used.generate(
        model, base.tokenizer, QUESTIONS if objective == "ask" else [""] * 5, max_new_tokens=NEW
    )


# A template says how to ask, nothing of restoring.
@pytest.mark.parametrize(
    ("objective", "template"),
    [("ask", "plain"), ("ask", "mistral"), ("ask", "v1"), ("restore", "mistral")],
)
@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
def test_unpatched_generate_decodes_what_we_decode(
    base, hub_model, tmp_path, method, layout, template, objective
):
    """Breaks when a key sits at another position than in our decoder, padded segments are seen, or head or special rows are lost."""
    used, want, _, _ = export(base, tmp_path / "out", objective, method, layout, template)
    assert theirs(used, hub_model, base, objective) == want
    # Another text's memory is another answer.
    used.TENSORS["key"], used.TENSORS["value"] = (
        used.TENSORS[name].roll(1, 1) for name in ("key", "value")
    )
    used.TENSORS["attention_mask"] = used.TENSORS["attention_mask"].roll(1, 0)
    wrong = theirs(used, hub_model, base, objective)
    assert sum(a != b for a, b in zip(wrong, want, strict=True)) >= 4


@pytest.mark.parametrize("objective", serving.OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_turn_and_mask_are_needed(base, hub_model, tmp_path, monkeypatch, method, objective):
    """Breaks when the test above could not notice: keys left where they are, or padding seen, must give other texts."""
    used, want, compressor, memory = export(
        base, tmp_path / "out", objective, method, "uniform", "mistral"
    )
    used.TENSORS["attention_mask"] = torch.ones_like(used.TENSORS["attention_mask"])
    unmasked = theirs(used, hub_model, base, objective)
    assert unmasked[3] == want[3]  # of the most segments, so without padding
    assert all(unmasked[i] != want[i] for i in (0, 1, 2, 4))
    monkeypatch.setattr(serving, "turn_keys", lambda config, k, turns: k)
    serving.save_cache(tmp_path / "unturned", compressor, memory, IDS, objective)
    unturned = theirs(script(tmp_path / "unturned"), hub_model, base, objective)
    assert sum(a != b for a, b in zip(unturned, want, strict=True)) >= 4


YARN = rope.YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.3)
FAMILIES = {
    "mistral": {"rope_scaling": YARN, "windows": (70, 70)},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "rope_scaling": rope.LinearScaling(2.0)},
}


# K behind a head holds both what x500 kept and what the base made of the head, as of ICAE's slots.
@pytest.mark.parametrize(
    ("family", "method"), [("mistral", "icae"), ("qwen2", "x500"), ("qwen3", "x500")]
)
def test_every_family(tmp_path, tiny_tokenizer, family, method, monkeypatch):
    """Breaks when K is kept without a family's bias or norm, what RoPE scales is scaled again by the turn, or windows cut off what our
    decoder sees.
    """
    monkeypatch.setattr(
        bases.tokenizers, "read_alike", lambda folder: True
    )  # of that family, whatever its tokenizer
    config = dataclasses.replace(TINY, **FAMILIES[family])
    bases.save_base(
        tmp_path / "base", config, random_params(config), tiny_tokenizer, dtype="float32"
    )
    base = bases.load_base(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    assert base.config == config and model.config.model_type == family
    for objective in serving.OBJECTIVES:
        used, want, _, _ = export(
            base, tmp_path / objective, objective, method, "uniform", "mistral"
        )
        assert theirs(used, model, base, objective) == want


def test_a_cache_serves_many_calls(base, hub_model, tmp_path):
    """Breaks when a call spoils the next one's cache, rows are mixed up, or a prompt of ordinary tokens cannot be given as ids."""
    used, want, compressor, memory = export(base, tmp_path / "out", "ask", "x500", "clean", "plain")
    both = used.generate(hub_model, base.tokenizer, QUESTIONS[:2], rows=[3, 3], max_new_tokens=NEW)
    assert (
        both == [g.ids for g in compressor.ask(memory[3], QUESTIONS[:2], NEW, details=True)]
        and both[0] != both[1]
    )
    assert theirs(used, hub_model, base, "ask") == want == theirs(used, hub_model, base, "ask")
    ids = torch.tensor(
        [
            used.INFO["before"]
            + base.tokenizer(QUESTIONS[1], add_special_tokens=False)["input_ids"]
            + used.INFO["after"]
        ]
    )
    for _ in range(2):
        cache, mask = used.load(hub_model, [1])
        entries = cache.get_seq_length()
        out = hub_model.generate(
            input_ids=ids, attention_mask=torch.cat([mask, torch.ones_like(ids)], 1), past_key_values=cache, do_sample=False,
            max_new_tokens=NEW, pad_token_id=0,
        )  # fmt: skip
        assert (
            out[0, ids.shape[1] :].tolist() == want[1]
            and cache.get_seq_length() > entries == mask.shape[1]
        )


def test_what_is_written(base, hub_model, tmp_path):
    """Breaks when a reader cannot tell whose memory it is, or shapes and dtype are others than documented."""
    used, _, compressor, memory = export(
        base, tmp_path / "out", "ask", "x500", "reference", "mistral"
    )
    P = 2 + int(memory.tokens.max())
    assert (
        used.TENSORS["key"].shape
        == used.TENSORS["value"].shape
        == (TINY.num_layers, 5, TINY.num_kv_heads, P, TINY.head_dim)
    )
    assert used.TENSORS["attention_mask"].sum(1).tolist() == (2 + memory.tokens).tolist()
    close(used.TENSORS["special"].numpy(), compressor.trained["memory_table"][-3:], 0)
    want = {
        "format_version": 1,
        "icae_jax_version": icae_jax.__version__,
        "ids": IDS,
        "objective": "ask",
        "method": "x500",
        "layout": "reference",
        "before": [-1],
        "after": [4],
        "stop": [2],
        "room": 256 - P,
        "base": str(base.path),
        "base_fingerprint": base.fingerprint,
        "base_identity": base.identity,
        "adapter_fingerprint": compressor.adapter.fingerprint,
        "dtype": "float32",
    }
    assert want == used.INFO
    serving.save_cache(tmp_path / "half", compressor, memory[[1]], ["b"], "restore", "bfloat16")
    half = script(tmp_path / "half")
    assert (
        half.INFO["before"] == [1]
        and half.INFO["after"] == []
        and half.TENSORS["key"].dtype == torch.bfloat16
    )
    assert half.TENSORS["key"].shape[3] == 4  # no padding for the texts that were left out, no head
    cache, _ = half.load(hub_model)
    assert cache.layers[0].keys.dtype == torch.float32  # the model's


def test_use_cache_runs_alone(base, tiny_base, tmp_path, capsys, monkeypatch):
    """Breaks when the script does not run from a shell, or prints other texts than we restore."""
    compressor, memory = make(base)
    serving.save_cache(tmp_path / "out", compressor, memory[:2], IDS[:2], "restore")
    monkeypatch.setattr("sys.argv", ["use_cache.py", str(tiny_base)])
    runpy.run_path(str(tmp_path / "out" / "use_cache.py"), run_name="__main__")
    want = compressor.restore(memory[:2], 128)
    assert capsys.readouterr().out.splitlines() == [f"a\t{want[0]}", f"b\t{want[1]}"]


def test_turned_keys_are_keys_rotated_further(base):
    """Breaks when a turn is of other frequencies, goes the other way, scales what was scaled before, or touches keys that stay."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2, 3, 5, 2, 8)).astype(np.float32)
    at, turns = rng.integers(0, 60, (3, 5)), np.array([0, 7, -19])
    yarn = rope.YarnScaling(factor=4.0, original_max_position_embeddings=32, attention_factor=1.3)
    for config in (TINY, dataclasses.replace(TINY, rope_scaling=yarn)):
        rotated = np.asarray(rope.rotate_keys(config, jnp.asarray(k), jnp.asarray(at)))
        turned = serving.turn_keys(config, rotated, turns)
        close(turned, rope.rotate_keys(config, jnp.asarray(k), jnp.asarray(at + turns[:, None])))
        np.testing.assert_array_equal(turned[:, 0], rotated[:, 0])
        assert np.abs(turned[:, 1:] - rotated[:, 1:]).max() > 0.5
    half = rotated.astype(jnp.bfloat16)
    assert serving.turn_keys(TINY, half, turns).dtype == half.dtype


def test_room(base, hub_model, tmp_path):
    """Breaks when more is promised than the base has positions for, or than it sees where it attends to a window."""
    compressor, memory = make(base)
    P = int(memory.tokens.max())
    assert serving.filled_cache(compressor, memory)[3] == 256 - P
    compressor.base = dataclasses.replace(base, config=dataclasses.replace(TINY, windows=(0, 40)))
    assert serving.filled_cache(compressor, memory)[3] == 40 - P
    compressor.base = dataclasses.replace(
        base, config=dataclasses.replace(TINY, windows=(0, P + 1))
    )
    with pytest.raises(ValueError, match=f"attends to windows of {P + 1}; nothing fits"):
        serving.save_cache(tmp_path / "out", compressor, memory, IDS)
    compressor.base = dataclasses.replace(
        base, config=dataclasses.replace(TINY, max_position_embeddings=P + 1)
    )
    with pytest.raises(
        ValueError, match=f"ends at position {P} and the base has {P + 1} positions"
    ):
        serving.save_cache(tmp_path / "out", compressor, memory, IDS)
    compressor.base = base
    with pytest.raises(ValueError, match="--for is score; choose from ask, restore"):
        serving.save_cache(tmp_path / "out", compressor, memory, IDS, "score")
    with pytest.raises(ValueError, match="--dtype is float16; choose from float32, bfloat16"):
        serving.save_cache(tmp_path / "out", compressor, memory, IDS, dtype="float16")
    with pytest.raises(ValueError, match="1 ids for 5 memories"):
        serving.save_cache(tmp_path / "out", compressor, memory, ["a"])
    assert not (tmp_path / "out").exists()
    serving.save_cache(tmp_path / "out", compressor, memory, IDS)
    with pytest.raises(
        ValueError,
        match=f"a prompt takes {256 - P + 1} tokens, and {256 - P} of prompt and answer fit",
    ):
        script(tmp_path / "out").generate(
            hub_model, base.tokenizer, ["cat " * (256 - P - 1)], rows=[3]
        )
