"""Reads a released compressor: a bare file of tensors, plus what its tensors cannot tell."""

import dataclasses

from icae_jax.compression.trained import SPECIAL_ROWS
from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import formats
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub.identity import check_identity, compare_quantisation
from icae_jax.objectives import targets
from icae_jax.training.trained import Trained


@dataclasses.dataclass(frozen=True)
class Unstated:
    """What a file's tensors cannot tell. Each field is a flag of the same name.

    None takes the value recorded beside the file, or else the default of its format.
    alpha: LoRA's alpha. rate: text tokens per memory token. context_length: the most text tokens
    of a segment, k * rate. phase: "pretrain" or "finetune".
    """

    method: str | None = None
    alpha: float | None = None
    rate: float | None = None
    context_length: int | None = None
    phase: str | None = None
    template: str | None = None
    layout: str | None = None

    def __post_init__(self):
        for name in ("alpha", "rate", "context_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; it must be positive")

    @property
    def given(self) -> list[str]:
        """The flags that were given."""
        fields = dataclasses.fields(self)
        return [f"--{field.name}" for field in fields if getattr(self, field.name) is not None]


def read_released(
    released: Trained, base: bases.Base, unstated: Unstated, force: bool = False
) -> tuple[adapters.Adapter, list[str]]:
    """(adapter, lines saying what was assumed) of a file of a reference implementation.

    force: read it without a template if the base has no tokenizer to make one with.
    """
    recorded = released.reading or {}
    method, source_of_method = _method(released, unstated, recorded)
    trained = formats.read_trained(released.kind, released.tensors, base, released.path)
    k = trained["memory_table"].shape[0] - SPECIAL_ROWS
    phase = unstated.phase or "finetune"
    defaults = formats.defaults(released.kind, method, phase, k)
    given = {
        "alpha": unstated.alpha,
        "context_length": _context_length(unstated, k),
        "layout": unstated.layout,
        "template": unstated.template,
    }
    lines = [f"method {method}{source_of_method}"]
    lines.append(f"phase {phase}{'' if unstated.phase else ' (default)'}")
    chosen = {}
    for name, value in given.items():
        origin = ""
        if value is None:
            origin = " (recorded)" if name in recorded else f" (default of {released.kind})"
            value = recorded.get(name, defaults[name])
        chosen[name] = value
        lines.append(f"{name} {format(value, 'g') if name == 'alpha' else value}{origin}")
    template_name = chosen.pop("template")
    if base.tokenizer is None and template_name not in ("v1", "none"):
        if not force or unstated.template:
            raise UserError(
                f"base {base.path} has no tokenizer, which template {template_name} needs; "
                "add the tokenizer's files to it, or give --template v1 or none"
            )
        lines.append(f"template none in place of {template_name}: the base has no tokenizer")
        template_name = "none"
    _check_base(released, recorded, base)
    template = _template(template_name, released, recorded, base)
    adapters.check_template(template, base, released.path)
    adapter = formats.make_adapter(trained, base, template, method=method, **chosen)
    return dataclasses.replace(adapter, base_quantize=recorded.get("base_quantize", "")), lines


def _method(released, unstated, recorded):
    """(method, note on where it comes from). UserError if it cannot be told, or contradicts."""
    possible = formats.methods_of(released.kind, released.tensors, unstated.phase)
    method = unstated.method or recorded.get("method")
    note = "" if unstated.method else " (recorded)"
    if len(possible) == 1 and not unstated.method:
        note = " (by its tensors)"
        method = method or possible[0]
    if method is None:
        raise UserError(
            f"{released.path}: after tuning on questions, 500xCompressor and the ICAE of its "
            "repository save the same tensors; say which this is with "
            + " or ".join(f"--method {name}" for name in possible)
        )
    if method not in possible:
        raise UserError(
            f"--method is {method}, but {released.path} is of format {released.kind}, "
            f"method {' or '.join(possible)}"
        )
    return method, note


def _context_length(unstated, k):
    if unstated.rate is None:
        return unstated.context_length
    length = round(k * unstated.rate)
    if unstated.context_length not in (None, length):
        raise UserError(
            f"--rate {unstated.rate} with k {k} is --context_length {length}, "
            f"not {unstated.context_length}; give one of them"
        )
    return length


def _check_base(released, recorded, base):
    """UserError if the file is recorded to be trained on another base."""
    if not recorded:
        return
    if recorded["base_fingerprint"] != base.fingerprint:
        raise UserError(
            f"{released.path} was trained on {recorded['base']} "
            f"({recorded['base_fingerprint'][:12]}), not on {base.path} "
            f"({base.fingerprint[:12]}); give the right base"
        )
    identity = recorded.get("base_identity") or {}
    check_identity(str(released.path), identity, base.identity)
    compare_quantisation(str(released.path), recorded.get("base_quantize", ""), base.quantize)


def _template(name, released, recorded, base):
    # Recorded ids come first: made anew, a chat template would write today's date.
    if recorded.get("template_ids") and name == recorded["template"]:
        path = released.path.with_name(formats.READING)
        return targets.Template.from_json(recorded["template_ids"], path)
    return targets.make_template(name, base.tokenizer, next(iter(base.stop_ids), 2))
