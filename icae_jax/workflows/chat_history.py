"""Which turns of a long conversation a chat reads in full, which from memory, and which no more."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from icae_jax.compression.segments import position_budget, segment_shape
from icae_jax.errors import UserError
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.prompts import Turn, conversation_ids, without_memory, without_trained

ANSWER_SHARE = 4  # an answer may have a quarter of what is left behind the documents, at least
MEMORY_SHARE = 2  # the memory of older turns takes half of it at most
SLACK = 2  # turns are compressed until half of their room is free, not one at each question


class Split(NamedTuple):
    """Where the turns of a conversation are.

    forgotten: the first so many are nowhere. compressed: those from there up to this number are in
    memory; the others are read in full.
    """

    forgotten: int = 0
    compressed: int = 0


START = Split()


class Plan(NamedTuple):
    """How a question is asked.

    split: of the turns before it. start: the position of the prompt's first id, behind all memory;
    0 without one. prompt: the ids of turns in full and question. most: tokens that its answer may
    have.
    """

    split: Split
    start: int
    prompt: list[int]
    most: int


def transcript(turns: Sequence[Turn]) -> str:
    """Turns as the text that is compressed: each question and each answer on lines of its own."""
    return "".join(f"{turn.question}\n{turn.answer}\n" for turn in turns)


@dataclasses.dataclass(frozen=True)
class Window:
    """The positions of a base, and how a conversation is fitted into them.

    Attributes:
      compressor: what compresses and reads.
      documents: context tokens of each segment of the documents' memory; none without documents.
      k: memory tokens per segment.
      most: tokens that an answer has at most.
      history_tokens: tokens of turns in full at most; None: as many as fit.
    """

    compressor: Compressor
    documents: Sequence[int]
    k: int
    most: int
    history_tokens: int | None = None

    @property
    def positions(self) -> int:
        """Those of the base."""
        return self.compressor.base.config.max_position_embeddings

    def segments(self, turns: Sequence[Turn]) -> list[int]:
        """Context tokens of each segment that older turns are compressed into."""
        tokens = len(self.compressor.ids(transcript(turns))) if turns else 0
        if not tokens:
            return []
        tokens += len(self.compressor.framing.start)
        count, size = segment_shape(tokens, self.compressor.config)
        return [min(size, tokens - first) for first in range(0, count * size, size)]

    def start(self, older: Sequence[int] = ()) -> int:
        """Where a prompt starts behind the documents and further segments; 0 without any memory."""
        budget = self._budget(older)
        return budget.start if budget else 0

    def _budget(self, older):
        segments = [*self.documents, *older]
        if not segments:
            return None
        head = len(self.compressor.adapter.template.head)
        return position_budget(
            self.compressor.config, sum(segments), k=self.k, segments=len(segments), head=head
        )

    def check(self) -> None:
        """UserError if the documents leave no room for a question and an answer."""
        budget = self._budget(())
        needed = budget.needed(behind=2) if budget else 0
        if needed > self.positions:
            raise UserError(
                f"the documents need {needed} positions, the base has {self.positions}; read fewer "
                "of them, or compress them at a higher ratio"
            )

    def prompt(self, turns: Sequence[Turn], question: str, memory: bool) -> list[int]:
        """The ids that ask a question after turns in full. memory: whether they stand behind one.

        Without one the base alone is asked.
        """
        tokenizer, template = self.compressor.base.tokenizer, self.compressor.adapter.template
        if memory:
            return conversation_ids(turns, question, tokenizer, template)
        template = without_trained(template)
        ids = conversation_ids(turns, question, tokenizer, template)
        return without_memory(template, tokenizer, (), ids)

    def plan(self, question: str, turns: Sequence[Turn], split: Split = START) -> Plan:
        """How a question is asked after turns, of which `split` says where they were before it.

        Nothing is moved while everything fits. Else the oldest turns in full go into memory, until
        half of the room for turns is free again. If that memory takes more than half of the room
        behind the documents, its oldest turns are forgotten.

        UserError if the question does not fit behind the documents alone.
        """
        room = self.positions - self.start()
        answer = min(self.most, max(1, room // ANSWER_SHARE))
        if plan := self._fitted(question, turns, split, answer):
            return plan
        for forgotten in range(split.forgotten, len(turns) + 1):
            for compressed in range(max(forgotten, split.compressed), len(turns) + 1):
                moved = Split(forgotten, compressed)
                taken = self.start(self.segments(turns[forgotten:compressed])) - self.start()
                if taken > (room - answer) // MEMORY_SHARE:
                    break  # more turns would take even more
                if plan := self._fitted(question, turns, moved, answer, SLACK):
                    return plan
        nothing = Split(len(turns), len(turns))  # a long question: its answer may be short
        if plan := self._fitted(question, turns, nothing, 1):
            return plan
        raise UserError(
            f"the question makes a prompt of {len(self.prompt((), question, self.start() > 0))} "
            f"tokens, for which the documents leave {room - 1} of the base's {self.positions} "
            "positions; shorten it, or read a long text as a document"
        )

    def _fitted(self, question, turns, split, answer, slack=1) -> Plan | None:
        """The plan of a split; None if it leaves too few positions.

        answer: tokens that it must leave room for. slack: only 1/slack of the room for turns in
        full may be taken.
        """
        older = self.segments(turns[split.forgotten : split.compressed])
        budget, start = self._budget(older), self.start(older)
        if budget and budget.needed(behind=1) > self.positions:
            return None
        memory = budget is not None
        alone = len(self.prompt((), question, memory))
        prompt = self.prompt(turns[split.compressed :], question, memory)
        room = self.positions - start - answer - alone
        if room < 0:
            return None
        if self.history_tokens is not None:
            room = min(room, self.history_tokens)
        if len(prompt) - alone > room // slack:
            return None
        return Plan(split, start, prompt, min(self.most, self.positions - start - len(prompt)))
