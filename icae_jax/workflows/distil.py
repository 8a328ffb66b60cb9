"""Writes a teacher's answers as a source of questions (sequence-level distillation, as PISCO's).

The teacher is a base that reads whole contexts, alone or with the decoder LoRA of an adapter.
"""

import dataclasses
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from icae_jax import errors, files, lock
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.trained import DECODER_LORA
from icae_jax.data import rows as data_rows
from icae_jax.data import sources
from icae_jax.data.rows import Row, Sieve
from icae_jax.errors import UserError
from icae_jax.evaluation import plain
from icae_jax.inference import loading
from icae_jax.inference.batching import batch_starts
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.interop.prompts import question_ids, without_trained
from icae_jax.models.llama import FrozenModel, Llama
from icae_jax.objectives import targets
from icae_jax.training import trained

EMPTY = "empty answers"
TOO_LONG = "questions whose context does not fit the base"
GIVEN = "given_answers"  # the field of the answers that the source had


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of which teacher.

    Attributes:
      source: contexts with questions; their answers may be missing.
      output: the JSON lines to write.
      base: folder, hub id or URL; "" for the one that the adapter names.
      base_dtype: see `inference.loading.load`.
      template: of `objectives.targets.TEMPLATES`; "" for the adapter's, or plain.
      adapter: whose decoder LoRA the teacher has; "" for the base alone.
      batch_size: questions answered at once; changes answers only where logits tie.
      max_new_tokens: of an answer.
    """

    source: str
    output: str
    base: str = ""
    base_dtype: str | None = None
    template: str = ""
    adapter: str = ""
    tfds_dir: str | None = None
    batch_size: int = 16
    max_new_tokens: int = 64

    def check(self) -> None:
        """UserError if a field cannot be."""
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be positive")
        if not self.base and not self.adapter:
            raise UserError("--base is not given; name the teacher, or an --adapter of it")
        if "://" in self.output or not self.output.endswith(".jsonl"):
            raise UserError(f"--output {self.output}: give a local file named .jsonl")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A base that reads whole contexts.

    Attributes:
      template: how it is asked, without trained tokens.
      adapter: the fingerprint of its LoRA's adapter, "" without.
    """

    base: bases.Base
    decoder: Decoder
    template: targets.Template
    adapter: str = ""

    def prompt(self, row: Row) -> list[int]:
        """The ids of a context and its question."""
        tokenizer = self.base.tokenizer
        question = question_ids(row.question, tokenizer, self.template, f"{row.where}: ")
        return plain.prompt(self.base, self.template, user_ids(tokenizer, row.text), question)

    def answers(self, prompts: Sequence[Sequence[int]], batch_size: int, most: int) -> list[str]:
        """Greedy answers of at most `most` tokens, `batch_size` prompts at once."""
        made = plain.generate_by_base(
            self.base,
            self.decoder,
            prompts,
            [most] * len(prompts),
            batch_size=batch_size,
            stop=self.template.stop,
        )
        return [generation.text.strip() for generation in made]


def load_teacher(request: Request) -> Teacher:
    """Loads base and adapter.

    UserError if the adapter has no decoder LoRA, or is of another base.
    """
    source, found, name, scale, lora = request.base, None, request.template, 1.0, None
    if request.adapter:
        found = trained.find_whole(request.adapter)
        if not trained.stated_compression(found).get(DECODER_LORA):
            raise UserError(
                f"--adapter {request.adapter} has no decoder LoRA, so the base answers alone; "
                "leave --adapter out, and name the base with --base"
            )
        source = source or trained.base_of(found)
    base = loading.load_base(source, request.base_dtype)
    template, fingerprint = None, ""
    if found:
        _, adapter = trained.open_adapter(found, base)
        scale, lora = adapter.lora.scale, jax.device_put(adapter.trained[DECODER_LORA])
        template, fingerprint = adapter.template, adapter.fingerprint
    if name or template is None:
        template = targets.make_template(name or "plain", base.tokenizer)
    dtype, _ = bases.precision(request.base_dtype)
    model = FrozenModel(Llama(base.config, scale, dtype=jnp.dtype(dtype)), base.params)
    decoder = Decoder(model, jnp.zeros((1, base.config.hidden_size)), lora)
    return Teacher(base, decoder, without_trained(template), fingerprint)


