"""Attention: every implementation gives what a plain computation in float64 gives, and the kernels
compile for the devices they are for.
"""

import functools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, close, eight_devices, seen_devices
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh, AxisType

from icae_jax.models import attention, axes, plain_attention
from icae_jax.runtime import sharding

KERNELS = attention.splash_attention_kernel
RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("kv_heads", "tensor"))


def on_cpu(monkeypatch):
    """Runs the kernels' own arithmetic here: splash interpreted, and in cuDNN's place XLA, called
    as cuDNN is.
    """
    monkeypatch.setattr(
        KERNELS, "make_splash_mha", functools.partial(KERNELS.make_splash_mha, interpret=True)
    )
    monkeypatch.setattr(attention, "_cudnn", functools.partial(attention._cudnn, inner="xla"))


class Case:
    """Random numbers of the given sizes; `real` has padding within each row but the first, the
    prefixes at their ends.
    """

    def __init__(self, B, S, N, K, H, P=0, Bp=1, at=None):
        rng = np.random.default_rng(B * S + H)
        T = S if at is None else len(at)
        q, k, v, self.weights = (
            rng.normal(size=s).astype(np.float32)
            for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N * H))
        )
        self.real, self.at = np.ones((B, S), bool), at
        for b in range(B):
            self.real[b, S // 4 : S // 4 + 3 * b] = False
        self.arrays = [q, k, v]
        self.prefix_mask = np.arange(P)[None] < P - 4 * np.arange(Bp)[:, None] if P else None
        if P:
            self.arrays += [rng.normal(size=(Bp, P, K, H)).astype(np.float32) for _ in range(2)]
        self.weights *= self.real[:, np.arange(S) if at is None else at][
            ..., None
        ]  # nothing reads what padding gives

    def out(self, implementation, arrays, mask=None):
        """`attend`, with zeros where a query is padding."""
        q, k, v, *prefix = arrays
        prefix = (*prefix, self.prefix_mask) if prefix else None
        mask = self.real if mask is None else mask
        return attention.attend(
            q, k, v, mask, prefix, at=self.at, implementation=implementation
        ) * (self.weights != 0)

    def both(self, implementation):
        """The output and the gradients of q, k, v and of the prefix's k and v."""

        def total(arrays):
            out = self.out(implementation, arrays)
            return jnp.sum(out * self.weights), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(self.arrays)
        return [out, *gradients]

    @functools.cached_property
    def plain(self):
        """`both` as xla computes it, with the settings that it has."""
        return jax.device_get(self.both("xla"))

    def wanted(self):
        """The output by the definition, a query at a time, in float64."""
        q, k, v, *prefix = (x.astype(np.float64) for x in self.arrays)
        out = np.zeros(q.shape)
        for b, t, n in np.ndindex(q.shape[:3]):
            kv_head, time = n // (q.shape[2] // k.shape[2]), t if self.at is None else self.at[t]
            sees = [
                (k[b, s, kv_head], v[b, s, kv_head]) for s in range(time + 1) if self.real[b, s]
            ]
            if prefix:
                of = b // (q.shape[0] // len(prefix[0]))
                sees += [
                    (prefix[0][of, p, kv_head], prefix[1][of, p, kv_head])
                    for p in np.flatnonzero(self.prefix_mask[of])
                ]
            if sees:
                scores = np.array([q[b, t, n] @ key for key, _ in sees]) / np.sqrt(q.shape[3])
                scores = np.exp(scores - scores.max())
                out[b, t, n] = scores / scores.sum() @ np.array([value for _, value in sees])
        return out.reshape(self.weights.shape) * (self.weights != 0)


CASES = {
    "grouped heads": Case(2, 24, 4, 2, 8),
    "a prefix for two rows": Case(4, 37, 4, 1, 16, P=21, Bp=2),
    "the last times": Case(2, 40, 2, 2, 8, P=5, at=np.arange(24, 40)),
    "times within": Case(2, 40, 2, 1, 8, P=5, at=np.arange(11, 30)),
}
SEVERAL_BLOCKS = Case(2, 280, 2, 1, 8, P=9)
A_PREFIX_EACH = Case(4, 24, 4, 2, 8, P=21, Bp=4)


@pytest.mark.parametrize("name", CASES)
def test_plain_against_the_definition(name):
    """Breaks when a query reads a later key, padding or another row's prefix, or a query head
    another key head.
    """
    close(CASES[name].plain[0], CASES[name].wanted())


@pytest.mark.parametrize(
    ("scores", "unroll"),
    [(1, False), (2 * 4 * 24 * 45, False), (1, True)],
    ids=["a text", "two texts", "a text, unrolled"],
)
def test_texts_in_turns(monkeypatch, scores, unroll):
    """Breaks when texts that are computed one after another get each other's keys, masks or
    gradients, or their order changes.
    """
    case = A_PREFIX_EACH
    want = case.plain
    monkeypatch.setattr(plain_attention, "SCORES", scores)
    monkeypatch.setattr(attention, "attend", functools.partial(attention.attend, unroll=unroll))
    for got, one in zip(case.both("xla"), want, strict=True):
        close(got, one)
    of_all = np.ones((1, 24), bool)
    traced = jax.jit(lambda *x: attention.attend(*x, of_all)).trace(*case.arrays[:3])
    lowered = traced.lower()
    assert str(traced.jaxpr).count("scan[") == 1
    assert ("stablehlo.while" in lowered.as_text()) is not unroll
    close(
        lowered.compile()(*case.arrays[:3]),
        jax.jit(attention.attend)(*case.arrays[:3], np.repeat(of_all, 4, axis=0)),
    )


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "the last times"]
)  # to kernels they are as those within
def test_kernels_against_plain(monkeypatch, name, implementation):
    """Breaks when a kernel's padding is seen, its queries stand at other times, or a shared prefix
    misses some of its rows' gradients.
    """
    on_cpu(monkeypatch)
    for got, want in zip(CASES[name].both(implementation), CASES[name].plain, strict=True):
        close(got, want)


