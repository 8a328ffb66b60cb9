"""Memories for other programs: prompt embeddings for vLLM, a filled cache for transformers.

vLLM's `prompt_embeds` takes the input embeddings of a prompt and numbers their positions 0, 1, 2, …  ICAE's slots are such embeddings, as
long as the layout reads them at these positions. 500xCompressor's memory is K and V of every layer, which only a cache can hold.

transformers' `generate` takes a filled cache, but numbers the tokens behind it by its m real entries (those with attention mask 1), where
our decoder starts at a position of the layout's own. Rotary attention sees differences of positions alone, so every key is turned by
m - start further positions; then an unpatched `generate` is right for every layout.
"""

import base64
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import icae_jax
from icae_jax import errors, files
from icae_jax.compression import encoder, methods
from icae_jax.compression import layout as layouts
from icae_jax.compression.memory import KV
from icae_jax.errors import UserError
from icae_jax.models import rope

OBJECTIVES = {"ask": "qa", "restore": "ae"}  # what a reader does, and as what it was trained
PROMPT_DTYPES = ("bfloat16", "float32", "float16")  # what vLLM takes; the default first
CACHE_DTYPES = ("float32", "bfloat16")
URL = "http://localhost:8000"
ANSWER_TOKENS = 128  # most tokens of an answer, as `Compressor.ask` has it
FORMAT_VERSION = 1

_read = jax.jit(methods.read, static_argnames=("model", "head"))
_embed = jax.jit(encoder.embed_with_table)


def _head(compressor, objective):
    return tuple(compressor.adapter.template.head) if objective == "ask" else ()


def _base_path(compressor):
    """The base's folder from anywhere on this machine; a bucket's address stays as it is."""
    path = pathlib.Path(compressor.base.path)
    return str(path.resolve()) if path.is_dir() else compressor.base.path


def stop_ids(compressor, objective):
    """Ids that end an answer or a restored text, rising."""
    return sorted(
        {
            *compressor.base.stop_ids,
            *([compressor.adapter.template.stop] if objective == "ask" else []),
        }
    )


# ------------------------------------------------------------------------------------------------------- prompt embeddings


def check_servable(compressor, memory):
    """UserError where the memory is K/V, or is not read at positions 0, 1, 2, … with the prompt right behind it."""
    if isinstance(memory, KV):
        raise UserError(
            "this memory is K and V of every layer (x500), which prompt embeddings cannot carry; use `icae export hf-cache`"
        )
    real = np.asarray(memory.mask)
    wrong = real & (np.asarray(memory.positions) != real.cumsum(1) - 1)
    layout = layouts.get(compressor.config.layout)
    if layout.ae_restarts or wrong.any() or (np.asarray(memory.end) != real.sum(1)).any():
        raise UserError(
            f"compression.layout of the adapter is {layout.name}, whose memory is not read at positions 0, 1, 2, … as a server numbers "
            "prompt embeddings; train with layout servable, or use `icae export hf-cache`"
        )


def slots_of(memory, row):
    """The real slots of one text: `[M, D]` numpy."""
    return np.asarray(memory.slots[row])[np.asarray(memory.mask[row])]


def prompt_embeddings(compressor, memory, row, question=None):
    """The whole prompt of one text: head, slots, and the question in the adapter's template; or slots and trigger, without a question.

    Input embeddings `[T, D]` numpy, for positions 0 … T - 1. UserError where the base has fewer positions.
    """
    template = compressor.adapter.template
    behind = (
        [compressor.framing.trigger]
        if question is None
        else template.prompt(compressor.question_ids(question))
    )
    head = _head(compressor, "restore" if question is None else "ask")

    def embed(ids):
        return np.asarray(
            _embed(
                compressor.base.params,
                compressor.trained["memory_table"],
                np.asarray(ids, np.int32),
            ),
            np.float32,
        )

    x_TD = np.concatenate(
        [embed(head), np.asarray(slots_of(memory, row), np.float32), embed(behind)]
    )
    if len(x_TD) >= compressor.base.config.max_position_embeddings:
        most = compressor.base.config.max_position_embeddings
        raise UserError(
            f"the prompt of memory and question takes {len(x_TD)} positions, the base has {most}; shorten one of them"
        )
    return x_TD


