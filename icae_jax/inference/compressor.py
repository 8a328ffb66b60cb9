"""`Compressor`: compress texts once, then restore them, ask about them, score continuations."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from icae_jax.compression import memory as memories
from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import choose_k, position_budget
from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.inference import cascade, memory_file
from icae_jax.inference.devices import Devices
from icae_jax.inference.memory_file import TextId
from icae_jax.inference.reading import Generation, MemoryReader, Request, Score
from icae_jax.inference.sampling import GREEDY, Sampling
from icae_jax.inference.writing import MemoryWriter, fastest_attention
from icae_jax.interop.adapters.folder import Adapter
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.interop.prompts import question_ids
from icae_jax.models.llama import FrozenModel, Llama
from icae_jax.objectives import targets as target_layouts
from icae_jax.objectives.targets import Target

BATCH_SIZE = 16  # texts compressed or read at once
SPARE = 16  # tokens that a restored text may be longer than the original
ANSWER_TOKENS = 128  # most tokens of an answer


class Compressor:
    """A base with a trained adapter.

    Results do not depend on batch size, padding or devices, except where logits tie (see
    `Generation`).

    Attributes:
        base: the base.
        adapter: the adapter.
        path: the adapter's folder, hub id or URL.
        config: the adapter's compression.
        trained: the adapter's trained tree, on the devices.
        devices: where it runs.
        decoder: the base that reads memories.
        plain_decoder: the base alone, also if the adapter has a decoder LoRA.
        framing: the ids around a text.
    """

    def __init__(
        self,
        base: bases.Base,
        adapter: Adapter,
        path: str | os.PathLike,
        dtype: DTypeLike = "float32",
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.base, self.adapter, self.path = base, adapter, path
        self.config = adapter.compression
        self.devices = Devices(mesh, base.config)
        self.trained = self.devices.put_parameters(adapter.trained)
        model = Llama(base.config, lora_scale=adapter.lora.scale, dtype=jnp.dtype(dtype))
        frozen = FrozenModel(model, base.params)
        self.decoder = Decoder.of(frozen, self.trained)
        self.plain_decoder = Decoder(frozen, self.trained["memory_table"])
        self.framing = target_layouts.make_framing(
            self.config, base.tokenizer, tokenizers.bos_id(base.tokenizer)
        )
        self._check_ids(
            [[*self.framing.start, self.framing.trigger, self.framing.eos]],
            lambda _: "the ids around a text",
            SPECIAL_ROWS,
        )
        # Only the encoder takes the fastest attention: decoding has one query a step.
        fastest = fastest_attention(base.config, self.config, self.devices, dtype, BATCH_SIZE)
        encoder = FrozenModel(model.clone(attention=fastest), base.params)
        self.writer = MemoryWriter(
            encoder, self.trained, self.config, self.devices, self.framing.eos
        )
        self.reader = MemoryReader(base, adapter, self.decoder, self.devices)

    # --- Texts as ids ---

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens, not even those that the text spells."""
        return user_ids(self.base.tokenizer, text)

    def framed(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text as the encoder reads them: with `<s>` if method and tokenizer do so."""
        return [*self.framing.start, *ids]

    def context_ids(self, text: str) -> list[int]:
        """A text as the encoder reads it."""
        return self.framed(self.ids(text))

    def question_ids(self, question: str, where: str = "") -> list[int]:
        """The ids of a question, see `interop.prompts.question_ids`."""
        return question_ids(question, self.base.tokenizer, self.adapter.template, where)

    def _check_ids(
        self, rows: Sequence[Sequence[int]], what: Callable[[int], str], special_rows: int = 0
    ) -> None:
        """Raises UserError if an id has no embedding. what: names a row by its number."""
        tokenizers.check_ids(
            rows, self.base.config.vocab_size, what, self.base.tokenizer, special_rows
        )

    # --- Writing ---

    def positions(
        self, tokens: int, k: int | np.integer | None = None, segments: int | None = None
    ) -> tuple[int, int]:
        """Positions for compressing a text and reading its memory, and where targets start.

        segments: how many the text is cut into, by default as few as hold it.
        """
        budget = position_budget(self.config, tokens, k=k, segments=segments)
        return budget.needed(), budget.start

    def compress(
        self,
        texts: str | Sequence[str],
        batch_size: int = BATCH_SIZE,
        where: Sequence[str] | None = None,
        k: int | np.integer | None = None,
        *,
        tokens: int | None = None,
        ratio: float | None = None,
    ) -> Memory:
        """The memory of each text, of the kind that the adapter's method makes.

        Give at most one of k, tokens and ratio. The last two choose the nearest k that the adapter
        knows, one for all texts (see `segments.choose_k`, which says what nearest means).

        Args:
            texts: one or several.
            batch_size: texts compressed at once.
            where: names of the texts for error messages.
            k: memory tokens per segment, one of those that the adapter was trained with, or any
                number where its method needs no vector for each; by default the most.
            tokens: wanted memory tokens of a text, over all of its segments.
            ratio: wanted context tokens per memory token.

        Raises:
            UserError: a text has no tokens or exceeds the base's positions; k is unknown; several
                of k, tokens and ratio are given, or one is not positive.
        """
        contexts, where = self._contexts(texts, where)
        k = choose_k(self.config, list(map(len, contexts)), k=k, tokens=tokens, ratio=ratio)
        self._check_room(contexts, where, k)
        return self.compress_ids(contexts, batch_size, k, where)

    def compress_ladder(
        self,
        texts: str | Sequence[str],
        ladder: Sequence[int],
        batch_size: int = BATCH_SIZE,
        where: Sequence[str] | None = None,
    ) -> list[Memory]:
        """The memories of texts at each of several k, which `ask` takes as a ladder.

        In one pass of the encoder if the method can share it, else in one for each k. ladder:
        rising memory tokens per segment. Otherwise as `compress`.
        """
        ladder = cascade.checked(ladder, self.config)
        contexts, where = self._contexts(texts, where)
        self._check_room(contexts, where, ladder[-1])
        return self.compress_ids_ladder(contexts, ladder, batch_size, where)

    def _contexts(self, texts, where=None) -> tuple[list[list[int]], list[str]]:
        """Texts as the encoder reads them, and their names. UserError if one has no tokens."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        where = list(where or [f"text {i}" for i in range(len(texts))])
        contexts = [self.context_ids(text) for text in texts]
        for context, name in zip(contexts, where, strict=True):
            if len(context) == len(self.framing.start):
                raise UserError(f"{name}: the text has no tokens")
        return contexts, where

    def _check_room(self, contexts, where, k) -> None:
        """Raises UserError if a text exceeds the base's positions."""
        positions = self.base.config.max_position_embeddings
        for context, name in zip(contexts, where, strict=True):
            needed = position_budget(self.config, len(context), k=k).needed(behind=2)
            if needed > positions:
                raise UserError(
                    f"{name}: {len(context)} tokens need {needed} positions, the base has "
                    f"{positions}; compress it in several parts"
                )

    def compress_ids(
        self,
        contexts: Sequence[Sequence[int]],
        batch_size: int = BATCH_SIZE,
        k: int | np.integer | None = None,
        where: Sequence[str] | None = None,
    ) -> Memory:
        """The memory of each list of ids, as `context_ids` gives them; otherwise as `compress`."""
        k = self.config.choose(k)
        return self.compress_ids_ladder(contexts, (k,), batch_size, where)[0]

    def compress_ids_ladder(
        self,
        contexts: Sequence[Sequence[int]],
        ladder: Sequence[int],
        batch_size: int = BATCH_SIZE,
        where: Sequence[str] | None = None,
    ) -> list[Memory]:
        """As `compress_ids` at each of several k, see `compress_ladder`."""
        ladder = cascade.checked(ladder, self.config)
        if not contexts:
            raise UserError("texts is empty; give at least one text")
        self._check_ids(contexts, lambda i: where[i] if where else f"text {i}")
        return self.writer.write_several(contexts, ladder, batch_size)

    def join(self, parts: Sequence[Memory]) -> Memory:
        """One memory that holds several, text by text, in order.

        It equals that of the joined segments, so documents compressed one by one can be read
        together. UserError if their numbers of texts or k differ.
        """
        return jax.device_get(memories.join(parts, self.config))

    # --- Memory files ---

    @property
    def origin(self) -> memory_file.Origin:
        """What a memory file says of the compressor that wrote it."""
        return memory_file.Origin(
            self.config,
            self.base.fingerprint,
            self.adapter.fingerprint,
            self.path,
            self.base.identity,
            self.adapter.lora.scale,
            self.base.quantize,
        )

    def save(
        self, path: str | os.PathLike, memory: Memory, ids: Sequence[Any] | None = None
    ) -> None:
        """Writes a memory file. ids: of the texts, by default their numbers."""
        ids = [str(i) for i in range(len(memory))] if ids is None else ids
        memory_file.save(path, memory, ids, self.origin)

    def load_memory(self, path: str | os.PathLike) -> tuple[Memory, list[TextId]]:
        """The memory and ids of a file; UserError if another base or adapter wrote it."""
        memory, ids = memory_file.load(path, self.origin)
        self.reader.check_kind(memory)
        return memory, ids

    # --- Reading ---

    def prefix(self, memory: Memory, template: bool = True) -> Prefix:
        """What the decoder sees of memories, on the host: K/V that need not be computed again.

        template: with the head of the adapter's template before the memory, as questions are asked;
        else without, as texts are restored.
        """
        self.reader.check_kind(memory)
        return jax.device_get(self.reader.read(memory, "qa" if template else "ae"))

    def restore(
        self,
        memory: Memory,
        max_new_tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
        details: bool = False,
        *,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list[str] | list[Generation]:
        """The texts read back out of memory, decoded greedily behind the trigger.

        max_new_tokens: of each text; by default its length, which the memory knows, and some to
        spare. details: return `Generation`s instead of texts. prefixes: of each text, where it is
        at hand (`prefix`).
        """
        prompts = [[self.framing.trigger]]
        if max_new_tokens is not None:
            requests = [Request(prompts, max_new_tokens)] * len(memory)
        else:
            requests = [Request(prompts, n + SPARE, n + 1) for n in memory.lengths.tolist()]
        rows = self.reader.generate(memory, requests, "ae", batch_size, prefixes)
        return [row[0] if details else row[0].text for row in rows]

    def ask(
        self,
        memory: Memory | Sequence[Memory] | str | Sequence[str],
        questions: str | Sequence[str | Sequence[str]],
        max_new_tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
        details: bool = False,
        *,
        ladder: Sequence[int] = (),
        threshold: float = cascade.LIKELY,
        sampling: Sampling = GREEDY,
        prefixes: Sequence[Prefix] | None = None,
    ) -> list:
        """Answers, decoded in the adapter's template: greedily, unless `sampling` says otherwise.

        Of a ladder of memories an answer comes from the smallest one that gives a likely answer
        (FlexComp's cascade, arXiv 2609.11192): a question is asked again at the next k while the
        log-probability of its answer, in the mean over its tokens and the stop token, is below
        `threshold`. The last answer is taken as it is. Where this mean lies within rounding of the
        threshold, another batch size may take another memory.

        Args:
            memory: of one or several texts. For a cascade either the memories of the same texts by
                rising k, as `compress_ladder` gives them, or the texts themselves, with `ladder`.
                Texts are compressed at all k at once if one pass of the encoder does it, else at a
                larger k only where the smaller did not do.
            questions: one, asked of every text; or one entry per text, each a question or a list of
                them. Of the memory of a single text, a list of questions is asked.
            max_new_tokens: of each answer.
            batch_size: texts read at once.
            details: return `Generation`s instead of texts. They say which k gave an answer, and
                how many memory tokens were read for it.
            ladder: rising memory tokens per segment, all known to the adapter; for texts only.
            threshold: of a cascade, in nats per token, by default log(0.9); -inf takes the smallest
                memory, inf the largest.
            sampling: how tokens are chosen; max_new_tokens takes the place of its limit.
            prefixes: of each text, where it is at hand (`prefix`); not for a ladder.

        Returns:
            Answers, nested as the questions are.
        """
        texts, rungs = self._rungs(memory, ladder, batch_size)
        if isinstance(questions, str):
            questions = [questions] * texts
        single = texts == 1 and len(questions) != 1
        nested = [[q] if isinstance(q, str) else list(q) for q in questions]
        if single:
            nested = [list(questions)]
        if len(nested) != texts or not all(nested):
            raise UserError(
                f"questions has {len(nested)} entries for {texts} texts; give at least one "
                "question per text"
            )
        template = self.adapter.template
        most = ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
        requests = [
            Request(
                [template.prompt(self.question_ids(q, f"text {i}: ")) for q in row],
                most,
                sampling=sampling,
            )
            for i, row in enumerate(nested)
        ]
        if prefixes is not None and len(rungs) > 1:
            raise UserError("prefixes are given for a ladder; give them with a single memory")
        generations = cascade.generate(
            self.reader, rungs, requests, threshold, batch_size, prefixes
        )
        rows = [[g if details else g.text for g in row] for row in generations]
        if single:
            return rows[0]
        return [
            row[0] if isinstance(q, str) else row for q, row in zip(questions, rows, strict=True)
        ]

    def _rungs(self, memory, ladder, batch_size) -> tuple[int, list[cascade.Rung]]:
        """The number of texts, and their memories by rising k, perhaps still to be written."""
        texts = [memory] if isinstance(memory, Memory | str) else list(memory)
        if not all(isinstance(text, str) for text in texts):
            if ladder:
                raise UserError(
                    f"ladder is {tuple(ladder)}, but memories have their k; give texts, or leave "
                    "ladder out"
                )
            rungs = cascade.rungs_of(texts)
            return len(texts[0]), rungs
        if not ladder:
            raise UserError("texts are asked without a memory; compress them, or give a ladder")
        ladder = cascade.checked(ladder, self.config)
        contexts, where = self._contexts(texts)
        self._check_room(contexts, where, ladder[-1])
        if self.config.spec.write_several:
            # When the first is read: after all that is asked has been checked.
            written = functools.cache(
                lambda: cascade.rungs_of(self.compress_ids_ladder(contexts, ladder, batch_size))
            )
            return len(texts), [lambda rows, i=i: written()[i](rows) for i in range(len(ladder))]

        def at(k):
            return lambda rows: self.compress_ids([contexts[row] for row in rows], batch_size, k)

        return len(texts), [at(k) for k in ladder]

    def score(
        self,
        memory: Memory,
        targets: str | Sequence[str],
        questions: str | Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Score]:
        """Log-probability of a target behind each memory.

        targets: one text per memory. Without questions each is scored as a continuation, except for
        its first token, which nothing but the memory precedes; with one question per memory, as its
        answer, stop token included.
        """
        targets = [targets] if isinstance(targets, str) else list(targets)
        questions = [questions] if isinstance(questions, str) else questions
        for name, value in (("targets", targets), ("questions", questions)):
            if value is not None and len(value) != len(memory):
                raise UserError(
                    f"{name} has {len(value)} entries for {len(memory)} memories; give one each"
                )
        if questions is None:
            rows, objective = [Target(self.ids(text), 1) for text in targets], "lm"
        else:
            template, objective = self.adapter.template, "qa"
            asked = [self.question_ids(q, f"target {i}: ") for i, q in enumerate(questions)]
            rows = [template.target(q, self.ids(t)) for q, t in zip(asked, targets, strict=True)]
        short = [i for i, row in enumerate(rows) if len(row.ids) < 2]
        if short:
            raise UserError(
                f"target {short[0]} has fewer than 2 tokens; there is nothing to score in it"
            )
        scores = self.score_targets(memory, [[row] for row in rows], objective, batch_size)
        return [row[0] for row in scores]

    def score_restoring(
        self, memory: Memory, texts: Sequence[str], batch_size: int = BATCH_SIZE
    ) -> list[Score]:
        """Log-probability of each text and its end behind memory and trigger: the AE loss."""
        if len(texts) != len(memory):
            raise UserError(
                f"texts has {len(texts)} entries for {len(memory)} memories; give one each"
            )
        rows = [[target_layouts.ae_target(self.context_ids(text), self.framing)] for text in texts]
        return [row[0] for row in self.score_targets(memory, rows, "ae", batch_size)]

    def score_targets(
        self,
        memory: Memory,
        rows: Sequence[Sequence[Target]],
        objective: str,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[Score]]:
        """Log-probabilities of the labels of targets behind each memory, nested as `rows` is.

        rows: at least one target per text. objective: "ae", "lm" or "qa", which says where they
        start. UserError if a target leaves the base's positions.
        """
        return self.reader.score(memory, rows, objective, batch_size)