@pytest.mark.parametrize("fused", [4, 1], ids=["one backward kernel", "two"])
def test_several_blocks(monkeypatch, fused):
    """Breaks when splash's blocks of keys are not summed, the last one's padding is seen, or long
    sequences have no backward pass.
    """
    on_cpu(monkeypatch)
    monkeypatch.setattr(attention, "BLOCKS", (128,))
    monkeypatch.setattr(attention, "MOST_FUSED", fused)
    for got, want in zip(SEVERAL_BLOCKS.both("splash"), SEVERAL_BLOCKS.plain, strict=True):
        close(got, want)


@pytest.mark.parametrize(
    ("length", "blocks"),
    [
        (1, (128, 128)),
        (128, (128, 128)),
        (576, (640, 640)),
        (641, (768, 384)),
        (900, (1024, 512)),
        (1280, (1280, 640)),
    ],
)
def test_blocks(length, blocks):
    """Breaks when blocks are not multiples of what splash takes, do not hold the length, or are so
    small that starting them is the cost.
    """
    assert attention._blocks(length) == blocks


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_any_mask(monkeypatch, implementation):
    """Breaks when a mask with a line for each query is taken for another one, for the sequence or
    the prefix, or for another row's.
    """
    on_cpu(monkeypatch)
    case = CASES["a prefix for two rows"]
    q, k, v, pk, pv = case.arrays
    real = np.asarray(attention.seen(case.real))
    lines = np.repeat(case.prefix_mask, 2, axis=0)[:, None] & np.ones((1, q.shape[1], 1), bool)
    attend = jax.jit(functools.partial(attention.attend, implementation=implementation))
    got = np.asarray(attend(q, k, v, real, (pk, pv, lines))) * (case.weights != 0)
    close(got, case.wanted())
    lines[:, 30:] = np.arange(lines.shape[2]) < 2
    other = np.asarray(attend(q, k, v, real, (pk, pv, lines))) * (case.weights != 0)
    close(other[:, :30], got[:, :30])
    fewer = Case(4, 37, 4, 1, 16, P=21, Bp=2)
    fewer.prefix_mask = np.tile(np.arange(21) < 2, (2, 1))
    close(other[:, 30:], fewer.wanted()[:, 30:])


@pytest.mark.parametrize("implementation", ["xla", "cudnn", "splash"])
def test_one_mask_for_all_rows(monkeypatch, implementation):
    """Breaks when a mask of one row is not every row's."""
    on_cpu(monkeypatch)
    q, k, v = CASES["grouped heads"].arrays
    real = np.arange(24)[None] < 20
    got = jax.jit(functools.partial(attention.attend, implementation=implementation))(q, k, v, real)
    case = Case(2, 24, 4, 2, 8)
    case.real = np.repeat(real, 2, axis=0)
    case.weights[:] = case.real[..., None]
    close(np.asarray(got)[:, :20], case.wanted()[:, :20])


