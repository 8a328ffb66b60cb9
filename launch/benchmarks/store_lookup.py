"""Makes a store of many small entries without a model, and times look-ups in it.

    python launch/benchmarks/store_lookup.py --workdir runs/store_lookup --entries 1000000

Prints one JSON object: minutes to fill the store, and milliseconds (median, 99th percentile, most)
to find an entry by its id and read its memory, checksum compared: warm, in ids drawn at random, and
cold, where a new process opens the store after its files were dropped from the page cache. Numbers
are random; ids are of 16 random hex digits, so that they arrive in no order.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.inference import store
from icae_jax.inference.origin import Origin

CONFIG = CompressionConfig(k=4, rate=4)
SIZE = 64  # numbers of a memory token
WARM_UP = 1000  # look-ups that are not counted


def ids_of(entries: int) -> list[str]:
    """The ids of a store, the same in every process."""
    numbers = np.random.default_rng(0).integers(0, 2**63, entries)
    return [
        f"{number:016x}"
        for number in np.unique(numbers)[
            np.random.default_rng(1).permutation(len(np.unique(numbers)))
        ]
    ]


def fill(path: pathlib.Path, ids: list[str], a_shard: int) -> None:
    info = store.Info(Origin(CONFIG, "b" * 64, "a" * 64, "/adapter"), (SIZE,), (2, 1, 8))
    rng = np.random.default_rng(2)
    lengths = np.asarray([[16]])
    template = memories.place(
        memories.Slots, {"slots": np.zeros((1, CONFIG.k, SIZE), np.float32)}, lengths, CONFIG
    )
    with store.Writer(path, info) as writer:
        for start in range(0, len(ids), a_shard):
            some = ids[start : start + a_shard]
            slots = rng.standard_normal((len(some), 1, CONFIG.k, SIZE), np.float32)
            writer.add_shard(
                [
                    store.NewEntry(text, text, template.replace(slots=x), None, {"number": start})
                    for text, x in zip(some, slots, strict=True)
                ]
            )
            print(f"{start + len(some):,} of {len(ids):,}", file=sys.stderr, flush=True)


def look_up(path: pathlib.Path, wanted: list[str]) -> list[float]:
    """Milliseconds of each look-up, the entry's memory read."""
    times = []
    with store.open_store(path) as opened:
        for text in wanted:
            start = time.perf_counter()
            memory = opened[text].memory
            times.append(1000 * (time.perf_counter() - start))
            assert memory.slots.shape == (1, CONFIG.k, SIZE)
    return times


def drop_from_page_cache(path: pathlib.Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def quantiles(times: list[float]) -> dict[str, float]:
    median, p99 = np.percentile(times, (50, 99))
    return {"median": round(median, 4), "p99": round(p99, 4), "most": round(max(times), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--a_shard", type=int, default=10_000, help="entries of a shard")
    parser.add_argument("--look_ups", type=int, default=20_000)
    parser.add_argument("--cold", type=int, default=20, help="processes that look up one each")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the id that a cold process looks up
    args = parser.parse_args()
    path = args.workdir / "store"
    if args.one:
        print(look_up(path, [args.one])[0])
        return
    ids = ids_of(args.entries)
    result = {"entries": len(ids), "a_shard": args.a_shard}
    if not store.exists(path):
        start = time.perf_counter()
        fill(path, ids, args.a_shard)
        result["fill_minutes"] = round((time.perf_counter() - start) / 60, 2)
    with store.open_store(path) as opened:
        result["stats"] = opened.stats()
    wanted = np.random.default_rng(3).choice(ids, WARM_UP + args.look_ups).tolist()
    result["warm_ms"] = quantiles(look_up(path, wanted)[WARM_UP:])
    cold = []
    for text in wanted[: args.cold]:
        drop_from_page_cache(path)
        command = [sys.executable, __file__, "--workdir", args.workdir, "--one", text]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        cold.append(float(ended.stdout))
    if cold:
        result["cold_ms"] = quantiles(cold)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
