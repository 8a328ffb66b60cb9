"""Reading compiled programs: hand-written ones, and real ones compared with XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from icae_jax.performance import hlo

SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""


def program(entry, *computations):
    """The `Program` of an entry's lines and of other computations, `(head, lines)`."""
    blocks = [("ENTRY %main (p: f32[8]) -> f32[8]", entry), *computations]
    text = "\n\n".join(
        f"{head} {{\n" + "".join(f"  {line}\n" for line in lines) + "}" for head, lines in blocks
    )
    return hlo.Program(
        "HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}\n\n"
        f"{SUM}\n{text}\n"
    )


def traffic(*lines, computations=()):
    """Bytes of the last lines alone: parameters move nothing."""
    return program(lines, *computations).bytes_accessed()


# -------------------------------------------------------------------------------------------- loops

STATE = "(s32[], f32[8]{0})"
BODY = (
    "%body (s: (s32[], f32[8])) -> (s32[], f32[8])",
    [
        f"%s = {STATE} parameter(0)",
        "%i = s32[] get-tuple-element(%s), index=0",
        "%x = f32[8]{0} get-tuple-element(%s), index=1",
        "%y = f32[8]{0} all-reduce(%x), channel_id=3, replica_groups={{0,1}}, to_apply=%sum",
        f"ROOT %t = {STATE} tuple(%i, %y)",
    ],
)
BOUND = ["%s2 = (s32[], f32[8]{0}) parameter(0)", "%j = s32[] get-tuple-element(%s2), index=0"]
CONDITION = "%condition (s2: (s32[], f32[8])) -> pred[]"
NOT_KNOWN = [*BOUND, 'ROOT %go = pred[] custom-call(%j), custom_call_target="f"']
CONSTANT = [
    *BOUND,
    "%n = s32[]{:T(128)} constant(7)",
    "ROOT %go = pred[] compare(%j, %n), direction=LT",
]
FUSED = [*BOUND, "ROOT %go = pred[]{:T(512)} fusion(%j), kind=kLoop, calls=%fused"]
FUSED_BODY = (
    "%fused (q: s32[]) -> pred[]",
    [
        "%q = s32[] parameter(0)",
        "%n = s32[]{:T(128)} constant(7)",
        "ROOT %go2 = pred[] compare(%q, %n), direction=LT",
    ],
)


def loop(condition, attributes="", *more):
    lines = [
        "%p = f32[8]{0} parameter(0)",
        "%z = s32[] constant(0)",
        f"%start = {STATE} tuple(%z, %p)",
    ]
    lines += [f"ROOT %w = {STATE} while(%start), condition=%condition, body=%body{attributes}"]
    return program(lines, BODY, (CONDITION, condition), *more)


@pytest.mark.parametrize(
    ("condition", "attributes", "turns"),
    [
        (
            CONSTANT,
            ', metadata={op_name="jit(f)/while"}, '
            'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0"}}',
            5,
        ),
        (CONSTANT, ', metadata={op_name="jit(f)/while" source_line=99}', 7),
        (FUSED, "", 7),
        (NOT_KNOWN, "", 1),
    ],
    ids=["known", "constant", "fused constant", "neither"],
)
def test_turns_of_a_loop(condition, attributes, turns):
    """Breaks when a way of writing a loop's bound is not read, so that a layer counts as all."""
    read = loop(condition, attributes, FUSED_BODY)
    assert read.collectives() == [("all-reduce", 32, turns, "f32[8]")]
    assert read.bytes_accessed() == turns * 2 * 32  # all-reduce alone


def test_nested_loops_and_calls_multiply():
    """Breaks when nested loops do not multiply, or a computation called twice counts once."""
    outer = (
        "%outer (s: (s32[], f32[8])) -> (s32[], f32[8])",
        [
            f"%s3 = {STATE} parameter(0)",
            f"ROOT %w2 = {STATE} while(%s3), condition=%condition, body=%body",
        ],
    )
    known = 'backend_config={"known_trip_count":{"n":"3"}}'
    both = [
        f"%p = {STATE} parameter(0)",
        f"%w = {STATE} while(%p), condition=%condition, body=%outer, {known}",
        f"ROOT %again = {STATE} call(%w), to_apply=%outer",
    ]
    (one,) = program(both, outer, BODY, (CONDITION, CONSTANT)).collectives()
    assert one.times == (3 + 1) * 7


def test_every_branch_of_a_conditional_counts():
    """Breaks when what only one branch does is left out."""
    branch = "%b{0} (x{0}: f32[8]) -> f32[8]"
    branches = [
        (
            branch.format(n),
            [f"%x{n} = f32[8]{{0}} parameter(0)", f"ROOT %y{n} = f32[8]{{0}} negate(%x{n})"],
        )
        for n in (0, 1)
    ]
    lines = [
        "%p = f32[8]{0} parameter(0)",
        "%which = s32[] constant(1)",
        "ROOT %c = f32[8]{0} conditional(%which, %p, %p), branch_computations={%b0, "
        '%b1}, metadata={op_name="%b0"}',
    ]
    assert program(lines, *branches).bytes_accessed() == 2 * 2 * 32