@pytest.mark.parametrize("implementation", ["xla", "cudnn", "splash"])
def test_every_query_sees_everything_real(monkeypatch, implementation):
    """Breaks when a mask of one line for all queries is taken for a causal one, lets padding be
    seen, or gives NaN to a row without a real token, which a memory's gradient would carry on.
    """
    on_cpu(monkeypatch)
    q, k, v = (x[:, :20] for x in CASES["a prefix for two rows"].arrays[:3])
    real = np.arange(20)[None] < np.asarray([20, 13, 1, 0])[:, None]

    def total(arrays, at=None):
        q, k, v = arrays
        q = q if at is None else q[:, at]
        out = attention.attend(q, k, v, real[:, None], implementation=implementation)
        return jnp.sum(jnp.square(out) * real.any(1)[:, None, None]), out

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, out), gradients = step([q, k, v])
    assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in gradients)
    for b, n in enumerate((20, 13, 1)):
        scores = np.einsum("tnh,snh->nts", q[b], np.repeat(k[b, :n], 4, 1)) / 4
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        want = np.einsum("nts,snh->tnh", weights, np.repeat(v[b, :n], 4, 1)).reshape(20, -1)
        close(out[b], want)
        assert not any(np.asarray(g)[b, n:].any() for g in gradients[1:])
    some = jax.jit(functools.partial(total, at=np.asarray([3, 9, 19])))([q, k, v])[1]
    close(some[:3], np.asarray(out)[:3, [3, 9, 19]])


def test_one_query_behind_a_prefix_is_no_full_mask(monkeypatch):
    """Breaks when the mask of a single query, which has the shape of a full one, goes to splash
    together with a prefix, which splash refuses.
    """
    on_cpu(monkeypatch)
    q, k, v = (x[:, :8] for x in CASES["a prefix for two rows"].arrays[:3])
    prefix = k[:2], v[:2], np.ones((2, 8), bool)
    mask = attention.seen(np.ones((len(q), 8), bool), jnp.full((len(q), 1), 5))
    name = attention.usable("splash", mask, prefix)
    out = attention.attend(q[:, 5:6], k, v, mask, prefix, implementation=name)
    close(out, attention.attend(q, k, v, np.ones((1, 8), bool), prefix)[:, 5:6])
    assert attention.usable("splash", mask) == "splash"


def test_times_of_each_row_and_times_told_late(monkeypatch):
    """Breaks when times that are no numpy array, or are each row's own, are taken for others, or
    splash refuses or ignores them.
    """
    on_cpu(monkeypatch)
    q, k, v = CASES["grouped heads"].arrays
    real, own = np.ones((2, 24), bool), np.array([[3, 9, 23], [0, 5, 6]])
    some = np.take_along_axis(q, own[..., None, None], axis=1)

    def attend(implementation, own, late):
        attend = functools.partial(attention.attend, implementation=implementation)
        known = np.arange(4, 9, 2)
        return (
            attend(some, k, v, real, at=own),
            attend(q[:, known], k, v, real, at=known),
            attend(q[:, 20:], k, v, real, at=late),
        )

    every = np.asarray(jax.jit(attention.attend)(q, k, v, real))
    want = np.take_along_axis(every, own[..., None], axis=1), every[:, 4:9:2], every[:, 20:]
    for implementation in attention.IMPLEMENTATIONS:
        found = jax.jit(functools.partial(attend, implementation))(own, np.arange(20, 24))
        jax.tree.map(close, found, want)


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_queries_that_are_padding(monkeypatch, implementation):
    """Breaks when a row or a query that sees nothing real gives NaN, which any gradient would carry
    on.
    """
    on_cpu(monkeypatch)
    q, k, v = CASES["grouped heads"].arrays
    real = np.ones((2, 24), bool)
    real[0, :5], real[1] = False, False

    def total(arrays):
        return jnp.sum(
            jnp.square(attention.attend(*arrays, real, implementation=implementation))
            * ~real[..., None]
        )

    value, gradients = jax.jit(jax.value_and_grad(total))([q, k, v])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    if implementation == "splash":
        assert all(not np.asarray(g)[real].any() for g in gradients)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"implementation": "flash"}, "attention is 'flash'; choose from xla, cudnn, splash"),
        ({"mask": np.ones((1, 24, 24), bool)}, "choose xla or cudnn"),
        (
            {"prefix": (np.zeros((2, 3, 2, 8)),) * 2 + (np.ones((2, 24, 3), bool),)},
            "choose xla or cudnn",
        ),
        (
            {
                "implementation": "xla",
                "k_BSKH": np.zeros((2, 30, 2, 8)),
                "v_BSKH": np.zeros((2, 30, 2, 8)),
            },
            "24 queries of 30 keys, and at is None",
        ),
        ({"at": np.arange(3)}, r"24 queries of 24 keys, and at is \(3,\)"),
    ],
    ids=["name", "mask", "mask of the prefix", "no times", "too few times"],
)
def test_what_cannot_be_computed(changed, said):
    """Breaks when a call is computed with another mask than the one given."""
    q, k, v = CASES["grouped heads"].arrays
    given = {
        "q_BTNH": q,
        "k_BSKH": k,
        "v_BSKH": v,
        "mask": np.ones((1, 24), bool),
        "implementation": "splash",
    } | changed
    with pytest.raises(ValueError, match=said):
        attention.attend(**given)


