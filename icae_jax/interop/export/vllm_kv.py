"""Memories as keys and values that vLLM's cache is filled with, through a KV connector.

Head, memory and what the template puts before a question are one run of cache entries, P for each
text. In a prompt P ids stand for it that mean nothing: the connector (`scripts/memory_connector`)
knows them, tells vLLM that they are computed, and writes the entries in their place. vLLM numbers
what follows from P on, so keys are rotated as for transformers (`hf_cache`), whatever the layout.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from icae_jax import files
from icae_jax.compression.memory import Memory
from icae_jax.compression.method import VLLM_KV
from icae_jax.errors import UserError
from icae_jax.interop.export import hf_cache, vllm_requests
from icae_jax.interop.export.reader import OBJECTIVES, Reader
from icae_jax.interop.export.vllm_requests import Requests
from icae_jax.interop.prompts import question_ids

FORMAT_VERSION = 1
CONNECTOR = "memory_connector"
MEMORIES = "memories.json"
LEAST_BITS = 40  # no text begins by chance with ids that tell so much

_USES = """\
python request.py ask [--id ID] [--question Q]    any question
    python request.py restore [--id ID]               the text read back, if that was exported"""

_read = jax.jit(Memory.read, static_argnames="head")


class Written(NamedTuple):
    """How many requests of how many texts were written, the command that serves them, and the
    bytes of all keys and values.
    """

    requests: int
    texts: int
    serve: str
    bytes: int


class Run(NamedTuple):
    """What a prompt begins with, as entries of vLLM's cache at positions 0 … P - 1.

    behind: the ids that follow, around a question. given: how many of them are the answer's first.
    room: how many tokens of prompt and answer fit.
    """

    key: Float[np.ndarray, "L P K H"]
    value: Float[np.ndarray, "L P K H"]
    behind: tuple[int, ...]
    given: int
    room: int


def run_of(memory: Memory, reader: Reader, objective: str) -> Run:
    """The run of one text's memory, by the decoder with its LoRA if it has one.

    A trained token before the question is part of it. So is one that asks for the text back; then
    the text's first token, the likeliest one, is given in `behind`.

    objective: a key of `OBJECTIVES`. UserError if nothing fits behind it, or a prompt would end
    with a trained token, for which vLLM has no id.
    """
    template, trigger = reader.adapter.template, reader.framing.trigger
    before, behind = (template.before, template.after) if objective == "ask" else ((), (trigger,))
    if objective == "restore" and trigger < 0:
        before, behind = (trigger,), ()
    if any(i < 0 for i in behind):
        raise UserError(
            f"template {template.name} of the adapter has a trained token behind the question, for "
            "which vLLM has no id; use `icae export hf_cache`"
        )
    layout = reader.adapter.compression.position_layout
    prefix = jax.device_get(_read(memory, reader.decoder, head=reader.head(objective)))
    start = int(layout.target_starts(OBJECTIVES[objective], prefix.end)[0])
    real, given = np.asarray(prefix.mask)[0], 0
    key, value = (np.asarray(x)[:, :, real] for x in (prefix.k, prefix.v))
    if before:
        logits_V, *kv = _behind(reader.decoder, np.asarray([before], np.int32), start, prefix)
        key, value = (np.concatenate([a, b], 2) for a, b in zip((key, value), kv, strict=True))
        start += len(before)
        if objective == "restore":
            behind, given = (int(np.argmax(logits_V)),), 1
    entries = key.shape[2]
    key = hf_cache.rotate_further(reader.base.config, key, np.asarray([entries - start]))
    room = min(hf_cache.room_behind(reader, start, entries), reader.positions - entries)
    return Run(key[:, 0], value[:, 0], behind, given, room)


@jax.jit
def _behind(decoder, ids_1T, start, prefix):
    """The next token's logits behind ids from position `start` on; K and V of the ids."""
    positions = start + jnp.arange(ids_1T.shape[1])[None]
    x = decoder.embed(ids_1T)
    hidden, (key, value) = decoder.run(x, positions, prefix.visible, return_kv=True)
    return decoder.base.head.logits(hidden[0, -1]), key, value


def meaningless_ids(reader: Reader) -> list[int]:
    """The ids that may stand for a memory, rising: the base's vocabulary without control tokens."""
    tokenizer = reader.base.tokenizer
    control = {*tokenizer.all_special_ids, *reader.base.stop_ids}
    control |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    rows = reader.base.config.vocab_size
    return sorted(i for i in {*tokenizer.get_vocab().values()} - control if i < rows)


def stand_in_ids(digest: bytes, count: int, ids: Sequence[int]) -> list[int]:
    """`count` of some ids, to stand for a run of this digest. UserError if they tell too little."""
    bits = count * math.log2(max(len(ids), 1))
    if bits < LEAST_BITS:
        raise UserError(
            f"{count} ids of {len(ids):,} do not tell a memory from a text ({bits:.0f} bits; "
            f"it takes {LEAST_BITS}); use `icae export hf_cache`, or more memory tokens"
        )
    numbers = np.frombuffer(hashlib.shake_256(digest).digest(8 * count), "<u8")
    return [ids[number % len(ids)] for number in numbers.tolist()]


