"""The full-context teacher: what it reads, its KL in the chunked head pass, and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, WORDS, close, eight_devices, random_lora, random_trained, write_jsonl

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import segment_contexts
from icae_jax.data.drawing import StaticInts
from icae_jax.errors import UserError
from icae_jax.models import llama, plain_attention
from icae_jax.models.llama import FrozenModel, Head
from icae_jax.objectives import distil, loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.performance import programs, utilisation
from icae_jax.runtime import sharding
from icae_jax.training import step
from icae_jax.training.compressor_losses import CompressorLosses
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.optimizer import make_optimizer
from icae_jax.training.workdir import check_workdir

MODEL = llama.Llama(TINY, lora_scale=0.5)
RNG = np.random.default_rng(0)

# ---------------------------------------------------------------------------------- the head's pass

H, TEACHER = (jnp.asarray(RNG.standard_normal((2, 13, 8)), jnp.float32) for _ in range(2))
W = jnp.asarray(RNG.standard_normal((8, 17)), jnp.float32)
LABELS = RNG.integers(0, 17, (2, 13))
WEIGHTS = RNG.standard_normal((2, 13)).astype(np.float32)
KL_WEIGHT = 2.0


def total(h, teacher, w, chunk, **how):
    head = Head(w, tied=False, **how)
    both = loss.distilled_head_losses(h, teacher, head, LABELS, KL_WEIGHT, chunk)
    return jnp.sum((both[0] + KL_WEIGHT * both[1]) * WEIGHTS), both


@pytest.mark.parametrize("how", [{}, {"softcap": 3.0, "divisor": 2.0}], ids=["plain", "softcap"])
def test_the_gradient_is_that_of_a_plain_implementation(how):
    """Breaks when padding of a chunk leaks in, KL goes the other way round or is weighed wrongly,
    or the head or the teacher gets a gradient.
    """

    def plain(h):
        head = Head(W, tied=False, **how)
        log_p, teacher = (jax.nn.log_softmax(head.logits(x)) for x in (h, TEACHER))
        ce = -jnp.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(teacher) * (teacher - log_p), -1)
        return jnp.sum((ce + KL_WEIGHT * kl) * WEIGHTS), (ce, kl)

    run = jax.jit(jax.value_and_grad(lambda *x: total(*x, 5, **how), (0, 1, 2), has_aux=True))
    (_, got), (d_h, *others) = run(H, TEACHER, W)
    (_, want), d_plain = jax.jit(jax.value_and_grad(plain, has_aux=True))(H)
    for mine, theirs in zip((*got, d_h), (*want, d_plain), strict=True):
        close(mine, theirs)
    assert not any(np.asarray(x).any() for x in others)


def test_a_student_that_agrees_learns_by_the_labels_alone():
    """Breaks when the KL to oneself, or its gradient, is not zero."""
    run = jax.jit(jax.value_and_grad(lambda h: total(h, H, W, 64), has_aux=True))
    (_, (ce, kl)), d_h = run(H)
    head = Head(W, tied=False)
    alone = jax.grad(lambda h: jnp.sum(loss.frozen_head_losses(h, head, LABELS, 64) * WEIGHTS))(H)
    assert np.abs(kl).max() < 1e-6 < np.abs(ce).max()
    close(d_h, alone)


def test_logits_of_all_positions_never_live():
    """Breaks when the teacher's logits, or the student's, are formed all at once."""
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda h: total(h, TEACHER, W, 5)[0]))(H))
    assert "[2,13,17]" not in jaxpr and "[2,5,17]" in jaxpr


# ---------------------------------------------------------------------------- what a teacher reads

TEXTS = [RNG.integers(3, 64, n).tolist() for n in (9, 22)]  # one segment, and two
BEFORE, FT = (1, 3), targets.FT
ASKED = [
    [([FT, 7, 8, 4], [20, 21, 2]), ([FT, 9, FT, 10, FT], [22, 2])],  # as mistral's and v1's
    [([FT, 11, 4], [23, 24, 25, 2])],
]


def test_it_reads_the_whole_text_as_the_base_does(tiny_params):
    """Breaks when a segment's padding, a skipped `<s>` or a trained token is seen or takes a
    position, segments are in another order, or a target sees its neighbour.
    """
    adapter = random_lora(TINY, seed=5)
    c = CompressionConfig(k=3, rate=4)
    ids, lengths = segment_contexts([[1, *text] for text in TEXTS], c, pad_id=2)
    assert ids.shape[1] == 2 and lengths.min() == 0
    rows = [[targets.Target(p + a, len(p)) for p, a in row] for row in ASKED]
    packed = pack(rows, 2, 8, 5)
    base = FrozenModel(MODEL, tiny_params)

    @jax.jit
    def taught(lora):
        teacher = Decoder(base, None, lora)
        return distil.teach(teacher, ids, lengths, {"qa": packed}, {"qa": BEFORE}, 1)["qa"]

    @jax.jit
    def plain(row, lora):
        real = jnp.ones((1, row.shape[1]), bool)
        return base(row, jnp.arange(row.shape[1])[None], real, lora=lora)[0]

    for lora in (None, adapter):
        got = taught(lora)
        assert got.shape == (2, 2, 5, TINY.hidden_size)
        for b, row in enumerate(ASKED):
            for g, (prompt, answer) in enumerate(row):
                known = [i for i in prompt if i >= 0]
                whole = [*BEFORE, *TEXTS[b], *known, *answer]
                padded = np.asarray([whole + [0] * (40 - len(whole))], np.int32)
                want = plain(padded, lora)[0]
                first = len(whole) - len(answer) - 1
                close(got[b, g, : len(answer)], want[first : first + len(answer)])


# ------------------------------------------------------------------------------- a step's loss


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    rows = [
        {"context": words(n), "question": words(4), "answers": [words(2)]} for n in (9, 30, 25, 14)
    ]
    source = write_jsonl(folder / "qa.jsonl", rows)
    return {
        "base": str(tiny_base),
        "batch_size": 4,
        "phase": "finetune",
        "init_from": "scratch",
        "compression": {"k": 4, "rate": 4, "decoder_lora": True},
        "lora": {"rank": 4, "dropout": 0.0},
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 0.5, "kl": 2.0, "template": "mistral"},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0},
        "data": {
            "train": source,
            "eval": source,
            "context_lengths": [32],
            "cache_dir": str(folder / "cache"),
        },
    }


def config(raw, objectives=None, **changes):
    changes |= {"objectives": raw["objectives"] | (objectives or {})}
    return from_dict(TrainConfig, raw | changes)


@pytest.mark.nightly
def test_a_step_trains_the_kl_and_says_it_apart(raw):
    """Breaks when microbatches or several k change the loss, the teacher depends on what is
    trained, KL is left out of the gradient, or it does not fall.
    """
    made = CompressorTask(config(raw, batch_size=4))
    assert made.weights == {"qa": 0.5, "qa_kl": 1.0}
    optimizer, _ = make_optimizer(made.config.optimizer, 30)
    (batch,) = made.train_batches(0, 1)
    with made.placement.active():
        start = jax.tree.map(lambda x: np.asarray(x) + 0.02, made.init())
        in_two, whole = (step.make_train_step(made, optimizer, 0, n) for n in (2, 1))
        metrics = [
            jax.device_get(run(step.init_state(start, optimizer), made.frozen, batch)[1])
            for run in (in_two, whole)
        ]
        for o in ("qa", "qa_kl"):
            close(*(m["sums"][o] for m in metrics))
        close(*(m["grad_norm"] for m in metrics))
        counts = metrics[1]["counts"]
        assert counts["qa_kl"] == counts["qa"] > 0
        lengths = np.sum(batch["lengths"])
        assert metrics[1]["tokens"] == lengths + counts["qa"]
        state, seen = step.init_state(start, optimizer), []
        for _ in range(30):
            state, m = whole(state, made.frozen, batch)
            seen.append(float(m["sums"]["qa_kl"] / counts["qa"]))
    assert seen[-1] < 0.95 * seen[0]


def losses_of(objectives, raw, params, tree, batch, **changes):
    """`{objective: (loss sum, count)}`, and the weighted loss's gradient by what is trained."""
    c = config(raw, objectives, attention="xla", **changes)
    made = CompressorLosses(c, TINY, c.trained_compression, (1, 3), (1,))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(tree):
        losses = made.losses(tree, params, batch, None)
        return sum(made.weights[o] * value for o, (value, _) in losses.items()), losses

    return jax.device_get(run(tree))[::-1]