# --------------------------------------------------------------------------------- which can be had


@pytest.mark.parametrize(
    ("implementation", "platform", "changed", "said"),
    [
        ("xla", "cpu", {"dtype": jnp.float32, "windows": True, "tensor": 7}, None),
        ("cudnn", "gpu", {}, None),
        ("cudnn", "tpu", {}, "needs a gpu; the device is a tpu"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, "bfloat16 or float16; the dtype is float32"),
        ("cudnn", "gpu", {"head_dim": 60}, "multiple of 8, up to 256; it is 60"),
        ("cudnn", "gpu", {"windows": True}, None),
        ("splash", "tpu", {"dtype": jnp.float32}, None),
        ("splash", "cpu", {}, "needs a tpu; the device is a cpu"),
        ("splash", "tpu", {"dtype": jnp.float16}, "the dtype is float16"),
        ("splash", "tpu", {"windows": True}, "windows"),
        ("splash", "tpu", {"mask": "all"}, None),
        ("splash", "tpu", {"mask": "slots"}, "causal masks and full ones; the encoder's mask is"),
        ("cudnn", "gpu", {"mask": "slots"}, None),
        (
            "splash",
            "tpu",
            {"tensor": 4},
            "8 query heads are split over 4 devices, 2 key/value heads",
        ),
        ("splash", "tpu", {"tensor": 16}, None),
    ],
)
def test_supported(implementation, platform, changed, said):
    """Breaks when a run that cannot work is started, or a reason does not say what stands in the
    way.
    """
    sizes = {"dtype": jnp.bfloat16, "head_dim": 64, "heads": 8, "kv_heads": 2} | changed
    why = attention.supported(implementation, platform, **sizes)
    assert why is None if said is None else said in why


SIZES = {"rows": 2, "length": 16, "heads": 4, "kv_heads": 2, "head_dim": 8}


def test_fastest_is_measured(monkeypatch):
    """Breaks when a slower one is chosen, one that the device refuses ends the run, or what is
    timed has no backward pass.
    """
    monkeypatch.setattr(attention, "supported", lambda *_, **__: None)
    on_cpu(monkeypatch)

    def timer(*times):
        left = list(times)

        def seconds(step, arguments):
            assert [g.shape for g in jax.eval_shape(step, *arguments)] == [
                (2, 16, 4, 8),
                (2, 16, 2, 8),
                (2, 16, 2, 8),
            ]
            taken = left.pop(0)
            if isinstance(taken, Exception):
                raise taken
            return taken

        return seconds

    choose = functools.partial(attention.fastest, **SIZES, dtype=jnp.float32)
    assert choose(seconds=timer(3.0, 1.0, 2.0)) == (
        "cudnn",
        {"xla": 3.0, "cudnn": 1.0, "splash": 2.0},
        {},
    )
    got = choose(
        seconds=timer(
            3.0,
            NotImplementedError("no such\nhead"),
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"),
        )
    )
    assert got == ("xla", {"xla": 3.0}, {"cudnn": "no such", "splash": "RESOURCE_EXHAUSTED"})
    got = choose(seconds=timer(ValueError("a"), ValueError(), ValueError("c")))
    assert got == ("xla", {}, {"xla": "a", "cudnn": "ValueError()", "splash": "c"})