def save_vllm_kv(
    folder: str | os.PathLike,
    texts: Iterable[tuple[str | int | float, Memory]],
    reader: Reader,
    requests: Requests,
) -> Written:
    """Writes what a vLLM server with a KV connector needs.

    texts: the id of each text, and its memory alone. The folder, new or empty, then holds

        NAME.safetensors     key and value `[L, P, K, H]` of a run, keys rotated to 0 … P - 1
        memories.json        names and ids of the runs, and the sizes of the base
        memory_connector.py  what vLLM loads
        requests.jsonl       one request a line: kind (ask, restore), id, question, memory (its
                             name), before and after (ids around the question), given and
                             given_text (the answer's first ids, which the prompt has already),
                             path, and its JSON body
        request.py           sends one of them
        decoder_lora/        the decoder's LoRA in PEFT's form, if it has one

    UserError if vLLM has no ids for a prompt, or too few stand for a memory.
    """
    files.check_new_folder(folder)
    reader.check_export(VLLM_KV)
    objectives = ["ask", *(["restore"] if requests.restore else [])]
    with files.replacing_folder(folder) as tmp:
        writer = _Writer(tmp, reader, requests)
        for text_id, memory in texts:
            writer.texts += 1
            for objective in objectives:
                writer.add(memory, text_id, objective)
        writer.finish()
        serve = serve_command(reader, requests)
        vllm_requests.save(tmp, writer.lines, requests, serve, _USES)
        shutil.copyfile(vllm_requests.SCRIPTS / f"{CONNECTOR}.py", tmp / f"{CONNECTOR}.py")
        reader.save_decoder_lora(tmp)
    return Written(len(writer.lines), writer.texts, serve, writer.bytes)


def serve_command(reader: Reader, requests: Requests) -> str:
    """The command that serves an export, in the export's folder."""
    connector = {
        "kv_connector": "MemoryConnector",
        "kv_connector_module_path": CONNECTOR,
        "kv_role": "kv_both",
    }
    flags = ["--kv-transfer-config", json.dumps(connector)]
    return f"PYTHONPATH=. {vllm_requests.serve_command(reader, requests, flags)}"


class _Writer:
    """Writes the runs of an export and collects its requests in `lines`."""

    def __init__(self, folder: pathlib.Path, reader: Reader, requests: Requests):
        self.folder, self.reader, self.requests = folder, reader, requests
        self.lines: list[dict] = []
        self.runs: dict[str, list[int]] = {}
        self.texts = self.bytes = 0
        self.ids = meaningless_ids(reader)

    def add(self, memory, text_id, objective):
        """A text's run, and the requests that begin with it."""
        run = run_of(memory, self.reader, objective)
        name, ids = self._write(run)
        about = {"kind": objective, "id": text_id, "memory": name}
        if objective == "restore":
            tokens = int(memory.lengths[0]) + vllm_requests.SPARE_TOKENS
            if not run.given or run.behind[0] not in self.reader.stop_ids("restore"):
                self._add(about | {"question": None}, run, ids, [], tokens - run.given)
            return
        for question in self.requests.questions or [None]:
            asked = [] if question is None else self._ids(question)
            self._add(about | {"question": question}, run, ids, asked, vllm_requests.ANSWER_TOKENS)

    def _ids(self, question):
        template = self.reader.adapter.template
        return question_ids(question, self.reader.base.tokenizer, template)

    def _write(self, run):
        """Writes a run; (its name, the ids that stand for it)."""
        dtype = self.requests.dtype
        tensors = {
            name: hf_cache.stored(x, dtype) for name, x in (("key", run.key), ("value", run.value))
        }
        digest = hashlib.sha256(self.reader.base.fingerprint.encode())
        for x in tensors.values():
            digest.update(x.tobytes())
        name = digest.hexdigest()[:16]
        if name not in self.runs:
            ids = stand_in_ids(digest.digest(), run.key.shape[1], self.ids)
            if ids in self.runs.values():
                raise UserError(
                    f"two memories of {len(ids)} entries have the same ids by chance; export fewer "
                    "texts at once, or use more memory tokens"
                )
            self.runs[name] = ids
            safetensors.numpy.save_file(tensors, self.folder / f"{name}.safetensors")
            self.bytes += sum(x.nbytes for x in tensors.values())
        return name, self.runs[name]

    def _add(self, about, run, ids, asked, tokens):
        behind = [*asked, *run.behind]
        if not behind and about["question"] is not None:
            raise UserError("the question has no tokens, and vLLM must compute one; ask something")
        if len(behind) >= run.room:
            raise UserError(
                f"the question takes {len(behind)} tokens, and {run.room} of question and answer "
                "fit behind the memory; shorten it"
            )
        given = list(run.behind[: run.given])
        text = self.reader.base.tokenizer.decode(given, skip_special_tokens=True)
        around = {"before": ids, "after": list(run.behind), "given": given, "given_text": text}
        fields = {"prompt": [*ids, *behind]}
        limit = min(tokens, run.room - len(behind))
        body = vllm_requests.body(self.reader, self.requests, about["kind"], fields, limit)
        self.lines.append(about | around | {"path": vllm_requests.COMPLETIONS, "body": body})

    def finish(self):
        """Writes the index of the runs."""
        config = self.reader.base.config
        index = {
            "format_version": FORMAT_VERSION,
            "layers": config.num_layers,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "base_fingerprint": self.reader.base.fingerprint,
            "adapter_fingerprint": self.reader.adapter.fingerprint,
            "decoder_lora": self.reader.adapter.has_decoder_lora,
            "memories": [{"name": name, "ids": ids} for name, ids in self.runs.items()],
        }
        files.write_text(self.folder / MEMORIES, json.dumps(index))