# -------------------------------------------------------------------------------------- collectives


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "%g = bf16[32]{0} all-gather(%p), channel_id=1, dimensions={0}",
            ("all-gather", 64, 1, "bf16[32]"),
        ),
        (
            "%g = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), channel_id=1, dimensions={0}",
            ("all-gather", 64, 1, "bf16[32]"),
        ),
        (
            "%g = bf16[2]{0} reduce-scatter(%p), channel_id=1, to_apply=%sum",
            ("reduce-scatter", 16, 1, "bf16[8]"),
        ),
        (
            "%g = bf16[8]{0} all-reduce-start(%p), channel_id=1, to_apply=%sum",
            ("all-reduce", 16, 1, "bf16[8]"),
        ),
        (
            "%g = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%p), "
            "channel_id=1, source_target_pairs={{0,1}}",
            ("collective-permute", 16, 1, "bf16[8]"),
        ),
        (
            "%g = ((bf16[8]{0}, s8[4]{0}), (bf16[32]{0}, /*index=1*/s8[16]{0})) "
            "all-gather-start(%p, %q), channel_id=1, dimensions={0}",
            ("all-gather", 80, 1, "bf16[32], s8[16]"),
        ),
        (
            "%g = (bf16[8]{0}, s8[4]{0}) all-to-all(%p, %q), channel_id=1",
            ("all-to-all", 20, 1, "bf16[8], s8[4]"),
        ),
    ],
    ids=[
        "plain",
        "start",
        "reduce-scatter",
        "all-reduce-start",
        "permute",
        "several at once",
        "tuple",
    ],
)
def test_kinds_of_collectives(line, wanted):
    """Breaks when -start and -done count as two, or the smaller side of a collective is taken."""
    kind = line.split("(%")[0].split(" ")[-1]
    done = (
        [f"%d = bf16[32]{{0}} {kind.removesuffix('-start')}-done(%g), channel_id=1"]
        if kind.endswith("-start")
        else []
    )
    lines = [
        "%p = bf16[8]{0} parameter(0)",
        "%q = s8[4]{0} parameter(1)",
        line,
        *done,
        "ROOT %r = (f32[]) tuple()",
    ]
    assert program(lines).collectives() == [wanted]


def fusion(name, *lines):
    return (f"%{name} (x: bf16[8]) -> (bf16[8], bf16[32])", lines)


def test_a_collective_within_several_fusions_is_one():
    """Breaks when a collective that overlaps other work counts at its start and its end.

    Nor may its buffers count as traffic of each of these.
    """
    gather = "all-gather(%x), channel_id=9, dimensions={0}"
    beside = fusion(
        "beside",
        "%x = bf16[8]{0} parameter(0)",
        "%held = bf16[32]{0} parameter(1)",
        "%y = bf16[8]{0} parameter(2)",
        f"%g = bf16[32]{{0}} {gather}",
        "%n = bf16[8]{0} negate(%y)",
        "ROOT %t = (bf16[8]{0}, bf16[32]{0}) tuple(%n, %held)",
    )
    ended = fusion("ended", "%x = bf16[8]{0} parameter(0)", f"ROOT %g2 = bf16[32]{{0}} {gather}")
    lines = [
        "%p = bf16[8]{0} parameter(0)",
        "%o = bf16[8]{0} parameter(1)",
        '%room = bf16[32]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "%f = (bf16[8]{0}, bf16[32]{0}) fusion(%p, %room, %o), kind=kOutput, "
        "output_to_operand_aliasing={{1}: (1, {})}, calls=%beside",
        "ROOT %e = bf16[32]{0} fusion(%p), kind=kCustom, calls=%ended",
    ]
    read = program(lines, beside, ended)
    assert read.collectives() == [("all-gather", 64, 1, "bf16[32]")]
    # Beside: %p, %o and the negation; at the end: %p and the gathered array.
    assert read.bytes_accessed() == 3 * 16 + (16 + 64)


# ------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("%y = f32[8]{0} negate(%p)", 64),
        ("%y = f32[8]{0:T(128)S(1)} negate(%p)", 32),
        ("%y = f32[8]{0:T(128)S(1)} negate(%fast)", 0),
        ('%y = (f32[8]{0}, /*index=1*/f32[8]{0}) custom-call(%p), custom_call_target="f"', 96),
        ("%y = (f32[8]{0}) tuple(%p)", 0),
        ("%y = f32[2,4]{1,0} bitcast(%p)", 0),
        ("%y = f32[2]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={2}", 16),
        ("%y = f32[2]{0:T(128)S(1)} dynamic-slice(%p, %i), dynamic_slice_sizes={2}", 8),
        ("%y = f32[2]{0} slice(%fast), slice={[0:2]}", 8),
        ("%y = ((f32[8]{0}), f32[2]{0:T(128)S(1)}, s32[]) slice-start(%p), slice={[0:2]}", 8),
        ("%y = f32[8]{0} dynamic-update-slice(%p, %two, %i)", 2 * 8 + 2 * 4),
        ("%y = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%p)", 32),
        ("%y = f32[8]{0} copy-done(%c)", 0),
        ("%y = s4[8]{0} convert(%p)", 36),
    ],
)
def test_traffic_of_an_instruction(line, wanted):
    """Breaks when a slice or an update counts as the whole array, or a renaming as a copy.

    Arrays on the chip do not count as main memory.
    """
    given = [
        "%p = f32[8]{0} parameter(0)",
        "%fast = f32[8]{0:T(128)S(1)} parameter(1)",
        "%i = s32[] parameter(2)",
    ]
    assert traffic(*given, "%two = f32[2]{0} parameter(3)", line, "ROOT %r = () tuple()") == wanted


