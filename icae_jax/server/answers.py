"""From what the engine decoded to OpenAI's responses: whole, and in chunks."""

import functools
import secrets
import time
from collections.abc import Sequence
from typing import Any

from icae_jax.server.asking import Asked
from icae_jax.server.scheduler import Piece

_SPACE = "\u2581"  # how SentencePiece writes one
CHAT, COMPLETION = "chat.completion", "text_completion"


class Tokens:
    """Tokens as texts and bytes, for log-probabilities.

    tokenizer: of the base.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.text = functools.lru_cache(1 << 16)(self._text)
        self.bytes = functools.lru_cache(1 << 16)(self._bytes)

    def _text(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is not None and _SPACE in piece:  # decoded alone it would lose its first space
            return piece.replace(_SPACE, " ")
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def _bytes(self, token: int) -> list[int]:
        """The bytes that a token stands for, which may be a part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is not None and len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece
            return [int(piece[3:5], 16)]
        text = self.text(token)
        if "\ufffd" in text and piece is not None and all(c in _BYTES for c in piece):
            return [_BYTES[c] for c in piece]
        return list(text.encode("utf-8", "replace"))


def _byte_characters() -> dict[str, int]:
    """The byte behind each character of byte-level vocabularies (GPT-2's): printable ones stand for
    themselves, the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


class Answer:
    """What a request of chats or completions is answered with.

    Args:
        kind: CHAT or COMPLETION.
        model: the model's name.
        asked: the prompts; a choice is numbered by prompt and then by choice.
        tokens: for log-probabilities.
        logprobs: whether they are wanted.
    """

    def __init__(
        self, kind: str, model: str, asked: Sequence[Asked], tokens: Tokens, logprobs: bool
    ):
        self.kind, self.model, self.asked = kind, model, asked
        self._tokens, self._logprobs = tokens, logprobs
        choices = sum(len(one.requests) for one in asked)
        self.pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self._characters = [0] * choices  # of the text before the next piece
        prefix = "chatcmpl-" if kind == CHAT else "cmpl-"
        self.id, self.created = prefix + secrets.token_hex(12), int(time.time())

    def add(self, choice: int, piece: Piece) -> None:
        """Takes a piece of a choice."""
        self.pieces[choice].append(piece)

    @property
    def completion_tokens(self) -> int:
        """New tokens of all choices so far."""
        return sum(len(piece.ids) for pieces in self.pieces for piece in pieces)

    def usage(self) -> dict[str, int]:
        """The fields of `schema.Usage`."""
        prompt = sum(one.prompt_tokens for one in self.asked)
        completion = self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "memory_tokens": sum(one.memory_tokens for one in self.asked),
            "context_tokens": sum(one.context_tokens for one in self.asked),
        }

    def whole(self) -> dict[str, Any]:
        """The response, when all has come."""
        choices = [self._choice(i, pieces) for i, pieces in enumerate(self.pieces)]
        return self._head(self.kind) | {"choices": choices, "usage": self.usage()}

    def _choice(self, number, pieces):
        text = "".join(piece.text for piece in pieces)
        choice = {"index": number, "finish_reason": pieces[-1].finish}
        choice["logprobs"] = self._log_probs(number, pieces) if self._logprobs else None
        if self.kind == CHAT:
            return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return choice | {"text": text}

    # --- Chunks ---

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""
        if self.kind != CHAT:
            return []
        return [
            self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}})
            for i in range(len(self.pieces))
        ]

    def chunk(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece; None where it says nothing yet."""
        log_probs = self._logprobs and bool(piece.ids)
        if not piece.text and not log_probs and piece.finish is None:
            return None
        delta = {"content": piece.text} if piece.text or log_probs else {}
        content = {"delta": delta} if self.kind == CHAT else {"text": piece.text}
        found = self._log_probs(choice, [piece]) if log_probs else None
        return self._chunk(
            {"index": choice, **content, "logprobs": found, "finish_reason": piece.finish}
        )

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage."""
        kind = "chat.completion.chunk" if self.kind == CHAT else self.kind
        return self._head(kind) | {"choices": [], "usage": self.usage()}

    def _chunk(self, choice):
        kind = "chat.completion.chunk" if self.kind == CHAT else self.kind
        filled = {"logprobs": None, "finish_reason": None} | choice
        return self._head(kind) | {"choices": [filled]}

    def _head(self, kind):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    # --- Log-probabilities ---

    def _log_probs(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        rows = [
            (token, log_prob, piece.alternatives[i] if piece.alternatives else ([], []))
            for piece in pieces
            for i, (token, log_prob) in enumerate(zip(piece.ids, piece.log_probs, strict=True))
        ]
        if self.kind == CHAT:
            return {"content": [self._chat_row(*row) for row in rows], "refusal": None}
        return self._completion_rows(choice, rows)

    def _token(self, token, log_prob):
        return {
            "token": self._tokens.text(token),
            "logprob": log_prob,
            "bytes": self._tokens.bytes(token),
        }

    def _chat_row(self, token, log_prob, alternatives):
        others = [self._token(*other) for other in zip(*alternatives, strict=True)]
        return self._token(token, log_prob) | {"top_logprobs": others}

    def _completion_rows(self, choice, rows):
        tokens = [self._tokens.text(token) for token, _, _ in rows]
        offsets = []
        for text in tokens:
            offsets.append(self._characters[choice])
            self._characters[choice] += len(text)
        top = [
            {self._tokens.text(token): log_prob for token, log_prob in zip(*others, strict=True)}
            for _, _, others in rows
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [log_prob for _, log_prob, _ in rows],
            "top_logprobs": top,
            "text_offset": offsets,
        }