@pytest.mark.nightly
def test_teachers_differ_and_get_no_gradient(raw, tiny_params):
    """Breaks when one teacher stands for another, KL reaches cross-entropy's value, or a decoder
    LoRA is trained as the teacher's too.
    """
    made = CompressorTask(config(raw))
    (batch,) = made.train_batches(0, 1)
    tree = random_trained(TINY, 4) | {"decoder_lora": random_lora(TINY, seed=5)}
    own = losses_of({"teacher": "decoder_lora"}, raw, tiny_params, tree, batch)
    frozen = tiny_params | {"teacher_lora": tree["decoder_lora"]}
    other = losses_of({"teacher": "x"}, raw, frozen, tree, batch)
    alone = losses_of({}, raw, tiny_params, tree, batch)
    none = losses_of({"kl": 0.0}, raw, tiny_params, tree, batch)
    close(own[0]["qa_kl"][0], other[0]["qa_kl"][0])
    for mine, theirs in zip(*map(jax.tree.leaves, (own[1], other[1])), strict=True):
        close(mine, theirs)
    assert abs(own[0]["qa_kl"][0] - alone[0]["qa_kl"][0]) > 1e-2
    assert set(none[0]) == {"qa"}
    close(none[0]["qa"][0], alone[0]["qa"][0])
    norms = [jnp.linalg.norm(g["memory_table"]) for _, g in (none, alone)]
    assert abs(norms[0] - norms[1]) > 1e-3