class Progress:
    """`.NAME.distil` beside the output: what it is made of, then a line for each answer.

    Lines from the first broken one on (a kill) are dropped. A finished output leaves the first
    line and its counts. UserError where the output is of something else.
    """

    def __init__(self, output: pathlib.Path, identity: dict[str, Any]):
        self.path = output.with_name(f".{output.name}.distil")
        self.answers: dict[int, str] = {}
        self.counts: dict[str, int] | None = None
        lines = self._lines()
        if (lines and lines[0] != identity) or (output.exists() and not lines):
            raise UserError(
                f"--output {output} was made of other files or with other options; give another "
                f"name, or remove it and {self.path}"
            )
        for line in lines[1:]:
            if "counts" in line and output.exists():
                self.counts = line["counts"]
            elif "row" in line:
                self.answers[line["row"]] = line["answer"]
        if self.counts is None:
            self._write([identity, *(self._line(*item) for item in self.answers.items())])
        self._identity = identity

    def _lines(self):
        lines = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        return lines

    def _line(self, row, answer):
        return {"row": row, "answer": answer}

    def _write(self, lines):
        with files.replacing_file(self.path) as tmp:
            tmp.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def add(self, answers: dict[int, str]) -> None:
        """Keeps some answers, by the numbers of their rows, flushed to disk."""
        self.answers |= answers
        with open(self.path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(self._line(*item)) + "\n" for item in answers.items())
            f.flush()
            os.fsync(f.fileno())

    def finish(self, counts: dict[str, int]) -> None:
        """Once the output is written: keeps what it is made of and what it holds."""
        self.counts = counts
        self._write([self._identity, {"counts": counts}])


def distil(request: Request, tell: Callable[[int, int], Any] = lambda done, total: None) -> dict:
    """Answers the questions of a source; the same request goes on with what is there.

    Writes JSON lines with `context`, `question`, `answer`, `id`, and `given_answers` where the
    source has answers. tell: called with (answered, questions) after each batch.

    Returns `path`, `prepared_now`, `answers` and `left_out`, `{reason: count}`. UserError if
    something is absent or malformed, or if nothing is left.
    """
    request.check()
    sources.check_present(request.source, request.tfds_dir)
    sieve = Sieve()
    rows = sources.read_all(request.source, request.tfds_dir, sieve, unanswered=True)
    rows = [row for row in rows if row.question and row.question.strip()]
    left_out = Counter({r: n for r, (n, _) in sieve.left_out.items() if r != data_rows.NO_ANSWER})
    sieve.check_some(rows, f"--from {request.source}, of questions")
    teacher, output = load_teacher(request), pathlib.Path(request.output)
    identity = {
        "source": sources.identity(request.source, request.tfds_dir),
        "base": teacher.base.fingerprint,
        **teacher.base.identity,
        "base_dtype": request.base_dtype or teacher.base.quantize or "float32",
        "template": teacher.template.as_json(),
        "adapter": teacher.adapter,
        "max_new_tokens": request.max_new_tokens,
    }
    identity = json.loads(json.dumps(identity))
    with lock.only_writer(output.absolute().parent, "--output"):
        progress = Progress(output, identity)
        prepared_now = progress.counts is None
        if prepared_now:
            left_out[TOO_LONG] += _answer(request, teacher, rows, progress, tell)
            answers = {i: answer for i, answer in sorted(progress.answers.items()) if answer}
            left_out[EMPTY] += len(progress.answers) - len(answers)
            if not answers:
                raise UserError(
                    f"--from {request.source}: no answer is left of "
                    f"{errors.counted(len(rows), 'questions')}; use a longer --max_new_tokens, "
                    "another --template, or shorter contexts"
                )
            with files.replacing_file(output) as tmp:
                lines = (_json(rows[i], answer) for i, answer in answers.items())
                tmp.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            progress.finish({"answers": len(answers), **+left_out})
    counts = dict(progress.counts)
    return {
        "path": str(output),
        "prepared_now": prepared_now,
        "answers": counts.pop("answers"),
        "left_out": counts,
    }


def _answer(request, teacher, rows, progress, tell):
    """Answers what has no answer yet. Returns how many questions do not fit the base."""
    most, config = request.max_new_tokens, teacher.base.config
    prompts = [teacher.prompt(row) for row in rows]
    tokenizers.check_ids(
        prompts, config.vocab_size, lambda i: rows[i].where, teacher.base.tokenizer
    )
    fits = [i for i, p in enumerate(prompts) if len(p) + most <= config.max_position_embeddings]
    # Prompts of one length together, so that little is padding.
    to_do = sorted((i for i in fits if i not in progress.answers), key=lambda i: len(prompts[i]))
    for start in batch_starts(len(to_do), request.batch_size):
        chunk = to_do[start : start + request.batch_size]
        answers = teacher.answers([prompts[i] for i in chunk], request.batch_size, most)
        progress.add(dict(zip(chunk, answers, strict=True)))
        tell(len(progress.answers), len(fits))
    return len(rows) - len(fits)


def _json(row, answer):
    fields = {"context": row.text, "question": row.question, "answer": answer}
    fields |= {"id": row.id} if row.own_id else {}
    fields |= {GIVEN: list(row.answers)} if row.answers else {}
    return json.dumps(fields, ensure_ascii=False)