STACK = [
    "%stack = f32[32,8]{1,0} parameter(0)",
    "%at = s32[] parameter(1)",
    "%one = f32[1,8]{1,0} parameter(2)",
]


@pytest.mark.parametrize(
    ("inner", "result", "wanted"),
    [
        (
            [
                "%b = f32[32,8,1]{2,1,0} bitcast(%stack)",
                "%s = f32[1,8,1]{2,1,0} dynamic-slice(%b, %at, %at, %at), "
                "dynamic_slice_sizes={1,8,1}",
                "ROOT %o = f32[1,8]{1,0} bitcast(%s)",
            ],
            "f32[1,8]{1,0}",
            32 + 32,
        ),
        (
            ["ROOT %u = f32[32,8]{1,0} dynamic-update-slice(%stack, %one, %at, %at)"],
            "f32[32,8]{1,0}",
            32 + 32,
        ),
        (
            [
                "%u = f32[32,8]{1,0} dynamic-update-slice(%stack, %one, %at, %at)",
                "%n = f32[1,8]{1,0} negate(%one)",
                "%b = f32[32,8,1]{2,1,0} bitcast(%u)",
                "ROOT %t = (f32[1,8]{1,0}, f32[32,8,1]{2,1,0}) tuple(%n, %b)",
            ],
            "(f32[1,8]{1,0}, f32[32,8,1]{2,1,0})",
            32 + 2 * 32,
        ),
        (
            [
                "%s = f32[1,8]{1,0} dynamic-slice(%stack, %at, %at), dynamic_slice_sizes={1,8}",
                "%all = f32[8]{0} reduce(%stack, %at), dimensions={0}, to_apply=%sum",
                "ROOT %t = (f32[1,8]{1,0}, f32[8]{0}) tuple(%s, %all)",
            ],
            "(f32[1,8]{1,0}, f32[8]{0})",
            1024 + 2 * 32,
        ),
    ],
    ids=["slice", "update in place", "update among others", "slice and all of it"],
)
def test_fusions_count_what_they_touch(inner, result, wanted):
    """Breaks when a turn of a scan counts all layers' weights, or all of what it updates."""
    lines = [*STACK, f"ROOT %f = {result} fusion(%stack, %at, %one), kind=kLoop, calls=%fused"]
    assert (
        traffic(*lines, computations=[("%fused (a: f32[32,8]) -> f32[1,8]", [*STACK, *inner])])
        == wanted + 4
    )  # and the index


def test_what_is_no_program_is_refused():
    with pytest.raises(
        ValueError, match="no entry computation; give the text of a compiled module"
    ):
        hlo.Program("HloModule m\n\n%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n")


# ------------------------------------------------------------------------------------ real programs


def compiled(function, *shapes):
    return (
        jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    )


def layer(x, w):
    return jax.nn.softmax(x @ w) * 0.5 + x


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (layer, [(256, 512), (512, 512)]),
        (lambda x, w: jax.grad(lambda x: layer(layer(x, w), w).sum())(x), [(256, 512), (512, 512)]),
    ],
    ids=["forward", "gradient"],
)
def test_a_program_without_loops_as_xla_counts_it(function, shapes):
    """Breaks when instructions of a real program are not read, or operands not found."""
    of = compiled(function, *shapes)
    assert hlo.Program(of.as_text()).bytes_accessed() == pytest.approx(
        of.cost_analysis()["bytes accessed"], rel=0.02
    )


def test_a_scan_moves_its_body_s_bytes_every_turn():
    """Breaks when a real program's loop counts once, or the stack of weights at every turn."""
    one = hlo.Program(compiled(layer, (256, 512), (512, 512)).as_text()).bytes_accessed()
    scan = compiled(
        lambda x, ws: jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0],
        (256, 512),
        (12, 512, 512),
    )
    assert scan.cost_analysis()["bytes accessed"] < 4 * one
    sliced = 2 * 4 * 512 * 512  # a turn's weights are read from the stack and written
    assert hlo.Program(scan.as_text()).bytes_accessed() == pytest.approx(
        12 * (one + sliced), rel=0.05
    )
