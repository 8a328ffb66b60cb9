"""Memories as prompt embeddings, for servers such as vLLM.

vLLM's `prompt_embeds` takes the input embeddings of a prompt and numbers their positions
0, 1, 2, …  Slots are such embeddings, if the layout reads them at these positions.
"""

import base64
import io
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from icae_jax import errors, files
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.memory import Slots
from icae_jax.compression.method import PROMPT_EMBEDS
from icae_jax.errors import UserError
from icae_jax.interop.export import chats, vllm_requests
from icae_jax.interop.export.reader import NamedMemory, Reader
from icae_jax.interop.export.vllm_requests import (
    ANSWER_TOKENS,
    CHAT,
    COMPLETIONS,
    SPARE_TOKENS,
    Requests,
)
from icae_jax.interop.prompts import question_ids
from icae_jax.models.families.architectures import computed_by

CHAT_TEMPLATE = "chat.jinja"
_USES = """\
python request.py ask [--id ID] [--question Q]    an exported prompt, exactly as in training
    python request.py restore [--id ID]               the text read back, if that was exported
    python request.py chat [--id ID] --question Q     any question; the server's chat template
                                                      frames memory and question

Completions have long taken prompt embeddings, chats only in newer versions of vLLM."""

_embed = jax.jit(Decoder.embed)


def check_readable(memory: Slots, reader: Reader) -> None:
    """Raises UserError if a server could not read the memory as it was trained to be read.

    It must be at positions 0, 1, 2, …, with the prompt right behind it, and the server must take it
    as what the first block reads. vLLM does so for Gemma 3, whose embeddings it multiplies when it
    looks them up. Granite's it multiplies in all cases, and Gemma 2's in some of its versions.
    """
    config = reader.base.config
    if config.embedding_multiplier != 1 and computed_by(config) != "Gemma3ForCausalLM":
        raise UserError(
            f"the base multiplies embeddings by {config.embedding_multiplier:g}, and vLLM does the "
            "same to prompt embeddings, in all or some of its versions; use `icae export hf_cache`"
        )
    mask = np.asarray(memory.mask)
    misplaced = mask & (np.asarray(memory.positions) != mask.cumsum(1) - 1)
    compression = reader.adapter.compression
    restarts = compression.position_layout.ae_restarts
    if restarts or misplaced.any() or (np.asarray(memory.end) != mask.sum(1)).any():
        raise UserError(
            f"compression.layout of the adapter is {compression.layout}, whose memory is not read "
            "at positions 0, 1, 2, … as a server numbers prompt embeddings; train with layout "
            "servable, or use `icae export hf_cache`"
        )


def slots_of(memory: Slots, row: int) -> Float[np.ndarray, "M D"]:
    """The slots of one text, without padding."""
    return np.asarray(memory.slots[row])[np.asarray(memory.mask[row])]


def prompt_embeddings(
    reader: Reader, slots_MD: Float[np.ndarray, "M D"], question: str | None = None
) -> Float[np.ndarray, "T D"]:
    """The input embeddings of a whole prompt, for positions 0 … T - 1.

    With a question: the template's head, slots, and the question in the template. Without: slots
    and trigger. UserError if the base has too few positions.
    """
    template, tokenizer = reader.adapter.template, reader.base.tokenizer
    head, behind = reader.head("restore"), [reader.framing.trigger]
    if question is not None:
        head = reader.head("ask")
        behind = template.prompt(question_ids(question, tokenizer, template))

    def embed(ids):
        return np.asarray(_embed(reader.decoder, np.asarray(ids, np.int32)), np.float32)

    x_TD = np.concatenate([embed(head), np.asarray(slots_MD, np.float32), embed(behind)])
    if len(x_TD) >= reader.positions:
        raise UserError(
            f"the prompt of memory and question takes {len(x_TD)} positions, the base has "
            f"{reader.positions}; shorten one of them"
        )
    return x_TD


def pt_bytes(x_TD: Float[np.ndarray, "T D"], dtype: str) -> bytes:
    """What `torch.save` writes for a tensor; vLLM loads it with weights_only=True."""
    torch = errors.need_torch("prompt_embeds")
    tensor = torch.from_numpy(np.ascontiguousarray(x_TD, np.float32))
    buffer = io.BytesIO()
    torch.save(tensor.to(getattr(torch, dtype)), buffer)
    return buffer.getvalue()


class Written(NamedTuple):
    """How many requests were written, the command that serves them, and how chats are framed."""

    requests: int
    serve: str
    framing: chats.Framing


