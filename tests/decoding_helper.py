"""Greedy decoding of a batch by the engine, with the arrays of `greedy_loop`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from greedy_loop import Generated, Prompts

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.inference.devices import Devices
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling


def greedy(
    decoder: Decoder,
    prefix: Prefix,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    at_once: int | None = None,
    **options: Any,
) -> Generated:
    """As `greedy_loop.greedy`. at_once: the engine's rows, by default as many as prompts."""
    ids, lengths, starts = (np.asarray(x) for x in prompts[:3])
    B = len(ids)
    limits = np.full(B, max_new_tokens) if prompts.limits is None else np.asarray(prompts.limits)
    memories = np.asarray(prefix.mask).shape
    engine = Engine(
        decoder,
        Devices(None, decoder.base.config),
        rows=at_once or B,
        tokens=ids.shape[1] + max_new_tokens,
        memory_tokens=memories[1],
        **options,
    )
    requests = [
        Request(
            ids[i, : lengths[i]].tolist(),
            Sampling(max_new_tokens=int(limits[i])),
            int(starts[i]),
            prefix if memories[1] else None,
            i // (B // memories[0]),
            tuple(stop_ids),
            i,
        )
        for i in range(B)
    ]
    out = np.zeros((B, max_new_tokens), np.int32)
    ended = {running.request.tag: running for running in engine.run(requests)}
    assert len(ended) == B and not len(engine) and engine.free == engine.rows
    for i, running in ended.items():
        out[i, : len(running.ids)] = running.ids
    rows = [ended[i] for i in range(B)]
    columns = ([getattr(r, name) for r in rows] for name in ("stopped", "ties", "log_prob"))
    return Generated(out, np.asarray([len(r.ids) for r in rows]), *map(np.asarray, columns))
