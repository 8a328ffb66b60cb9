"""`Compressor`: compress texts once, then restore them, ask about them, score continuations."""

import contextlib
import functools
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import encoder, layout, methods
from icae_jax.compression import memory as memories
from icae_jax.compression.encoder import SPECIAL_ROWS
from icae_jax.compression.memory import KV
from icae_jax.errors import UserError
from icae_jax.inference import generate, memory_file
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations
from icae_jax.interop.hub import tokenizer as tokenizers
from icae_jax.interop.hub.text import user_ids
from icae_jax.models import llama
from icae_jax.objectives import loss
from icae_jax.objectives import targets as target_layouts
from icae_jax.runtime import attention_choice, sharding

SPARE = 16  # tokens that a restored text may be longer than the original
ROWS = 16  # texts compressed at once
LOSS_CHUNK = 128  # labels whose logits are computed at once
SHAPE_STEP = 32  # lengths are padded to multiples of this, so that few shapes are compiled


# Compiled once for all compressors of one base and configuration.
_compress = jax.jit(methods.compress, static_argnames=("model", "config", "k"))
_read = jax.jit(methods.read, static_argnames=("model", "head"))


@functools.partial(jax.jit, static_argnames=("model", "objective", "head", "layout"))
def _losses(model, params, trained, memory, targets, *, objective, head, layout):
    """Losses of the labels of one objective's packed targets, `[B, G, U]` nats."""
    return loss.label_losses(
        model, params, trained, memory, {objective: targets}, {objective: head}, layout, LOSS_CHUNK
    )[objective]


class Generation(typing.NamedTuple):
    """One decoded text. ids: without the stop token. stopped: whether a stop token came. ties: steps within `generate.TIE`."""

    text: str
    ids: list[int]
    stopped: bool
    ties: int


class Score(typing.NamedTuple):
    """log_prob: sum over the scored tokens, in nats. tokens: how many were scored."""

    log_prob: float
    tokens: int