def save_prompt_embeds(
    folder: str | os.PathLike, named: NamedMemory, reader: Reader, requests: Requests
) -> Written:
    """Writes what a vLLM server with `--enable-prompt-embeds` needs.

    The folder, new or empty, then holds

        memory-ROW.pt                        slots `[M, D]`, for a content part of a chat
        ask-ROW-QUESTION.pt, restore-ROW.pt  whole prompts `[T, D]`, for completions
        requests.jsonl                       one request a line: kind (chat, ask, restore), id,
                                             question, file, padding (of a chat: what is before a
                                             question), path, and its JSON body
        request.py                           sends one of them
        chat.jinja                           a chat template that frames as trained, if the base has
                                             none and text can spell the adapter's
        decoder_lora/                        the decoder's LoRA in PEFT's form, if it has one; the
                                             server must read with it (it is on projections, so
                                             embeddings are the base's)

    UserError if a server could not read the memory (see `check_readable`) or PyTorch is missing.
    """
    files.check_new_folder(folder)
    reader.check_export(PROMPT_EMBEDS)
    check_readable(named.memory, reader)
    framing = chats.framing(reader, requests.questions)
    with files.replacing_folder(folder) as tmp:
        writer = _Writer(tmp, reader, requests, framing.padding)
        for row, text_id in enumerate(named.ids):
            writer.add_text(row, text_id, named.memory)
        if framing.jinja is not None:
            (tmp / CHAT_TEMPLATE).write_text(framing.jinja, encoding="utf-8")
        serve = _serve_command(reader, requests, framing.jinja is not None)
        vllm_requests.save(tmp, writer.lines, requests, serve, _USES)
        reader.save_decoder_lora(tmp)
    return Written(len(writer.lines), serve, framing)


def _serve_command(reader, requests, with_chat_template):
    flags = ["--enable-prompt-embeds", "--chat-template-content-format", "string"]
    if with_chat_template:
        flags += ["--chat-template", CHAT_TEMPLATE]
    if reader.adapter.has_decoder_lora:
        # Otherwise vLLM 0.32 wraps the embedding table too, and fails on CPUs where only some
        # tokens of a step are looked up.
        flags += ["--lora-target-modules", *reader.adapter.lora.targets]
    return vllm_requests.serve_command(reader, requests, flags)


class _Writer:
    """Writes the tensors of an export and collects its requests in `lines`."""

    def __init__(self, folder: pathlib.Path, reader: Reader, requests: Requests, padding: str):
        self.folder, self.reader, self.requests = folder, reader, requests
        self.padding = padding
        self.lines: list[dict] = []

    def add_text(self, row, text_id, memory):
        """The requests about one text: chats, then completions."""
        slots, questions = slots_of(memory, row), self.requests.questions
        self._add_chats(row, text_id, slots)
        prompts = [("ask", f"ask-{row}-{i}.pt", q, ANSWER_TOKENS) for i, q in enumerate(questions)]
        if self.requests.restore:
            length = int(memory.lengths[row]) + SPARE_TOKENS
            prompts.append(("restore", f"restore-{row}.pt", None, length))
        for kind, file, question, tokens in prompts:
            x_TD = prompt_embeddings(self.reader, slots, question)
            fields = {"prompt": None, "prompt_embeds": self._write(file, x_TD)}
            line = {"kind": kind, "id": text_id, "question": question, "file": file}
            room = self.reader.positions - len(x_TD)
            self._add(line, COMPLETIONS, fields, min(tokens, room))

    def _add_chats(self, row, text_id, slots):
        file = f"memory-{row}.pt"
        part = {"type": "prompt_embeds", "data": self._write(file, slots)}
        for question in self.requests.questions or [None]:
            text = []
            if question is not None:
                text = [{"type": "text", "text": self.padding + question}]
            fields = {"messages": [{"role": "user", "content": [part, *text]}]}
            line = {"kind": "chat", "id": text_id, "question": question, "file": file}
            line["padding"] = self.padding
            self._add(line, CHAT, fields, ANSWER_TOKENS)

    def _write(self, name, x_TD):
        """Writes a tensor; returns it in base64."""
        data = pt_bytes(x_TD, self.requests.dtype)
        (self.folder / name).write_bytes(data)
        return base64.b64encode(data).decode("ascii")

    def _add(self, line, path, fields, max_tokens):
        objective = "restore" if line["kind"] == "restore" else "ask"
        body = vllm_requests.body(self.reader, self.requests, objective, fields, max_tokens)
        self.lines.append(line | {"path": path, "body": body})