def test_fastest_of_what_this_machine_has(monkeypatch):
    """Breaks when one candidate is timed, or a backend's own refusal is not among those that are
    caught.
    """
    if jax.devices()[0].platform != "cpu":
        pytest.skip("needs a machine without accelerators")

    def untimed(*_):
        raise AssertionError("there is nothing to choose from")

    choice = attention.fastest(**SIZES, dtype=jnp.bfloat16, seconds=untimed)
    assert (
        choice.implementation == "xla"
        and choice.seconds == {}
        and sorted(choice.refused) == ["cudnn", "splash"]
    )
    monkeypatch.setattr(attention, "supported", lambda *_, **__: None)

    def untimed(*_):
        raise AssertionError("there is nothing to choose from")

    choice = attention.fastest(**SIZES, dtype=jnp.bfloat16)
    assert (
        choice.implementation == "xla"
        and 0 < choice.seconds["xla"] < 60
        and all(choice.refused[name] for name in ("cudnn", "splash"))
    )


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("mesh", [False, True], ids=["one device", "a mesh"])
def test_lowered_for_cuda(monkeypatch, mesh):
    """Breaks when what is passed to cuDNN is not what it takes (lengths, heads, dtypes), or the
    mesh's parts are not the devices' own.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False
    )

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def total(q, k, v, pk, pv, mask, p_mask):
        return jnp.sum(
            jnp.square(
                attention.attend(q, k, v, mask, (pk, pv, p_mask), implementation="cudnn").astype(
                    jnp.float32
                )
            )
        )

    given = (
        like(4, 37, 8, 64),
        like(4, 37, 2, 64),
        like(4, 37, 2, 64),
        like(2, 31, 2, 64),
        like(2, 31, 2, 64),
    )
    masks = like(4, 37, dtype=bool), like(2, 31, dtype=bool)
    devices = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rules = RULES if mesh else axes.UNCONSTRAINED
    with jax.sharding.use_abstract_mesh(devices), nn.logical_axis_rules(rules):
        lowered = (
            jax.jit(jax.grad(total, range(5)))
            .trace(*given, *masks)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    calls = [line for line in lowered.splitlines() if "@__cudnn$fmha" in line]
    B, N, K = (2, 4, 1) if mesh else (4, 8, 2)
    assert len(calls) == 2 and "fmhaScaleBiasSoftmaxBackward" in calls[1]
    for call in calls:
        assert (
            f"tensor<{B}x64x{N}x64xbf16>, tensor<{B}x128x{K}x64xbf16>, tensor<{B}x128x{K}x64xbf16>"
            in call
        )  # q, k, v
        assert f"tensor<{B}x1x64x128xbf16>" in call  # the mask
        assert "bmm" in call and "\\22fmha_scale\\22: 0.125" in call


@pytest.mark.parametrize(("kept", "kernels"), [(["attention"], 2), ([], 3)])
def test_rematerialised(kept, kernels):
    """Breaks when a policy that keeps what attention gave runs the forward kernel twice all the
    same.
    """
    case = CASES["grouped heads"]
    kept = jax.checkpoint_policies.save_only_these_names(*kept)
    total = jax.checkpoint(
        lambda arrays: jnp.sum(jnp.square(case.out("splash", arrays))), policy=kept
    )
    lowered = (
        jax.jit(jax.value_and_grad(total))
        .trace(case.arrays)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert lowered.count("custom_call @tpu_custom_call") == kernels


def test_on_a_mesh(monkeypatch):
    """Breaks when a device gets other rows, heads or prefixes than its own, or everything runs
    whole on each.
    """
    with eight_devices(), seen_devices(4, backend="cpu"):
        on_cpu(monkeypatch)
        # Both kernels are called in the same way, so that each of these is tried with one of them.
        for case, implementations in (
            (CASES["a prefix for two rows"], ("splash", "xla")),
            (Case(1, 20, 4, 2, 8, P=3), ("splash",)),
            (Case(8, 20, 4, 2, 8, P=3, Bp=8), ("cudnn", "xla")),
        ):
            monkeypatch.setattr(plain_attention, "SCORES", 1 << 20)
            want = case.plain
            monkeypatch.setattr(plain_attention, "SCORES", 1)
            grouped = case.arrays[1].shape[2] == 2
            rules = RULES if grouped else RULES[:1]  # one key/value head: none are split
            for implementation in implementations:
                with (
                    jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(1, 2, 2))),
                    nn.logical_axis_rules(rules),
                ):
                    got = case.both(implementation)
                for x, y in zip(got, want, strict=True):
                    close(x, y)
                if implementation == "xla":
                    continue  # the compiler splits it, where what it is given is split
                parts = got[1].sharding.shard_shape(got[1].shape)
                B, T, N, H = got[1].shape
                assert parts == (B // (2 if B > 1 else 1), T, N // (2 if grouped else 1), H), (
                    parts,
                    got[1].shape,
                )
        mesh, message = (
            sharding.make_mesh(sharding.MeshConfig(1, 2, 2)),
            "4 query heads are split over 2 devices, 1 key/value heads",
        )
        with (
            jax.set_mesh(mesh),
            nn.logical_axis_rules(RULES[:2]),
            pytest.raises(ValueError, match=message),
        ):
            CASES["a prefix for two rows"].both("splash")
        where = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            split = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in case.arrays]
            step = jax.jit(
                lambda arrays: jax.grad(lambda a: case.out("xla", a).sum())(arrays)
            ).lower(split)
            loops, compiled = step.as_text().count("stablehlo.while"), step.compile().as_text()
            assert loops == 2 and not [
                line for line in compiled.splitlines() if " all-" in line or "permute" in line
            ]


def child(code, **environment):
    """What a process of its own prints, which is not the accelerator's."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FOR_A_TPU = """
