"""From a client's request to what the engine decodes: prompts, memories, sampling, limits."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from icae_jax.compression.decoder import Prefix
from icae_jax.errors import UserError
from icae_jax.inference.compressor import SPARE, Compressor
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.inference.texts import Size
from icae_jax.interop.hub.text import user_ids
from icae_jax.interop.prompts import (
    Turn,
    chat_ids,
    conversation_ids,
    without_memory,
    without_trained,
)
from icae_jax.objectives.targets import Template
from icae_jax.server.failures import ApiError
from icae_jax.server.memories import Kept, Memories
from icae_jax.server.schema import (
    ChatRequest,
    CompletionRequest,
    Message,
    RestoreRequest,
    Sampled,
    TextPart,
)

SEEDS = 1 << 63


class Asked(NamedTuple):
    """One prompt, and what its usage says.

    Attributes:
        requests: one for each of its choices.
        prompt_tokens: what is read before the first new token, memory included.
        memory_tokens: of the memory.
        context_tokens: that the memory stands for.
    """

    requests: list[Request]
    prompt_tokens: int
    memory_tokens: int = 0
    context_tokens: int = 0


class Asker:
    """Makes the engine's requests. Its methods block while texts are compressed.

    Args:
        compressor: what reads memories.
        memories: finds and compresses them.
        max_new_tokens: of an answer where the request does not say.
    """

    def __init__(self, compressor: Compressor, memories: Memories, max_new_tokens: int):
        self.compressor, self.memories = compressor, memories
        self.max_new_tokens = max_new_tokens
        self.template: Template = compressor.adapter.template
        # Without a memory a base is asked in its own chat template, if it has one.
        self.chats = bool(compressor.base.tokenizer.chat_template)

    # --- The three kinds of requests ---

    def chat(self, body: ChatRequest) -> Asked:
        """A chat's next answer."""
        system, turns, question = conversation(body.messages)
        self._check_lengths("messages", system, *turns, question)
        kept = self._memory(body)
        text = self._text(body)
        with self.memories.tokenizing:
            try:
                if kept is None:
                    prompt = self._plain(system, turns, question, body.context, text)
                else:
                    prompt = self._framed(self.template, system, turns, question)
            except UserError as error:
                raise ApiError(400, str(error), "messages", "invalid_value") from error
        prefix = None if kept is None else self.memories.prefix(kept, template=True)
        alternatives = (body.top_logprobs or 0) if body.logprobs else 0
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs: true", "top_logprobs")
        most = body.max_completion_tokens or body.max_tokens
        stop = self.compressor.reader.stop_ids("qa")
        return self._asked(body, prompt, "qa", kept, prefix, most, alternatives, stop)

    def completions(self, body: CompletionRequest) -> list[Asked]:
        """The continuation of each prompt: right behind the memory, in no template."""
        kept = self._memory(body)
        prefix = None if kept is None else self.memories.prefix(kept, template=False)
        asked = []
        for prompt in self._prompts(body.prompt):
            if kept is None:
                prompt = [*self._text(body), *prompt]
            most, stop = body.max_tokens, self.compressor.reader.stop_ids("lm")
            alternatives = body.logprobs or 0
            asked.append(self._asked(body, prompt, "lm", kept, prefix, most, alternatives, stop))
        return asked

    def restore(self, memory_id: str, body: RestoreRequest) -> Asked:
        """The text of a memory."""
        kept = self.memories.find(memory_id)
        prefix = self.memories.prefix(kept, template=False)
        trigger, stop = [self.compressor.framing.trigger], self.compressor.reader.stop_ids("ae")
        most = body.max_tokens
        if most is None:
            room = self._room("ae", prefix, 1)
            most = min(kept.context_tokens + SPARE, room)
        request = Sampled(max_tokens=most)
        return self._asked(request, trigger, "ae", kept, prefix, most, 0, stop)

    # --- Their parts ---

    def _framed(self, template, system, turns, question) -> list[int]:
        """A conversation in a template; the system's words stand before the first question."""
        texts = [text for turn in turns for text in turn] + [question]
        texts[0] = "\n\n".join([*system, texts[0]])
        turns = [Turn(q, a) for q, a in zip(texts[:-1:2], texts[1::2], strict=True)]
        return conversation_ids(turns, texts[-1], self.compressor.base.tokenizer, template)

    def _plain(self, system, turns, question, context, context_ids) -> list[int]:
        """What the base alone reads: the context, if there is one, before the first question."""
        tokenizer = self.compressor.base.tokenizer
        if not self.chats:
            template = without_trained(self.template)
            prompt = self._framed(template, system, turns, question)
            return without_memory(template, tokenizer, context_ids, prompt)
        texts = [text for turn in turns for text in turn] + [question]
        if context_ids:
            texts[0] = f"{context}\n{texts[0]}"
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
        if not system:
            return chat_ids(messages, tokenizer)
        words = "\n\n".join(system)
        try:
            return chat_ids([{"role": "system", "content": words}, *messages], tokenizer)
        except UserError:  # of a template that knows no system
            messages[0]["content"] = f"{words}\n\n{messages[0]['content']}"
            return chat_ids(messages, tokenizer)

    def _check_lengths(self, param, *texts) -> None:
        """ApiError 400 if texts are far longer than the base has positions for."""
        positions = self.compressor.base.config.max_position_embeddings
        for text in texts:
            self.memories.check_length("".join(text), positions, param)

    def _memory(self, body: Sampled) -> Kept | None:
        """What is to be read as memory; None for nothing."""
        ids = [body.memory] if isinstance(body.memory, str) else list(body.memory or [])
        size = size_of(body.ratio, body.memory_tokens)
        if body.context is None:
            for name in ("ratio", "memory_tokens"):
                if getattr(body, name) is not None:
                    raise ApiError(400, f"{name} is of a context, and none is given", name)
        if not body.compress:
            if ids:
                message = "compress is false, but memory names memories; give one of the two"
                raise ApiError(400, message, "compress")
            return None
        parts = [self.memories.find(memory_id) for memory_id in ids]
        if body.context is not None:
            parts.append(self.memories.compress(body.context, size, "context")[0])
        return self.memories.together(parts) if parts else None

    def _text(self, body: Sampled) -> list[int]:
        """The ids of a context that is read as it is."""
        if body.compress or body.context is None:
            return []
        return self.memories.context_ids(body.context, "context")

    def _prompts(self, prompt) -> list[list[int]]:
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt[0], int):
            prompt = [prompt]
        tokenizer, base = self.compressor.base.tokenizer, self.compressor.base
        rows = []
        for one in prompt:
            if isinstance(one, str):
                self._check_lengths("prompt", one)
                with self.memories.tokenizing:
                    one = _ids(tokenizer, one, "prompt")
            if not one:
                raise ApiError(400, "prompt has no tokens; give a text to go on from", "prompt")
            if max(one) >= base.config.vocab_size:
                raise ApiError(
                    400,
                    f"prompt holds id {max(one)}; ids of this base are below "
                    f"{base.config.vocab_size}",
                    "prompt",
                )
            rows.append(list(one))
        return rows

    def _room(self, objective: str, prefix: Prefix | None, prompt_tokens: int) -> int:
        """Positions left for new tokens."""
        start = self._start(objective, prefix)
        positions = self.compressor.base.config.max_position_embeddings
        return positions - start - prompt_tokens

    def _start(self, objective: str, prefix: Prefix | None) -> int:
        restarts = self.compressor.config.position_layout.restarts(objective)
        return 0 if prefix is None or restarts else int(prefix.end[0])

    def _asked(self, body, prompt, objective, kept, prefix, most, alternatives, stop) -> Asked:
        room = self._room(objective, prefix, len(prompt))
        if room < (most or 1):
            positions = self.compressor.base.config.max_position_embeddings
            raise ApiError(
                400,
                f"memory and prompt take {positions - room} of the base's {positions} positions, "
                f"so {most or 1} new tokens do not fit; shorten the prompt, or ask for at most "
                f"{max(0, room)}",
                "max_tokens" if most else "messages" if objective == "qa" else "prompt",
                "context_length_exceeded",
            )
        sampling = self._sampling(body, most or min(self.max_new_tokens, room), alternatives)
        request = Request(prompt, sampling, self._start(objective, prefix), prefix, 0, tuple(stop))
        requests = [
            request._replace(
                sampling=dataclasses.replace(sampling, seed=(sampling.seed + i) % SEEDS)
            )
            for i in range(body.n or 1)
        ]
        if kept is None:
            return Asked(requests, len(prompt))
        head = len(self.template.head) if objective == "qa" else 0
        read = head + kept.memory_tokens + len(prompt)
        return Asked(requests, read, kept.memory_tokens, kept.context_tokens)

    def _sampling(self, body: Sampled, most: int, alternatives: int) -> Sampling:
        given = {
            name: getattr(body, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if getattr(body, name) is not None
        }
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or ()
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
        if given.get("top_p") == 0:  # the best token alone
            given |= {"top_p": 1.0, "top_k": 1}
        return Sampling(
            max_new_tokens=most,
            seed=seed,
            stop=tuple(stop),
            alternatives=alternatives,
            past_limit=True,
            **given,
        )


def size_of(ratio: float | None, memory_tokens: int | None) -> Size:
    """The memory that a request asks for. ApiError 400 if it says both."""
    if ratio is not None and memory_tokens is not None:
        raise ApiError(400, "ratio and memory_tokens are given; give one of them", "ratio")
    return Size(tokens=memory_tokens, ratio=ratio)


def conversation(messages: Sequence[Message]) -> tuple[list[str], list[Turn], str]:
    """What the system says, earlier turns, and the question.

    Neighbours of one role are one turn. ApiError 400 unless user and assistant take turns, from a
    user's to a user's.
    """
    system, turns = [], []
    for message in messages:
        text = _content(message.content)
        if message.role in ("system", "developer"):
            system.append(text)
        elif turns and turns[-1][0] == message.role:
            turns[-1] = message.role, f"{turns[-1][1]}\n{text}"
        else:
            turns.append((message.role, text))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise ApiError(400, "messages must begin and end with one of the user", "messages")
    texts = [text for _, text in turns]
    earlier = [Turn(q, a) for q, a in zip(texts[:-1:2], texts[1::2], strict=True)]
    return system, earlier, texts[-1]


def _content(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _ids(tokenizer, text, param):
    try:
        return user_ids(tokenizer, text)
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from error
