"""The Python interface: compress, restore, ask, score; files; bad input."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WORDS, eight_devices, head_kernel, random_trained

import icae_jax
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.layout import Layout
from icae_jax.compression.memory import KV, Slots
from icae_jax.errors import UserError
from icae_jax.inference import compressor as compressors
from icae_jax.inference import loading, reading
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models import llama, rope
from icae_jax.models.llama import FrozenModel
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.runtime import sharding

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(7)
# Of 2, 1, 3, 2 and 3 segments. What is read is nearly always all of these memories, or one of them:
# every other shape is a program more.
TEXTS = [" ".join(RNG.choice(WORDS[8:], size=n)) for n in (30, 5, 40, 17, 35)]
QUESTIONS = [
    "who saw the cat ?",
    "where ?",
    "what did the old king eat in the house ?",
    "when did it run",
    "why ?",
]


def make_adapter(folder, tiny_base, method="icae", layout="", template="plain"):
    base = bases.load_base(tiny_base)
    adapter = adapters.Adapter(
        CompressionConfig(method=method, k=4, rate=4, k_choices=(1, 4), layout=layout),
        LoraConfig(4, 2.0, 0.0),
        targets.make_template(template, base.tokenizer),
        random_trained(TINY, 4),
        str(tiny_base),
        base.fingerprint,
    )
    adapters.save_adapter(folder, adapter)
    return folder


@pytest.fixture(scope="module", params=["icae", "x500"])
def compressor(request, tiny_base, tmp_path_factory):
    return icae_jax.load(
        make_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny_base, request.param)
    )


@pytest.fixture(scope="module")
def memory(compressor):
    return compressor.compress(TEXTS)


def test_memory_sizes(compressor, memory):
    """Breaks when segments are counted wrongly: 16 text tokens a segment (ICAE's <s> included), 4
    memory tokens each; or bytes.
    """
    slots = compressor.config.method == "icae"
    lengths = [len(t.split()) + slots for t in TEXTS]
    segments = [-(-n // 16) for n in lengths]
    assert memory.lengths.tolist() == lengths and memory.tokens.tolist() == [
        4 * s for s in segments
    ]
    numbers = TINY.hidden_size if slots else 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim
    assert memory.bytes.tolist() == [4 * s * numbers * 4 for s in segments]
    np.testing.assert_allclose(memory.ratio, np.asarray(lengths) / (4 * np.asarray(segments)))


def contents_of(memory, row=0):
    """What was written for the real tokens of one text, texts and tokens in front."""
    axes = (memory.TEXT_AXIS, memory.TEXT_AXIS + 1)
    return [
        np.moveaxis(np.asarray(x), axes, (0, 1))[row][np.asarray(memory.mask[row])]
        for x in memory.contents.values()
    ]


@pytest.fixture(scope="module")
def small(compressor):
    return compressor.compress(TEXTS, k=1)


def test_a_smaller_k_by_name(compressor, memory, small, tmp_path):
    """Breaks when k is not the caller's, is lost in a file, or an unknown one gets through."""
    assert (4 * small.tokens).tolist() == memory.tokens.tolist() and (
        small.ratio == 4 * memory.ratio
    ).all()
    compressor.save(tmp_path / "m.safetensors", small)
    again, _ = compressor.load_memory(tmp_path / "m.safetensors")
    assert again.tokens_per_segment == 1 and compressor.ask(again, "who ?", 6) == compressor.ask(
        small, "who ?", 6
    )
    with pytest.raises(
        ValueError, match="k is 2; this compressor was trained with 1, 4 memory tokens"
    ):
        compressor.compress(TEXTS, k=2)


def test_documents_compressed_apart_are_read_together(compressor, small):
    """Breaks when a joined memory is not that of one text whose segments are the documents."""
    words = TEXTS[2].split()[: 40 - len(compressor.framing.start)]
    whole = compressor.compress(" ".join(words))
    # The later documents have no <s> of their own here: ids, not texts, so that the segments are
    # the same.
    ids = compressor.context_ids(" ".join(words))
    joined = compressor.join([compressor.compress_ids([ids[i : i + 14]]) for i in (0, 14, 28)])
    assert whole.tokens.tolist() == joined.tokens.tolist() == [
        12
    ] and whole.lengths.tolist() == joined.lengths.tolist() == [40]
    assert compressor.restore(joined, 10) == compressor.restore(whole, 10)
    assert compressor.ask(joined, "who ?", 6) == compressor.ask(whole, "who ?", 6)
    with pytest.raises(ValueError, match="cannot be joined"):
        compressor.join([whole, small[[0]]])


def test_results_do_not_depend_on_the_batch(compressor, memory):
    """Breaks when padding or a neighbour reaches a memory, a text, an answer or a score."""
    restored = compressor.restore(memory, 12, details=True)
    answers = compressor.ask(memory, [[q, QUESTIONS[0]] for q in QUESTIONS], 8, details=True)
    scores = compressor.score(memory, TEXTS)
    assert len({g.text for g in restored}) > 1 and len({row[0].text for row in answers}) > 1
    for i in (1, 2, 4):  # of one segment beside longer texts, and of as many as the longest
        one = compressor.compress(TEXTS[i])
        for got, want in zip(contents_of(one), contents_of(memory, i), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        if not restored[i].ties:
            assert compressor.restore(one, 12) == [restored[i].text]
        if not answers[i][0].ties:
            assert compressor.ask(one, QUESTIONS[i], 8) == [answers[i][0].text]
        alone = compressor.score(one, TEXTS[i])[0]
        assert alone.tokens == scores[i].tokens and abs(
            alone.log_prob - scores[i].log_prob
        ) <= 1e-5 * abs(alone.log_prob)
    ones, filled = (
        compressor.compress(TEXTS, batch_size=1),
        compressor.compress([*TEXTS, TEXTS[2]], batch_size=5),
    )
    assert len(filled) == 6
    for again in (ones, filled[:5], filled[[0, 1, 5, 3, 4]]):
        for name, value in memory.contents.items():
            np.testing.assert_allclose(again.contents[name], value, atol=2e-5 * np.abs(value).max())


def test_answers_nest_as_the_questions_do(compressor, memory):
    one = memory[0]
    flat = compressor.ask(one, QUESTIONS[:2], 4)
    assert len(flat) == 2 and compressor.ask(one, [QUESTIONS[:2]], 4) == [flat]
    mixed = compressor.ask(memory, [QUESTIONS[0], QUESTIONS[:2], *QUESTIONS[:3]], 4)
    assert mixed[0] == flat[0] and isinstance(mixed[1], list) and len(mixed[1]) == 2
    assert compressor.ask(memory, QUESTIONS[0], 4)[0] == flat[0]
    with pytest.raises(ValueError, match="2 entries for 5 texts"):
        compressor.ask(memory, QUESTIONS[:2])


@functools.partial(jax.jit, static_argnums=0)
def _pass(model, params, table, ids, contents):
    """Log-probabilities after each of ids, by one plain call of the base: slots as embeddings in
    front, or K/V as its cache.
    """
    x, M, prefix = (
        Decoder(FrozenModel(model, params), table).embed(ids[None]),
        contents[0].shape[0],
        None,
    )
    if len(contents) == 1:
        x = jnp.concatenate([contents[0][None], x], 1)
    else:
        k, v = (jnp.moveaxis(c, 0, 1)[:, None] for c in contents)
        at = jnp.arange(M)[None]
        prefix = (rope.rotate_keys(model.config, k, at), v, jnp.ones((1, M), bool), at)
    positions = jnp.arange(x.shape[1]) + (0 if prefix is None else M)
    hidden, _ = model.apply(
        {"params": params}, x, positions[None], llama.causal_mask(x.shape[1]), prefix=prefix
    )
    return jax.nn.log_softmax(hidden[0, -len(ids) :] @ head_kernel(params))


def test_scores_equal_one_straight_pass(compressor, memory):
    """Breaks when scoring reads the memory at other positions, or counts other tokens, than one
    pass over slots and text.
    """
    got = (
        compressor.score(memory, TEXTS, QUESTIONS)
        + compressor.score(memory, TEXTS)
        + compressor.score_restoring(memory, TEXTS)
    )
    params, base = compressor.base.params, compressor.base

    for i in (
        i for i in range(3 * len(TEXTS)) if len(contents_of(memory, i % len(TEXTS))[0]) != 8
    ):  # each length is a program
        at, kind = i % len(TEXTS), ("ask", "continue", "restore")[i // len(TEXTS)]
        answer = base.tokenizer(TEXTS[at], add_special_tokens=False)["input_ids"]
        before = list(
            compressor.adapter.template.prompt(
                base.tokenizer(QUESTIONS[at], add_special_tokens=False)["input_ids"]
            )
        )
        whole = [
            compressor.framing.trigger,
            *compressor.context_ids(TEXTS[at]),
            base.tokenizer.eos_token_id,
        ]
        ids = {
            "ask": [*before, *answer, base.tokenizer.eos_token_id],
            "continue": answer,
            "restore": whole,
        }[kind]
        first = len(before) if kind == "ask" else 1
        padded = np.pad(np.asarray(ids, np.int32), (0, 80 - len(ids)))
        log_probs = np.asarray(
            _pass(
                compressor.decoder.base.module,
                params,
                compressor.trained["memory_table"],
                padded,
                contents_of(memory, at),
            )
        )
        want = sum(float(log_probs[t - 1, ids[t]]) for t in range(first, len(ids)))
        assert got[i].tokens == len(ids) - first and abs(got[i].log_prob - want) <= 1e-4 * abs(want)


_placed = jax.jit(Layout.encoder_positions, static_argnums=(0, 1, 2))


def assert_takes_its_positions(compressor, memory, k):
    """The room that is asked for before is the one that writing, reading or joining then takes."""
    layout = compressor.config.position_layout
    for row, tokens in enumerate(memory.lengths.tolist()[:3]):
        needed, end = compressor.positions(tokens, k)
        n = int(np.asarray(memory.segment_lengths[row]).max())
        placed = np.asarray(_placed(layout, 16 if layout.fixed_length else n, k, np.asarray(n)))
        last = max(
            np.asarray(memory.positions[row])[np.asarray(memory.mask[row])].max(), placed.max()
        )
        assert end == memory.end[row] and last < needed <= max(last + 1 + k, end)
    joined = compressor.join([memory, memory])
    for row, tokens in enumerate(memory.lengths.tolist()):
        assert (
            compressor.positions(
                2 * tokens, k, 2 * int(np.count_nonzero(memory.segment_lengths[row]))
            )[1]
            == joined.end[row]
        )


@pytest.mark.parametrize(
    ("method", "layout"),
    [("icae", "sequential"), ("icae", "uniform"), ("x500", "reference"), ("x500", "uniform")],
)
def test_other_layouts_read_and_write(tiny_base, tmp_path, method, layout):
    """Breaks when a layout's positions are lost between compressing, a file, and reading, or are
    others than were asked for before.
    """
    compressor = icae_jax.load(make_adapter(tmp_path / "a", tiny_base, method, layout))
    memory = compressor.compress(TEXTS)
    compressor.save(tmp_path / "m.safetensors", memory, list("vwxyz"))
    again, ids = compressor.load_memory(tmp_path / "m.safetensors")
    assert ids == list("vwxyz")
    assert type(again) is type(memory)
    for name, value in vars(memory).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert compressor.restore(again, 6) == compressor.restore(memory, 6)
    assert compressor.ask(again, "who ?", 6) == compressor.ask(memory, "who ?", 6)
    assert_takes_its_positions(compressor, memory, 4)
    if layout in (
        "sequential",
        "reference",
    ):  # the fixed length, and the one without; how a text is spread is the same for each k
        assert_takes_its_positions(compressor, compressor.compress(TEXTS, k=1), 1)


def test_positions_are_those_that_a_text_takes(compressor, memory, small):
    """Breaks when the room that is asked for before is not the one that writing, reading or joining
    then takes.
    """
    assert_takes_its_positions(compressor, memory, 4)
    assert_takes_its_positions(compressor, small, 1)


def test_a_memory_of_the_other_kind_is_refused(compressor, memory):
    """Breaks when slots are read by an adapter that writes K/V, or the other way: that gives text,
    and garbage.
    """
    every = {
        name: getattr(memory, name) for name in ("mask", "positions", "end", "segment_lengths")
    }
    M = memory.mask.shape[1]
    if compressor.config.method == "x500":
        other = Slots(np.zeros((5, M, TINY.hidden_size), np.float32), **every)
    else:
        other = KV(
            *[np.zeros((TINY.num_layers, 5, M, TINY.num_kv_heads, TINY.head_dim), np.float32)] * 2,
            **every,
        )
    for read in (
        compressor.restore,
        lambda m: compressor.ask(m, "who ?"),
        lambda m: compressor.score(m, TEXTS),
    ):
        with pytest.raises(ValueError, match="but this adapter's method"):
            read(other)


def test_bad_input(compressor, memory, tiny_base, tmp_path):
    with pytest.raises(ValueError, match="text 1: the text has no tokens"):
        compressor.compress(["the cat", "   "])
    with pytest.raises(ValueError, match="texts is empty"):
        compressor.compress([])
    for size in (0, -1):
        for use in (
            lambda size: compressor.compress("the cat", size),
            lambda size: compressor.restore(memory, batch_size=size),
            lambda size: compressor.ask(memory, "who ?", batch_size=size),
            lambda size: compressor.score(memory, TEXTS, batch_size=size),
        ):
            with pytest.raises(UserError, match=f"batch_size is {size}; it must be at least 1"):
                use(size)
    with pytest.raises(
        ValueError,
        match=rf"text 0: {2000 + len(compressor.framing.start)} tokens need \d+ positions",
    ):
        compressor.compress("cat " * 2000)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        compressor.restore(memory, -1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        compressor.ask(memory, "who ?", 0)
    with pytest.raises(ValueError, match="exceed the base's 256 positions"):
        compressor.score(memory[0], "cat " * 300)
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        compressor.score(memory[0], "cat")
    with pytest.raises(ValueError, match="targets has 1 entries for 5"):
        compressor.score(memory, targets=["cat sat"])
    with pytest.raises(ValueError, match="absent: no such file or folder"):
        icae_jax.load(tmp_path / "absent")
    adapter = make_adapter(tmp_path / "a", tiny_base)
    with pytest.raises(
        ValueError, match=r"base '.*absent' is not a folder; give a model-hub folder"
    ):
        icae_jax.load(adapter, tmp_path / "absent")
    with pytest.raises(ValueError, match="texts has 1 entries for 5"):
        compressor.score_restoring(memory, ["cat sat"])
    gone = make_adapter(tmp_path / "gone", shutil.copytree(tiny_base, tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        ValueError,
        match=r"names its base as .*base, which is not a folder; give the base model with --base",
    ):
        icae_jax.load(gone)
    with pytest.raises(ValueError, match="names adapter"):
        other = icae_jax.load(adapter)
        other.save(tmp_path / "m.safetensors", memory)
        (tmp_path / "a").rename(tmp_path / "b")
        loading.load_with_memory(tmp_path / "m.safetensors")


# --- rows, targets, devices ---


def test_room_is_each_rows_own(compressor, memory, monkeypatch):
    """Breaks when a long text, a long question or little room in one row shortens what another row
    may say.
    """
    end = int(np.asarray(memory.end).max())
    size = dataclasses.replace(compressor.base.config, max_position_embeddings=end + 8)
    few_positions = dataclasses.replace(compressor.base, config=size)
    small = compressors.Compressor(few_positions, compressor.adapter, compressor.path)
    seen = {}
    insert = reading.Engine.insert

    def noted(self, request):
        seen[request.tag] = request.sampling.max_new_tokens
        return insert(self, request)

    monkeypatch.setattr(reading.Engine, "insert", noted)

    asked = ["where did it eat ?", ["where ?", "what did it eat ?"], "why ?", "who ?", "why so ?"]
    answers = small.ask(memory, asked, 200, details=True)
    room = [end + 8 - int(e) for e in np.asarray(memory.end)]
    nested = [[q] if isinstance(q, str) else q for q in asked]
    prompt = [
        [len(compressor.adapter.template.prompt(compressor.ids(q))) for q in row] for row in nested
    ]
    assert seen == {
        (i, j): min(200, room[i] - n) for i, row in enumerate(prompt) for j, n in enumerate(row)
    }
    assert (
        max(len(g.ids) for g in (answers[0], *answers[1], *answers[2:])) > room[2]
    )  # the others go on where that has no room
    again = small.ask(memory[2], asked[2], 200, details=True)[0]
    assert again[:4] == answers[2][:4]  # text, ids, stopped, ties
    assert again.log_prob == pytest.approx(answers[2].log_prob, rel=1e-4)

    seen.clear()
    monkeypatch.setattr(compressors, "SPARE", 9)
    rows = [1, 3, 1, 3, 1]
    compressor.restore(memory[rows], details=True)
    assert [seen[i, 0] for i in range(5)] == [n + 9 for n in memory.lengths[rows].tolist()]


def test_targets_of_every_kind_are_scored_together(compressor, memory):
    """Breaks when a memory's targets see each other, one is counted for another, or padding them
    together changes a score.
    """
    ids, template = compressor.ids, compressor.adapter.template
    rows = [
        [template.target(ids(q), ids(t)) for q in QUESTIONS[: 1 + i]] for i, t in enumerate(TEXTS)
    ]
    got = compressor.score_targets(memory, rows, "qa", batch_size=2)
    assert [len(row) for row in got] == [1, 2, 3, 4, 5]
    alone = [
        compressor.score(memory, TEXTS, questions) for questions in (QUESTIONS[:1] * 5, QUESTIONS)
    ]
    for i, text in enumerate(TEXTS):
        for j, one in ((0, alone[0][i]), (i, alone[1][i])):
            assert got[i][j].tokens == one.tokens == len(text.split()) + 1
            assert abs(got[i][j].log_prob - one.log_prob) <= 1e-5 * abs(one.log_prob)
    with pytest.raises(ValueError, match="exceed the base's 256 positions"):
        compressor.score_targets(memory, [[targets.Target([9] * 300, 1)]] * 5, "lm")


@pytest.mark.parametrize(
    "compressor", ["icae"], indirect=True
)  # the other method's memory is read by the same lines
def test_the_head_runs_where_labels_are(compressor, memory, monkeypatch):
    """Breaks when the tokens of a question cost logits, or a score changes with how many positions
    the head is run at.
    """
    question = " ".join(QUESTIONS * 2)
    pack, losses, shapes, flops, scores = reading.pack, reading._losses, [], [], []

    def packed(rows, G, T, U):
        shapes.append((T, U))
        return pack(rows, G, T, T if scores else U)

    def counted(*args, **named):
        flops.append(losses.lower(*args, **named).cost_analysis()["flops"])
        return losses(*args, **named)

    monkeypatch.setattr(reading, "pack", packed)
    monkeypatch.setattr(reading, "_losses", counted)
    for _ in range(2):
        scores.append(
            [
                s.log_prob
                for s in compressor.score(memory, [TEXTS[1]] * 5, [question, *QUESTIONS[1:]])
            ]
        )
    np.testing.assert_allclose(*scores, rtol=1e-6)
    T, U = shapes[0]
    assert shapes[1] == shapes[0] and len(question.split()) <= T and U == 32 < T
    # Five rows, each with fewer products of a hidden state with the head's matrix.
    assert flops[1] - flops[0] > 5 * (min(T, 128) - U) * 2 * TINY.hidden_size * TINY.vocab_size


@pytest.mark.parametrize(
    "compressor", ["icae"], indirect=True
)  # the other method's memory is read by the same lines
def test_compressors_of_one_base_share_compiled_programs(compressor, memory, monkeypatch):
    """Breaks when scoring is traced and compiled anew for every compressor that is made."""
    traced, label_losses = [], reading.loss.label_losses
    monkeypatch.setattr(
        reading.loss, "label_losses", lambda *args: (traced.append(1), label_losses(*args))[1]
    )
    scores = []
    for _ in range(2):
        another = compressors.Compressor(compressor.base, compressor.adapter, compressor.path)
        scores.append(another.score(memory[:3], ["the cat sat"] * 3))
    assert scores[0] == scores[1] and len(traced) == 1


@pytest.mark.parametrize("method", ["icae", "x500"])
@pytest.mark.parametrize(
    ("dtype", "other", "bound", "template"),
    [
        ("float32", "bfloat16", 1e-5, "plain"),
        pytest.param("bfloat16", "float32", 0.02, "mistral", marks=pytest.mark.nightly),
    ],
)
def test_a_memory_of_another_dtype(tiny_base, tmp_path, method, dtype, other, bound, template):
    """Breaks when a memory of another dtype than the base's cannot be decoded behind, or makes the
    base compute in its own: it is read as if it had been cast before, also behind a head, which
    would be of the wider type.
    """
    reader = icae_jax.load(
        make_adapter(tmp_path / "a", tiny_base, method, template=template), dtype=dtype
    )

    def cast(memory, to):
        return memory.replace(
            **{name: np.asarray(x).astype(jnp.dtype(to)) for name, x in memory.contents.items()}
        )

    written = reader.compress(TEXTS)
    assert {x.dtype for x in written.contents.values()} == {jnp.dtype(dtype)}
    pair = [cast(written, other), cast(cast(written, other), dtype)]
    scores = [[s.log_prob for s in reader.score(memory, TEXTS, QUESTIONS)] for memory in pair]
    np.testing.assert_allclose(*scores, rtol=bound)
    texts = [reader.restore(m, 3) for m in pair]
    if dtype == "float32":
        assert texts[0] == texts[1] and reader.ask(pair[0], "who ?", 3) == reader.ask(
            pair[1], "who ?", 3
        )


@pytest.mark.parametrize(
    "compressor", ["icae"], indirect=True
)  # the other method's memory is read by the same lines
def test_questions_without_a_token(compressor, memory, tiny_base, tmp_path):
    """Breaks when padding is read where a prompt is empty; a template with words of its own can ask
    with nothing between them.
    """
    bare = icae_jax.load(
        make_adapter(tmp_path / "a", tiny_base, compressor.config.method, template="none")
    )
    for asked in (["", ""], ["who ?", ["why ?", " "]]):
        with pytest.raises(
            UserError,
            match=r"text [01]: the question ' ?' has no tokens, and template none puts no words",
        ):
            bare.ask(memory[:2], asked, 4)
    with pytest.raises(UserError, match="target 1: the question '' has no tokens"):
        bare.score(memory[:2], ["the cat", "the dog"], ["who ?", ""])
    assert len(bare.ask(memory, "who ?", 4)) == 5 == len(compressor.ask(memory, [""] * 5, 4))
    alone = compressor.score(memory[0], ["the cat"], [""])[0]
    beside = compressor.score(memory, ["the cat", *TEXTS[1:]], ["", *QUESTIONS[1:]])[0]
    assert abs(alone.log_prob - beside.log_prob) <= 1e-5 * abs(alone.log_prob)
    assert [s.tokens for s in compressor.score(memory[0], [""], ["who ?"])] == [1]  # the end alone
    with pytest.raises(UserError, match="target 1 has fewer than 2 tokens"):
        compressor.score(memory[:2], ["the cat", ""])


def test_no_texts(compressor, memory):
    """Breaks when a memory of no texts, such as what a filter leaves, is a traceback of NumPy's."""
    none = memory[[]]
    assert (
        len(none) == 0
        and compressor.restore(none)
        == compressor.ask(none, "who ?")
        == compressor.ask(none, [])
        == []
    )
    assert (
        compressor.score(none, [])
        == compressor.score(none, [], [])
        == compressor.score_restoring(none, [])
        == []
    )
    for questions in ([], [[]]):
        with pytest.raises(UserError, match="give at least one question per text"):
            compressor.ask(memory[:1], questions)
    with pytest.raises(UserError, match="texts is empty"):
        compressor.compress_ids([])


@pytest.mark.parametrize(
    "compressor", ["x500"], indirect=True
)  # whose texts are not the first axis
def test_a_mesh_of_one_device_changes_nothing(compressor, memory):
    """Breaks when the path over devices makes other memories, texts or scores than the path
    without.
    """
    over = compressors.Compressor(
        compressor.base, compressor.adapter, compressor.path, mesh=sharding.local_mesh()
    )
    assert over.devices.rows(5) == 5 * (
        1 if jax.local_device_count() == 1 else jax.local_device_count() / 5
    )
    again = over.compress(TEXTS, batch_size=3)
    for name, value in memory.contents.items():
        np.testing.assert_allclose(again.contents[name], value, atol=2e-5 * np.abs(value).max())
    scores, wanted = over.score(again, TEXTS, batch_size=3), compressor.score(memory, TEXTS)
    np.testing.assert_allclose(
        [s.log_prob for s in scores], [s.log_prob for s in wanted], rtol=1e-5
    )
    for one, want in zip(
        over.ask(again, QUESTIONS, 4, 3, True),
        compressor.ask(memory, QUESTIONS, 4, details=True),
        strict=True,
    ):
        assert want.ties or one.ids == want.ids
    spread = over.devices.put_memory(memory)
    for name in memory.CONTENTS:
        assert getattr(spread, name).sharding.spec == jax.sharding.PartitionSpec(
            *[None] * memory.TEXT_AXIS, sharding.BATCH
        )
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(over.trained))


@pytest.mark.slow
def test_a_mesh_of_eight_devices(compressor, memory):
    """Breaks when a base, a cache or a batch that is split over devices gives other memories,
    scores or answers, or is not split.
    """
    with eight_devices():
        over = icae_jax.load(
            compressor.path, mesh=sharding.local_mesh(sharding.parse("tensor=2,fsdp=2"))
        )  # and two copies
        found = over.compress(TEXTS, batch_size=3)
        answers, scores = (
            over.ask(found, QUESTIONS, 4, 3, True),
            over.score(found, TEXTS, batch_size=3),
        )
        kernel = over.base.params["layers"]["mlp"]["down_proj"]["kernel"]
        assert kernel.size // kernel.addressable_shards[0].data.size == 4
    wanted = compressor.ask(memory, QUESTIONS, 4, details=True)
    for name, value in memory.contents.items():
        np.testing.assert_allclose(found.contents[name], value, atol=2e-5 * np.abs(value).max())
    np.testing.assert_allclose(
        [s.log_prob for s in scores],
        [s.log_prob for s in compressor.score(memory, TEXTS)],
        rtol=1e-5,
    )
    assert all(want.ties or got.ids == want.ids for got, want in zip(answers, wanted, strict=True))