def test_held_out_losses_rank_without_the_teacher(raw):
    """Breaks when KL moves the ranking, or the control's teacher reads another text."""
    made = CompressorTask(config(raw))
    for kinds in made.eval_batches():
        for batch in kinds.values():
            np.testing.assert_array_equal(batch["full_text"]["context"], kinds["memory"]["context"])
    losses = {"memory": {"qa": 4.0, "qa_kl": 100.0}, "wrong_memory": {"qa": 9.0}}
    assert made.held_out_loss(losses) == 2.0


# ---------------------------------------------------------------------------------- programs, FLOPs

SMALL = dataclasses.replace(
    TINY, hidden_size=256, intermediate_size=688, num_layers=2, head_dim=64, vocab_size=1000
)


def counted(raw, objectives, monkeypatch):
    """(XLA's FLOPs, `programs.least`, the program) of a step."""
    monkeypatch.setattr(plain_attention, "CHUNK", 1 << 20)
    c = config(raw, objectives, attention="xla", base="b", accumulate=1)
    spec = programs.Spec("train", c, SMALL, 4, 32, (40, 24))
    spec = programs.few_layers(spec, 2)
    lowered = programs.lower(spec, sharding.local_mesh(), ("cpu",))
    return lowered.cost_analysis()["flops"], programs.least(spec), lowered


def test_its_flops_are_counted_and_without_it_nothing_is_added(raw, monkeypatch):
    """Breaks when the teacher runs backward too, something of it is not counted, or a step without
    KL pays for a teacher.
    """
    xla, least, off = counted(raw, {"kl": 0.0, "teacher": "decoder_lora"}, monkeypatch)
    names = off.as_text(debug_info=True)
    assert "cross_entropy" in names and "teacher" not in names
    with_xla, with_least, on = counted(raw, {"teacher": "an/adapter"}, monkeypatch)
    assert "teacher" in on.as_text(debug_info=True)
    assert 1.2 < with_least / least < 2
    assert 1.0 <= (with_xla - xla) / (with_least - least) < 1.05
    assert len(jax.tree.leaves(on.in_avals)) == len(jax.tree.leaves(off.in_avals)) + 4


def test_the_meter_counts_the_teacher(raw):
    """Breaks when a run's MFU leaves out the teacher that `plan` counts."""
    least = []
    for kl in (0.0, 1.0):
        made = CompressorTask(config(raw, {"kl": kl}))
        (batch,) = made.train_batches(0, 1)
        least.append(utilisation.Meter(made).least_flops(batch))
    assert least[1] > 1.2 * least[0]


@pytest.mark.nightly
def test_devices_share_the_teacher_s_work(raw, tiny_params):
    """Breaks when a mesh changes the KL or its gradient's step."""
    values = []
    for mesh in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        with eight_devices():
            c = config(raw, attention="xla")
            devices = jax.devices()[: int(np.prod(list(mesh.values())))]
            placed = sharding.Placement(
                sharding.make_mesh(sharding.MeshConfig(**mesh), devices), TINY
            )
            made = CompressorLosses(c, TINY, c.trained_compression, (1, 3), (1,))
            tree = random_trained(TINY, 4) | {"decoder_lora": random_lora(TINY, seed=5)}
            (batch,) = CompressorTask(config(raw, mesh=mesh | {"fsdp": -1})).train_batches(0, 1)
            with placed.active():
                tree, params = (
                    sharding.put(t, placed.tree(t)) for t in (tree, jax.device_get(tiny_params))
                )
                batch = sharding.put_batch(placed.mesh, batch, np.arange(4), 4)
                optimizer, _ = make_optimizer(c.optimizer, 1)
                run = step.make_train_step(made, optimizer, 0, 1)
                values.append(
                    jax.device_get(run(step.init_state(tree, optimizer), params, batch)[1])
                )
    for name in ("qa", "qa_kl"):
        close(values[1]["sums"][name], values[0]["sums"][name])
    close(values[1]["grad_norm"], values[0]["grad_norm"], 1e-4)


