"""Stores of tests: small random memories of no base, slots and K/V."""

import numpy as np

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Prefix
from icae_jax.inference import store
from icae_jax.inference.origin import Origin

SLOTS = CompressionConfig(k=2, rate=4)
X500 = CompressionConfig(method="x500", k=2, rate=4)
IDENTITY = {"weights": "w" * 64, "tokenizer": "t" * 64}
HEAD = (5, 6, 7)


def origin(config=SLOTS, base="b", adapter="a", **changes):
    return Origin(
        config, base * 64, adapter * 64, "/adapter", **{"base_identity": IDENTITY} | changes
    )


INFO = store.Info(origin(), (8,), (3, 1, 6), base="/base")
KV_INFO = store.Info(origin(X500), (3, 1, 6), (3, 1, 6), kv="plain", head=HEAD)


def entry(text_id, lengths, seed=0, metadata=None):
    """A new entry of slots: two of eight numbers for each segment."""
    slots = np.random.default_rng(seed).standard_normal((1, 2 * len(lengths), 8), np.float32)
    memory = memories.place(memories.Slots, {"slots": slots}, np.asarray([lengths]), SLOTS)
    return store.NewEntry(text_id, f"hash of {text_id}", memory, None, metadata or {})


def kv_entry(text_id, lengths, seed=0):
    """A new entry of K/V, with a prefix behind `HEAD`."""
    rng, count = np.random.default_rng(seed), 2 * len(lengths)
    k, v = rng.standard_normal((2, 3, 1, count, 1, 6), np.float32)
    memory = memories.place(memories.KV, {"k": k, "v": v}, np.asarray([lengths]), X500)
    h = len(HEAD)
    k, v = rng.standard_normal((2, 3, 1, h + count, 1, 6), np.float32)
    positions = np.concatenate([np.arange(h)[None], h + np.asarray(memory.positions)], 1)
    prefix = Prefix(k, v, np.ones((1, h + count), bool), positions, h + np.asarray(memory.end))
    return store.NewEntry(text_id, f"hash of {text_id}", memory, prefix)


def write(path, entries, info=INFO):
    """A store of entries in one shard, opened."""
    with store.Writer(path, info) as writer:
        writer.add_shard(entries)
    return store.open_store(path)


def fill(path, process, groups, pipe):
    """Writes every other group of a store's texts, as one of two processes; tells of each when it
    is done. Process 0 writes one text and some of its groups again and again, and merges.
    """
    with store.Writer(path, INFO, process, 2) as writer:
        for group in range(process, groups, 2):
            ids = [f"{group}-{i}" for i in range(10)] + ["shared"] * (process == 0)
            if len(writer.known(ids)) < len(ids) or (process == 0 and group % 10 == 0):
                writer.add_shard([entry(text, [4, 3], group) for text in ids])
            pipe.send(group)
            if process == 0 and group % 20 == 0:
                writer.merge()