def pt_bytes(x_TD, dtype):
    """What `torch.save` writes of a tensor `[T, D]` in `dtype`; vLLM loads it with weights_only=True."""
    torch = errors.need_torch("prompt-embeds")
    buffer = io.BytesIO()
    torch.save(
        torch.from_numpy(np.ascontiguousarray(x_TD, np.float32)).to(getattr(torch, dtype)), buffer
    )
    return buffer.getvalue()


def save_prompt_embeds(
    folder,
    compressor,
    memory,
    ids,
    questions=(),
    restore=False,
    dtype=PROMPT_DTYPES[0],
    model=None,
    url=URL,
):
    """Writes what a vLLM server with `--enable-prompt-embeds` needs to read ICAE memories; returns the number of requests.

    folder: new or empty. ids: names of the texts. questions: asked of every text. restore: also ask for the texts back. model: the
    name under which the server knows the base, by default the base's path. url: of the server. The folder then holds

        memory-ROW.pt                       the slots `[M, D]`, for a content part of a chat
        ask-ROW-QUESTION.pt, restore-ROW.pt whole prompts `[T, D]`, for completions
        requests.jsonl                      a request a line: kind (chat, ask, restore), id, question, file, path, and its JSON body
        request.py                          sends one of them

    UserError where a server could not read the memory as it was trained (see `check_servable`), or PyTorch is missing.
    """
    files.check_new_folder(folder)
    check_servable(compressor, memory)
    if dtype not in PROMPT_DTYPES:
        raise UserError(f"--dtype is {dtype}; choose from {', '.join(PROMPT_DTYPES)}")
    if len(ids) != len(memory):
        raise UserError(f"{len(ids)} ids for {len(memory)} memories; give one id a text")
    questions = [questions] if isinstance(questions, str) else list(questions)
    model = model or _base_path(compressor)
    most = compressor.base.config.max_position_embeddings
    requests = []
    with files.replacing_folder(folder) as tmp:

        def written(name, x_TD):
            data = pt_bytes(x_TD, dtype)
            (tmp / name).write_bytes(data)
            return base64.b64encode(data).decode("ascii")

        def add(kind, row, question, file, fields, tokens, objective):
            body = {
                "model": model,
                **fields,
                "max_tokens": tokens,
                "temperature": 0.0,
                "stop_token_ids": stop_ids(compressor, objective),
            }
            path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
            requests.append(
                {
                    "kind": kind,
                    "id": ids[row],
                    "question": question,
                    "file": file,
                    "path": path,
                    "body": body,
                }
            )

        for row in range(len(memory)):
            file = f"memory-{row}.pt"
            part = {"type": "prompt_embeds", "data": written(file, slots_of(memory, row))}
            for question in questions or [None]:
                content = [part] if question is None else [part, {"type": "text", "text": question}]
                messages = {"messages": [{"role": "user", "content": content}]}
                add("chat", row, question, file, messages, ANSWER_TOKENS, "ask")
            prompts = [
                ("ask", f"ask-{row}-{i}.pt", q, ANSWER_TOKENS) for i, q in enumerate(questions)
            ]
            if restore:
                prompts.append(
                    ("restore", f"restore-{row}.pt", None, int(memory.lengths[row]) + 16)
                )
            for kind, file, question, tokens in prompts:
                x_TD = prompt_embeddings(compressor, memory, row, question)
                fields = {"prompt": None, "prompt_embeds": written(file, x_TD)}
                add(kind, row, question, file, fields, min(tokens, most - len(x_TD)), kind)
        lines = [json.dumps(request, ensure_ascii=False) + "\n" for request in requests]
        (tmp / "requests.jsonl").write_text("".join(lines), encoding="utf-8")
        (tmp / "request.py").write_text(REQUEST_PY.replace("@URL@", url), encoding="utf-8")
    return len(requests)