def _up(n, step=SHAPE_STEP):
    return -(-n // step) * step


def batches(count: int, batch_size: int) -> range:
    """The first rows of batches of so many rows. UserError where a batch would hold none."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    return range(0, count, batch_size)


def load_base(source, dtype="float32", mesh=None):
    """A base as a `Compressor` with that mesh holds it: split over its devices, by default on one. source: folder, hub id or URL."""
    placement = mesh and sharding.Placement(mesh, bases.sizes(source))
    return bases.load_base(
        source, jnp.dtype(dtype), mesh and placement.parameter, progress=jax.process_index() == 0
    )


def load(adapter, base=None, *, dtype="float32", mesh=None):
    """Loads a `Compressor`. adapter: adapter folder, training workdir, hub id `org/name[@revision]`, or URL (gs://…). base: model-hub
    folder, hub id or URL; by default the adapter's own.

    dtype: "float32" or "bfloat16", of base and activations. mesh: devices (`runtime.sharding`) to split base and batches over, by
    default one device alone. UserError where the base is not the one the adapter was trained on.
    """
    folder, name = adapters.locate(adapter)
    _, stated = adapters.read_adapter_info(
        folder, name
    )  # before the base is loaded, which takes minutes
    loaded = load_base(base or adapters.check_base(stated.base, name), dtype, mesh)
    return Compressor(loaded, adapters.load_adapter(folder, loaded), name, dtype, mesh)


def load_with_memory(memory_path, adapter=None, base=None, dtype="float32", mesh=None):
    """(`Compressor`, memory, ids) of a memory file, by default with the adapter that it names."""
    adapter = adapter or memory_file.read_metadata(memory_path)["adapter"]
    if not pathlib.Path(adapter).is_dir() and not locations.is_remote(adapter):
        raise UserError(
            f"--memory {memory_path} names adapter {adapter}, which is not here; give the adapter's folder with --adapter"
        )
    compressor = load(adapter, base, dtype=dtype, mesh=mesh)
    memory, ids = compressor.load_memory(memory_path)
    return compressor, memory, ids


class Compressor:
    """A base with a trained adapter. Results do not depend on batch size, padding or devices (beyond ties, see `Generation`)."""

    def __init__(self, base, adapter, path, dtype="float32", mesh=None):
        self.base, self.adapter, self.path, self.mesh = base, adapter, path, mesh
        self.config = adapter.compression
        self.placement = mesh and sharding.Placement(mesh, base.config)
        self.trained = jax.device_put(
            adapter.trained, mesh and self.placement.tree(adapter.trained)
        )
        self.model = llama.Llama(base.config, lora_scale=adapter.lora.scale, dtype=jnp.dtype(dtype))
        devices = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
        fastest, _ = attention_choice.choose(
            attention_choice.AUTO,
            base.config,
            devices,
            rows=ROWS,
            length=self.config.segment_tokens + self.config.k,
            dtype=dtype,
        )
        self.writer = self.model.clone(
            attention=fastest
        )  # reading stays plain: a new token's one query is no work for a kernel
        self.framing = target_layouts.make_framing(
            self.config, base.tokenizer, tokenizers.bos_id(base.tokenizer)
        )
        self._check_ids(
            [[*self.framing.start, self.framing.trigger, self.framing.eos]],
            lambda _: "what stands round a text",
            SPECIAL_ROWS,
        )

    # -------------------------------------------------------------------------------------------------------- write

    def context_ids(self, text):
        """A text as the encoder reads it: for ICAE with the tokenizer's `<s>`, where it sets one."""
        return self.framed(self.ids(text))

    def framed(self, ids):
        """The ids of a text as the encoder reads them."""
        return [*self.framing.start, *ids]

    def compress(self, texts, batch_size=ROWS, where=None, k=None):
        """Memory of each text: `Slots` or `KV`, as the adapter's method makes them. texts: one or a list. where: names of the texts for
        errors. k: memory tokens a segment, one of those that the adapter was trained with, by default the most.

        UserError where a text has no tokens or does not fit the base's positions, or the adapter does not know k.
        """
        k = self.config.choose(k)
        texts = [texts] if isinstance(texts, str) else list(texts)
        where = where or [f"text {i}" for i in range(len(texts))]
        contexts = [self.context_ids(t) for t in texts]
        most = self.base.config.max_position_embeddings
        for context, name in zip(contexts, where, strict=True):
            if len(context) == len(self.framing.start):
                raise UserError(f"{name}: the text has no tokens")
            written, start = self.positions(len(context), k)
            needed = max(written, start + 2)
            if needed > most:
                raise UserError(
                    f"{name}: {len(context)} tokens need {needed} positions, the base has {most}; compress it in several parts"
                )
        return self.compress_ids(contexts, batch_size, k, where)

    def positions(self, tokens, k=None, segments=None):
        """(positions that writing a text of so many tokens and reading its memory take, where targets start behind the memory).

        segments: how many the text is cut into, by default as few as hold it.
        """
        segments = segments or encoder.segment_shape(tokens, self.config)[0]
        size = -(-tokens // segments)
        where = layout.get(self.config.layout)
        written, memory, start = layout.positions_needed(
            where, tokens, segments, size, self.config.choose(k), self.config.segment_tokens
        )
        return max(written, memory), start

    def compress_ids(self, contexts, batch_size=ROWS, k=None, where=None):
        """Memory of each list of token ids, as `context_ids` gives them. k, where: as for `compress`."""
        if not contexts:
            raise UserError("texts is empty; give at least one text")
        self._check_ids(contexts, lambda i: where[i] if where else f"text {i}")
        k, parts = self.config.choose(k), []
        for start in batches(len(contexts), batch_size):
            part = contexts[start : start + batch_size]
            shapes = [encoder.segment_shape(len(c), self.config) for c in part]
            shape = (
                max(s for s, _ in shapes),
                min(_up(max(n for _, n in shapes)), self.config.segment_tokens),
            )
            filled = _fill(part, self.rows(batch_size if parts else len(part)), [])
            ids, lengths = self.put(
                encoder.segment_contexts(filled, self.config, shape, self.framing.eos)
            )
            with self.on_devices():
                memory = _compress(
                    self.writer,
                    self.base.params,
                    self.trained,
                    ids,
                    lengths,
                    config=self.config,
                    k=k,
                )
            parts.append(jax.device_get(memory)[: len(part)])
        return _stack(parts, self.config)

    def join(self, parts):
        """One memory that holds several, text by text, in order: what compressing the joined segments at once would give.

        parts: alike in texts and k. So documents compressed one by one can be read together. UserError where they differ.
        """
        return jax.device_get(memories.join(parts, self.config))

    def save(self, path, memory, ids=None):
        """Writes a memory file. ids: names of the texts, by default their numbers."""
        ids = [str(i) for i in range(len(memory))] if ids is None else ids
        identity = (
            self.base.fingerprint,
            self.adapter.fingerprint,
            self.path,
            self.base.identity,
            self.adapter.lora.scale,
        )
        memory_file.save(path, memory, self.config, ids, *identity)

    def load_memory(self, path):
        """(memory, ids) of a memory file; UserError where another base, tokenizer or adapter wrote it."""
        identity = (
            self.base.fingerprint,
            self.adapter.fingerprint,
            self.base.identity,
            self.adapter.lora.scale,
        )
        memory, ids = memory_file.load(path, self.config, *identity)
        self._check_kind(memory)
        return memory, ids

    # --------------------------------------------------------------------------------------------------------- read

    def restore(self, memory, max_new_tokens=None, batch_size=16, details=False):
        """The texts read back out of memory, decoded greedily behind the trigger. details: `Generation`s instead of texts.

        max_new_tokens: of each text; by default the length that the memory tells of it, and some to spare.
        """
        most = (
            [max_new_tokens] * len(memory)
            if max_new_tokens is not None
            else (memory.lengths + SPARE).tolist()
        )
        needed = [1 if max_new_tokens is not None else n + 1 for n in memory.lengths.tolist()]
        rows = self._generate(
            memory, [[[self.framing.trigger]]] * len(memory), "ae", (), most, needed, batch_size
        )
        return [row[0] if details else row[0].text for row in rows]

    def ask(self, memory, questions, max_new_tokens=None, batch_size=16, details=False):
        """Answers, decoded greedily in the adapter's template.

        questions: one (for every text); or a list with one entry a text, each a question or a list of questions. For the memory of a
        single text, a list of questions is asked of it. Returns answers nested as the questions are.
        """
        if isinstance(questions, str):
            questions = [questions] * len(memory)
        single = len(memory) == 1 and len(questions) != 1
        nested = (
            [list(questions)]
            if single
            else [[q] if isinstance(q, str) else list(q) for q in questions]
        )
        if len(nested) != len(memory) or not all(nested):
            raise UserError(
                f"questions has {len(nested)} entries for {len(memory)} texts; give at least one question a text"
            )
        template = self.adapter.template
        prompts = [
            [template.prompt(self.question_ids(q, f"text {i}: ")) for q in row]
            for i, row in enumerate(nested)
        ]
        most = 128 if max_new_tokens is None else max_new_tokens
        rows = self._generate(
            memory,
            prompts,
            "qa",
            template.head,
            [most] * len(memory),
            [1] * len(memory),
            batch_size,
        )
        rows = [[g if details else g.text for g in row] for row in rows]
        if single:
            return rows[0]
        return [
            row[0] if isinstance(q, str) else row for q, row in zip(questions, rows, strict=True)
        ]

    def score(self, memory, targets, questions=None, batch_size=16):
        """Log-probability of a target behind each memory: `Score`s.

        targets: one text for each memory. Without questions each is scored as a continuation, all but its first token (nothing
        stands before that one but the memory); with them, as the answer to that question, stop token included.
        """
        targets = [targets] if isinstance(targets, str) else list(targets)
        questions = [questions] if isinstance(questions, str) else questions
        for name, value in (("targets", targets), ("questions", questions)):
            if value is not None and len(value) != len(memory):
                raise UserError(
                    f"{name} has {len(value)} entries for {len(memory)} memories; give one each"
                )
        if questions is None:
            rows, objective = [target_layouts.Target(self.ids(t), 1) for t in targets], "lm"
        else:
            template, objective = self.adapter.template, "qa"
            asked = [self.question_ids(q, f"target {i}: ") for i, q in enumerate(questions)]
            rows = [template.target(q, self.ids(t)) for q, t in zip(asked, targets, strict=True)]
        short = [i for i, row in enumerate(rows) if len(row.ids) < 2]
        if short:
            raise UserError(
                f"target {short[0]} has fewer than 2 tokens; there is nothing to score in it"
            )
        return [
            row[0]
            for row in self.score_targets(memory, [[row] for row in rows], objective, batch_size)
        ]

    def score_restoring(self, memory, texts, batch_size=16):
        """Log-probability of each text, its end included, behind its memory and the trigger: `Score`s (the AE loss, summed and negated)."""
        if len(texts) != len(memory):
            raise UserError(
                f"texts has {len(texts)} entries for {len(memory)} memories; give one each"
            )
        rows = [[target_layouts.ae_target(self.context_ids(text), self.framing)] for text in texts]
        return [row[0] for row in self.score_targets(memory, rows, "ae", batch_size)]

    def score_targets(self, memory, rows, objective, batch_size=16):
        """Log-probability of the labels of targets behind each memory: `Score`s, nested as `rows` is.

        rows: a list of `objectives.targets.Target`s for each memory, at least one. objective: "ae", "lm" or "qa", which says where they
        stand. UserError where a target leaves the base's positions.
        """
        if not rows:
            return []
        for i, row in enumerate(rows):
            self._check_ids(
                [t.ids for t in row], lambda j, i=i: f"text {i}: target {j}", SPECIAL_ROWS
            )
        head = self.adapter.template.head if objective == "qa" else ()
        longest = [max(len(t.ids) - 1 for t in row) for row in rows]
        self._room(memory, objective, len(head), longest)
        labels = max(len(t.ids) - t.label_start for row in rows for t in row)
        shape, scores = (max(map(len, rows)), _up(max(longest)), _up(labels)), []
        for start in batches(len(memory), batch_size):
            part = rows[start : start + batch_size]
            size = self.rows(batch_size if start else len(part))
            batch = target_layouts.pack(_fill(part, size, []), *shape)
            filled = self.put_memory(memory[np.resize(np.arange(start, start + len(part)), size)])
            with self.on_devices():
                losses = _losses(
                    self.model, self.base.params, self.trained, filled, self.put(batch),
                    objective=objective, head=tuple(head), layout=self.config.layout,
                )  # fmt: skip
            sums = np.where(batch["label_mask"], np.asarray(losses), 0).sum(2)
            counts = batch["label_mask"].sum(2)
            scores += [
                [Score(-float(sums[b, g]), int(counts[b, g])) for g in range(len(row))]
                for b, row in enumerate(part)
            ]
        return scores

    # ----------------------------------------------------------------------------------------------------- on devices

    def on_devices(self):
        """A context in which what is compiled splits over the mesh as `runtime.sharding` says."""
        return self.placement.active() if self.mesh else contextlib.nullcontext()

    def rows(self, count):
        """How many rows a batch of `count` is padded to: a multiple of the parts that the mesh splits it into."""
        return _up(count, sharding.rows_at_once(self.mesh)) if self.mesh else count

    def put(self, batch):
        """Arrays whose first axis is that of rows, on the compressor's devices."""
        return jax.tree.map(lambda x: sharding.split(self.mesh, x), batch) if self.mesh else batch

    def put_memory(self, memory):
        """A memory on the compressor's devices, split by texts."""
        if self.mesh is None:
            return memory
        every = {name: memory.TEXT_AXIS if name in memory.CONTENTS else 0 for name in vars(memory)}
        return memory.replace(
            **{
                name: sharding.split(self.mesh, getattr(memory, name), axis)
                for name, axis in every.items()
            }
        )

    # ------------------------------------------------------------------------------------------------------ inside

    def ids(self, text):
        """The ids of a text, without special tokens, also where the text spells some."""
        return user_ids(self.base.tokenizer, text)

    def question_ids(self, question, where=""):
        """The ids of a question. UserError where neither they nor the adapter's template hold a token to ask with: an answer begins behind
        something. where: what the message begins with.
        """
        ids, template = self.ids(question), self.adapter.template
        if not template.prompt(ids):
            why = f"has no tokens, and template {template.name} puts no words round it"
            raise UserError(f"{where}the question {question!r} {why}; ask something")
        return ids

    def _check_ids(self, rows, what, special_rows=0):
        """UserError where an id has no row: JAX would make NaN of it without a word. what: names the row of a number."""
        tokenizers.check_ids(
            rows, self.base.config.vocab_size, what, self.base.tokenizer, special_rows
        )

    def _check_kind(self, memory):
        """UserError where another method made the memory, or its sizes are not this base's."""
        kind, c = methods.KINDS[self.config.method], self.base.config
        if not isinstance(memory, kind):
            raise UserError(
                f"memory is {type(memory).__name__}, but this adapter's method {self.config.method} reads {kind.__name__}"
            )
        shape = next(iter(memory.contents.values())).shape
        sizes, have = (
            ((c.num_layers, c.num_kv_heads, c.head_dim), shape[:1] + shape[3:])
            if kind is KV
            else ((c.hidden_size,), shape[2:])
        )
        if have != sizes:
            raise UserError(
                f"memory has sizes {have}, but the base's are {sizes}; give the base and adapter that it was made with"
            )

    def _room(self, memory, objective, head, needed):
        """Positions left behind each memory, `[B]`; UserError where a row's `needed` do not fit, or the memory is none of this base."""
        self._check_kind(memory)
        restarts = objective == "ae" and layout.get(self.config.layout).ae_restarts
        start = np.zeros(len(memory), int) if restarts else head + np.asarray(memory.end)
        most = self.base.config.max_position_embeddings
        over = np.flatnonzero(np.asarray(needed) > most - start)
        if len(over):
            i = over[0]
            raise UserError(
                f"{needed[i]} tokens behind a memory that ends at position {start[i]} exceed the base's {most} positions"
            )
        return most - start

    def _generate(self, memory, prompts, objective, head, most, needed, batch_size):
        """Greedy decoding of every prompt of every memory: `Generation`s, nested as the prompts are.

        most: new tokens of each memory's rows at most, fewer where its positions end. needed: what must have room, prompt included.
        """
        if min(most, default=1) <= 0:
            raise UserError(f"max_new_tokens is {min(most)}; it must be positive")
        if not prompts:
            return []
        G = max(len(row) for row in prompts)
        T = max(len(p) for row in prompts for p in row)
        for i, row in enumerate(prompts):
            self._check_ids(row, lambda j, i=i: f"text {i}: prompt {j}", SPECIAL_ROWS)
        longest = [max(map(len, row)) for row in prompts]
        room = self._room(memory, objective, len(head), np.add(longest, needed))
        width = T if T == 1 else _up(T, 16)
        stops = tuple(
            sorted(
                {*self.base.stop_ids, *([self.adapter.template.stop] if objective == "qa" else [])}
            )
        )
        result = []
        for start in batches(len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            at = np.resize(
                np.arange(start, start + len(rows)), self.rows(batch_size if start else len(rows))
            )
            part = self.put_memory(memory[at])
            ids = np.zeros((len(at) * G, width), np.int32)
            lengths, limits = np.zeros(len(at) * G, np.int32), np.zeros(len(at) * G, np.int32)
            every = [
                (n, prompt) for n in at for prompt in (prompts[n] * G)[:G]
            ]  # absent questions repeat others
            for i, (n, prompt) in enumerate(every):
                ids[i, : len(prompt)], lengths[i] = prompt, len(prompt)
                limits[i] = min(most[n], room[n] - len(prompt))
            with self.on_devices():
                prefix = _read(self.model, self.base.params, part, head=tuple(head))
                starts = np.repeat(
                    np.asarray(
                        layout.target_starts(layout.get(self.config.layout), objective, prefix)
                    ),
                    G,
                )
                out = generate.greedy(
                    self.model, self.base.params, self.trained["memory_table"], prefix, *self.put((starts, ids, lengths, limits)),
                    max_new_tokens=_up(int(limits.max())), stop_ids=stops,
                )  # fmt: skip
            out = jax.device_get(out)
            for b, row in enumerate(rows):
                result.append([self.generation(out, b * G + g) for g in range(len(row))])
        return result

    def generation(self, out, i):
        """`Generation` of one row of what `generate.greedy` gave."""
        ids = out.ids[i, : out.lengths[i]].tolist()
        text = self.base.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Generation(text, ids, bool(out.stopped[i]), int(out.ties[i]))


def _fill(rows, size, blank):
    return [*rows, *[blank] * (size - len(rows))]


def _stack(parts, config):
    """Memories of several batches as one of all their texts, padded to the most segments."""
    memory = parts[0] if len(parts) == 1 else _placed(parts, config)
    axis, contents = memory.TEXT_AXIS, memory.contents
    real = [
        np.expand_dims(memory.mask, (*range(axis), *range(axis + 2, x.ndim)))
        for x in contents.values()
    ]
    # No trace of a batch's shape is left.
    return memory.replace(
        **{name: np.where(r, x, 0) for r, (name, x) in zip(real, contents.items(), strict=True)}
    )


def _placed(parts, config):
    """Memories of several batches joined text by text, each padded to the most segments, and placed anew for so many."""
    kind, k, S = (
        type(parts[0]),
        parts[0].tokens_per_segment,
        max(p.segment_lengths.shape[1] for p in parts),
    )

    def stacked(arrays, axis, size):
        """Joined along the axis of texts, the one behind it padded to `size`."""
        return np.concatenate(
            [
                np.pad(x, [(0, size - n if i == axis + 1 else 0) for i, n in enumerate(x.shape)])
                for x in arrays
            ],
            axis,
        )

    lengths = stacked([p.segment_lengths for p in parts], 0, S)
    contents = {
        name: stacked([p.contents[name] for p in parts], kind.TEXT_AXIS, S * k)
        for name in kind.CONTENTS
    }
    return jax.device_get(memories.place(kind, contents, lengths, config))