import json
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import test_attention as t
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from icae_jax.models import attention
from icae_jax.runtime import sharding

jax.config.update("jax_exec_time_optimization_effort", -1.0)
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices

MESH = sharding.MeshConfig(1, 2, 2)

def peak(B, K, H, mesh=MESH, P=0, at=None, implementation="splash", T=640, N=32, full=False):
    mesh = sharding.make_mesh(mesh, devices) if mesh else sharding.make_mesh(devices=devices[:1])

    def like(*shape, dtype=jnp.bfloat16):
        spec = PartitionSpec(("data", "fsdp"), *((None, "tensor") if len(shape) == 4 else ()))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def total(q, k, v, pk, pv, mask, p_mask):
        prefix = (pk, pv, p_mask) if P else None
        mask = mask[:, None] if full else mask
        out = attention.attend(q, k, v, mask, prefix, at=at, implementation=implementation)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    with jax.set_mesh(mesh), nn.logical_axis_rules(t.RULES):
        kv = like(B, T, K, H), like(B, T, K, H), like(2, P, K, H), like(2, P, K, H)
        masks = like(B, T, dtype=bool), like(2, P, dtype=bool)
        traced = jax.jit(jax.grad(total, range(5))).trace(
            like(B, T if at is None else len(at), N, H), *kv, *masks
        )
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return kernels, compiled.memory_analysis().peak_memory_in_bytes

print(json.dumps({
    "one": peak(2, 8, 128, None),
    "mesh": peak(2, 8, 128),
    "plain": peak(2, 8, 128, implementation="xla"),
    "the last behind a prefix": peak(4, 2, 64, P=130, at=np.arange(512, 640), N=8),
    "long": peak(2, 2, 128, T=3200, N=8),
    "full": peak(4, 2, 64, T=512, N=8, full=True),
}))
"""


@pytest.mark.nightly
def test_compiled_for_a_tpu():
    """Breaks when Mosaic refuses the kernel's blocks or the mesh's parts, or the scores live after
    all.
    """
    pytest.importorskip("libtpu")
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
    said = child(FOR_A_TPU, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", **quiet)
    found = json.loads(said.splitlines()[-1])
    assert {name: kernels for name, (kernels, _) in found.items()} == {
        "one": 2,
        "mesh": 2,
        "plain": 0,
        "the last behind a prefix": 2,
        "long": 3,
        "full": 2,
    }
    assert found["mesh"][1] < 0.7 * found["plain"][1]
    assert found["mesh"][1] < 0.35 * found["one"][1]