REQUEST_PY = '''"""Sends one of the requests in requests.jsonl to a vLLM server. Start the server with

    vllm serve BASE --enable-prompt-embeds --chat-template-content-format string

    python request.py ask [--id ID] [--question Q]       one of the prompts that were exported, exactly as the compressor was trained
    python request.py restore [--id ID]                  the text read back, where that was exported
    python request.py chat [--id ID] --question Q        any question; the server's chat template frames memory and question

--dry_run prints the JSON body and sends nothing. Completions have long taken prompt embeddings, chats only in newer versions of vLLM.
"""

import argparse
import json
import pathlib
import sys
import urllib.error
import urllib.request

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("kind", choices=("ask", "restore", "chat"))
parser.add_argument("--id", help="of the text; by default the first")
parser.add_argument("--question", help="by default the first that was exported")
parser.add_argument("--url", default="@URL@")
parser.add_argument("--model", help="the name under which the server knows the base")
parser.add_argument("--max_tokens", type=int)
parser.add_argument("--dry_run", action="store_true")
args = parser.parse_args()

with open(pathlib.Path(__file__).with_name("requests.jsonl"), encoding="utf-8") as lines:
    requests = [request for request in map(json.loads, lines) if request["kind"] == args.kind]
found = [request for request in requests if args.id in (None, str(request["id"]))]
if args.kind != "chat":  # a prompt holds its question as embeddings, so it must be one of those that were exported
    found = [request for request in found if args.question in (None, request["question"])]
if not found:
    known = "\\n".join(f"  --id {request['id']} --question {request['question']}" for request in requests) or "  none"
    sys.exit(f"request.py: no such request; {args.kind} has\\n{known}")
request, body = found[0], found[0]["body"]
if args.kind == "chat" and args.question is not None:
    body["messages"][0]["content"][1:] = [{"type": "text", "text": args.question}]
if args.kind == "chat" and len(body["messages"][0]["content"]) == 1:
    sys.exit("request.py: chat needs a --question")
body["model"] = args.model or body["model"]
body["max_tokens"] = args.max_tokens or body["max_tokens"]
if args.dry_run:
    print(json.dumps(body, ensure_ascii=False))
    sys.exit()
url = args.url.rstrip("/") + request["path"]
sent = urllib.request.Request(url, json.dumps(body).encode("utf-8"), {"Content-Type": "application/json"})
try:
    with urllib.request.urlopen(sent) as reply:
        choice = json.load(reply)["choices"][0]
except urllib.error.HTTPError as error:
    sys.exit(f"request.py: {url} answered {error.code}: {error.read().decode('utf-8', 'replace')}")
except urllib.error.URLError as error:
    sys.exit(f"request.py: {url} cannot be reached ({error.reason})")
print(choice["message"]["content"] if args.kind == "chat" else choice["text"])
'''


# ---------------------------------------------------------------------------------------------------- transformers' cache


def turn_keys(config, k_LBPKH, turns_B):
    """Keys that RoPE has rotated, moved by `turns_B` further positions, whole numbers, one a text; where it is 0 no bit changes.

    Plain cos and sin of the base's frequencies: what else its RoPE does (YaRN scales them) was done to the keys before.
    """
    freqs = rope.frequencies(config).astype(np.float32)  # as both sides hold them
    angles = np.multiply.outer(np.asarray(turns_B, np.float64), freqs.astype(np.float64))[
        :, None, None
    ]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    k1, k2 = np.split(np.asarray(k_LBPKH, np.float32), 2, axis=-1)
    turned = np.concatenate([k1 * cos - k2 * sin, k2 * cos + k1 * sin], -1).astype(k_LBPKH.dtype)
    return np.where((np.asarray(turns_B) == 0)[:, None, None, None], k_LBPKH, turned)