# ------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def teacher(raw, tmp_path_factory):
    """The workdir of an adapter with a decoder LoRA."""
    made = CompressorTask(config(raw, {"kl": 0.0}))
    workdir = tmp_path_factory.mktemp("teacher")
    made.export(workdir, jax.tree.map(lambda x: np.asarray(x) + 0.05, made.init()))
    return workdir


def test_an_adapter_teaches_and_belongs_to_the_run(raw, teacher, tmp_path):
    """Breaks when an adapter's LoRA is not what teaches, or a run goes on with another teacher."""
    made = CompressorTask(config(raw, {"teacher": str(teacher)}))
    for leaf in jax.tree.leaves(made.frozen["teacher_lora"]):
        assert np.abs(leaf).max() > 0
    plain = CompressorTask(config(raw))
    assert made.identity["teacher"] == made.teacher.fingerprint
    wide = CompressorTask(config(raw, {"teacher": str(teacher)}, lora={"rank": 8, "dropout": 0.0}))
    assert wide.teacher_lora.rank == 4 != wide.config.lora.rank  # whose FLOPs the meter counts
    check_workdir(tmp_path, plain.config, plain.identity)
    (tmp_path / "DONE").write_text("1")
    with pytest.raises(UserError, match=r"identity\.teacher: 'base' -> "):
        check_workdir(tmp_path, made.config, made.identity)


@pytest.mark.parametrize(
    ("objectives", "changes", "message"),
    [
        ({"kl": -1.0}, {}, r"objectives\.kl is -1\.0; give a weight >= 0"),
        (
            {"ae": 0.5, "qa": 0.0},
            {},
            r"objectives\.kl is 2\.0, but the teacher knows nothing of AE",
        ),
        (
            {"teacher": "decoder_lora"},
            {"compression": {"k": 4, "rate": 4}},
            r"objectives\.teacher is decoder_lora, which needs compression\.decoder_lora=True",
        ),
        ({"teacher": "no/where/here"}, {}, "no/where/here"),
        ({"teacher": "TEACHER"}, {"lora": {"rank": 4, "scale": 3.0}}, r"lora\.scale is 3\.0, but"),
        ({"teacher": "PLAIN"}, {}, r"objectives\.teacher .* has no decoder LoRA"),
        (
            {"ae": 0.0},
            {"data": {"context_lengths": [253]}},
            r"objectives\.kl is 2\.0, whose teacher reads whole contexts: .* 253, .* has 256",
        ),
    ],
)
def test_refusals(raw, teacher, tmp_path, objectives, changes, message):
    """Breaks when a teacher that cannot be is found out only while compiling, or not at all."""
    if objectives.get("teacher") == "PLAIN":
        plain = CompressorTask(config(raw, {"kl": 0.0}, compression={"k": 4, "rate": 4}))
        plain.export(tmp_path, plain.init())
    places = {"TEACHER": str(teacher), "PLAIN": str(tmp_path)}
    objectives = {
        name: places.get(value, value) if name == "teacher" else value
        for name, value in objectives.items()
    }
    if "data" in changes:
        changes = {"data": raw["data"] | changes["data"]}
    with pytest.raises(UserError, match=message):
        CompressorTask(config(raw, objectives, **changes))


@pytest.mark.nightly
def test_several_k_have_one_teacher(raw, tiny_params):
    """Breaks when one of several memories is not held against the teacher."""
    compression = {"k": 4, "rate": 4, "k_choices": [2, 4]}
    c = config(raw, attention="xla", compression=compression)
    made = CompressorLosses(c, TINY, c.trained_compression, (1, 3), (1,))
    (batch,) = CompressorTask(c).train_batches(0, 1)
    tree = random_trained(TINY, 4)
    run = jax.jit(lambda batch: made.losses(tree, tiny_params, batch, None)["qa_kl"])
    (both, count), *each = (run(batch | {"k": StaticInts(ks)}) for ks in ((2, 4), (2,), (4,)))
    assert count == 2 * each[0][1] and abs(each[0][0] - each[1][0]) > 1e-3
    close(both, each[0][0] + each[1][0])
