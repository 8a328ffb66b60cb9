"""Packing: the targets of a batch of examples as arrays of one shape."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from icae_jax.objectives.targets import Target

PackedTargets = dict[str, Int[Any, "B G _"] | Bool[Any, "B G U"]]


def pack(rows: Sequence[Sequence[Target | None]], G: int, T: int, U: int) -> PackedTargets:
    """Stacks the targets of each example: `rows[b]` holds up to G of them, None for an absent one.

    Returns int32 arrays `ids [B, G, T]` (decoder inputs), `label_at [B, G, U]` (the input index
    that predicts each label), `labels [B, G, U]`, and `label_mask [B, G, U]`, bool. ValueError if a
    target does not fit.
    """
    B = len(rows)
    packed = {
        "ids": np.zeros((B, G, T), np.int32),
        "label_at": np.zeros((B, G, U), np.int32),
        "labels": np.zeros((B, G, U), np.int32),
        "label_mask": np.zeros((B, G, U), bool),
    }
    for b, targets in enumerate(rows):
        for g, target in enumerate(targets):
            if target is None:
                continue
            inputs, labels = len(target.ids) - 1, len(target.ids) - target.label_start
            if target.label_start < 1:
                raise ValueError(
                    "a target's first token is a label; nothing stands before it that could "
                    "predict it"
                )
            if inputs > T or labels > U or len(targets) > G:
                raise ValueError(
                    f"a target of {inputs} inputs and {labels} labels does not fit in [{G}, {T}] "
                    f"with {U} labels"
                )
            packed["ids"][b, g, :inputs] = target.ids[:-1]
            packed["label_at"][b, g, :labels] = np.arange(target.label_start - 1, inputs)
            packed["labels"][b, g, :labels] = target.ids[target.label_start :]
            packed["label_mask"][b, g, :labels] = True
    return packed