def filled_cache(compressor, memory, objective="ask"):
    """Head and memory as transformers' `DynamicCache` holds them: (key, value, mask, room), numpy.

    key, value `[L, B, P, K, H]`, K after RoPE and turned so that the next token's position is the number of real entries. mask `[B, P]`
    bool. room: how many tokens of prompt and answer fit behind the longest memory. UserError where none do.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"--for is {objective}; choose from {', '.join(OBJECTIVES)}")
    head, layout = _head(compressor, objective), layouts.get(compressor.config.layout)
    keys, values, masks, starts = [], [], [], []
    for row in range(
        len(memory)
    ):  # one at a time, so that many texts need no more room on the device than one
        prefix = jax.device_get(
            _read(compressor.model, compressor.base.params, memory[[row]], head=head)
        )
        start = np.asarray(layouts.target_starts(layout, OBJECTIVES[objective], prefix))
        keys.append(turn_keys(compressor.base.config, prefix.k, prefix.mask.sum(1) - start))
        values.append(prefix.v)
        masks.append(prefix.mask)
        starts.append(start)
    mask = np.concatenate(masks)
    used = mask.any(0)
    key, value = (np.concatenate(x, 1)[:, :, used] for x in (keys, values))
    # A base that sees only a window of positions counts them by entries of the cache in transformers: right while nothing is cut off.
    start, windows = int(np.max(starts)), [w for w in compressor.base.config.windows if w]
    room = min(
        [
            compressor.base.config.max_position_embeddings - start,
            *[w - max(start, int(used.sum())) for w in windows],
        ]
    )
    if room < 2:
        limit = (
            f"attends to windows of {min(windows)}"
            if windows
            else f"has {compressor.base.config.max_position_embeddings} positions"
        )
        raise UserError(
            f"the memory ends at position {start} and the base {limit}; nothing fits behind it, so export shorter texts"
        )
    return key, value, mask[:, used], room


def save_cache(folder, compressor, memory, ids, objective="ask", dtype=CACHE_DTYPES[0]):
    """Writes memories of either kind as what transformers' unpatched `generate` reads: cache.safetensors and use_cache.py.

    folder: new or empty. ids: names of the texts. objective: "ask" or "restore", which differ in head and positions. cache.safetensors
    holds `key` and `value` `[L, B, K, P, H]` (K after RoPE), `attention_mask [B, P]`, `special [3, D]` (embeddings of the negative ids in
    `before` and `after`), and as metadata, each value JSON: format_version, icae_jax_version, ids, objective, method, layout, before and
    after (ids round a prompt), stop (ids that end an answer), room (most tokens behind the memory), base, base_fingerprint,
    base_identity, adapter_fingerprint, dtype.
    """
    files.check_new_folder(folder)
    if dtype not in CACHE_DTYPES:
        raise UserError(f"--dtype is {dtype}; choose from {', '.join(CACHE_DTYPES)}")
    if len(ids) != len(memory):
        raise UserError(f"{len(ids)} ids for {len(memory)} memories; give one id a text")
    key, value, mask, room = filled_cache(compressor, memory, objective)
    template = compressor.adapter.template
    asked = objective == "ask"
    metadata = {
        "format_version": FORMAT_VERSION,
        "icae_jax_version": icae_jax.__version__,
        "ids": list(ids),
        "objective": objective,
        "method": compressor.config.method,
        "layout": compressor.config.layout,
        "before": list(template.before) if asked else [compressor.framing.trigger],
        "after": list(template.after) if asked else [],
        "stop": stop_ids(compressor, objective),
        "room": room,
        "base": _base_path(compressor),
        "base_fingerprint": compressor.base.fingerprint,
        "base_identity": compressor.base.identity,
        "adapter_fingerprint": compressor.adapter.fingerprint,
        "dtype": dtype,
    }

    def stored(x, dtype=dtype):
        return np.ascontiguousarray(
            np.asarray(x).astype(jnp.dtype(dtype))
        )  # safetensors writes other arrays' bytes in their own order

    tensors = {
        "key": stored(np.moveaxis(key, 2, 3)),
        "value": stored(np.moveaxis(value, 2, 3)),
        "attention_mask": stored(mask, "int32"),
        "special": stored(compressor.trained["memory_table"][-encoder.SPECIAL_ROWS :]),
    }
    texts = {name: json.dumps(x, ensure_ascii=False) for name, x in metadata.items()}
    with files.replacing_folder(folder) as tmp:
        safetensors.numpy.save_file(tensors, tmp / "cache.safetensors", texts)
        (tmp / "use_cache.py").write_text(USE_CACHE_PY, encoding="utf-8")


USE_CACHE_PY = '''"""Reads the memories in cache.safetensors with transformers alone: python use_cache.py BASE ["question" …]"""

import json
import pathlib
import sys

import safetensors
import torch
import transformers

with safetensors.safe_open(pathlib.Path(__file__).with_name("cache.safetensors"), "pt") as file:
    INFO = {name: json.loads(text) for name, text in file.metadata().items()}
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}


def load(model, rows=None):
    """(cache, its mask [rows, P]) of some rows, by default all. `generate` changes the cache it is given: load one for every call."""
    rows = list(range(len(INFO["ids"]))) if rows is None else list(rows)
    key, value = (TENSORS[name][:, rows].to(model.device, model.dtype) for name in ("key", "value"))
    return transformers.DynamicCache(ddp_cache_data=list(zip(key, value))), TENSORS["attention_mask"][rows].to(model.device)


def generate(model, tokenizer, questions, rows=None, max_new_tokens=128):
    """Token ids of the answers, greedily, a question a row; or of the restored texts, each for the question ""."""
    cache, mask = load(model, rows)
    asked = [tokenizer(q, add_special_tokens=False, split_special_tokens=True)["input_ids"] for q in questions]
    prompts = [INFO["before"] + ids + INFO["after"] for ids in asked]
    T = max(map(len, prompts))
    if T >= INFO["room"]:
        raise ValueError(f"a prompt takes {T} tokens, and {INFO['room']} of prompt and answer fit behind the memory")
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    x = model.get_input_embeddings()(ids.clamp(min=0))
    x = torch.where(ids[..., None] < 0, TENSORS["special"].to(x)[ids.clamp(max=-1)], x)  # negative ids: rows of the memory table
    x = torch.nn.functional.pad(x, (0, 0, mask.shape[1], 0))  # a row for every entry of the cache: generate drops as many
    out = model.generate(
        inputs_embeds=x, attention_mask=torch.cat([mask, real], 1), past_key_values=cache, do_sample=False, num_beams=1,
        repetition_penalty=1.0, max_new_tokens=min(max_new_tokens, INFO["room"] - T), eos_token_id=INFO["stop"],
        pad_token_id=INFO["stop"][0],
    )
    ends = [next((i for i, token in enumerate(row) if token in INFO["stop"]), len(row)) for row in out.tolist()]
    return [row[:end] for row, end in zip(out.tolist(), ends)]


if __name__ == "__main__":
    if INFO["objective"] == "ask" and len(sys.argv) < 3:
        sys.exit(__doc__)
    base = sys.argv[1] if len(sys.argv) > 1 else INFO["base"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base)  # as tokenizer.json says, whatever the model's type
    model = transformers.AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, dtype=getattr(torch, INFO["dtype"]))
    for question in sys.argv[2:] or [""]:
        for name, ids in zip(INFO["ids"], generate(model, tokenizer, [question] * len(INFO["ids"]))):
            print(name, tokenizer.decode(ids, skip_special_tokens=True), sep="\\t")
'''
