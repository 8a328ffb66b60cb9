"""Kills `icae compress --store` at random moments, again and again; `test_kill_storm.py` runs this.

    python tests/kill_storm.py FOLDER ADAPTER INPUT KILLS

Importing takes most of a run's time, so that it is done once: this process imports all, never
touches a device, and forks a child for each run. Prints one JSON object.
"""

import json
import os
import pathlib
import random
import select
import signal
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be in the children

import transformers.models.auto.tokenization_auto  # noqa: F401, what tokenizers are loaded by

from icae_jax.inference import store
from icae_jax.inference.store import upkeep
from icae_jax.workflows import compress_store, store_work

store_work.GROUP, store_work.WINDOW = 2, 10
SECONDS = 60  # after which a run that reports nothing hangs


class Run:
    """One run in a child, that tells of each shard as soon as it has reported it done."""

    def __init__(self, request):
        self.told, self._rest, self.ended = [], b"", False
        self._pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the bar

            def tell(ids):
                os.write(write, json.dumps(ids).encode() + b"\n")

            result = compress_store.compress_store(request, tell)
            os.write(write, json.dumps([]).encode() + b"\n")
            assert result["problems"] == 0
            os._exit(0)
        except BaseException:
            import traceback

            pathlib.Path(request.store + ".error").write_text(traceback.format_exc())
            os._exit(1)

    def read(self, seconds):
        """Waits so long for a report; returns whether one came, or the end."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        data = os.read(self._pipe, 1 << 16)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.told += [json.loads(line) for line in lines]
        return True

    def end(self):
        """Waits for the end; the exit status."""
        while not self.ended and self.read(SECONDS):
            pass
        os.close(self._pipe)
        return os.waitpid(self.pid, 0)[1]

    def kill(self):
        """Kills it; reports that came before are read."""
        os.kill(self.pid, signal.SIGKILL)
        status = self.end()
        return os.WIFSIGNALED(status)


def ids(run):
    return {text for shard in run.told for text in shard}


def held(path):
    """What a store holds: shards' bytes by name, rows of the index by id."""
    with store.open_store(path) as opened:
        names = sorted(opened.shards.names())
        shards = {
            name: (opened.shards.folder / f"{name}.safetensors").read_bytes() for name in names
        }
        return shards, {entry.id: (entry.as_json(), entry.spans) for entry in opened.find()}


def main(folder, adapter, source, kills):
    folder, rng = pathlib.Path(folder), random.Random(0)
    size = {"batch_size": 1}  # one program, so that runs start sooner
    whole = compress_store.Request(source, str(folder / "whole"), adapter, **size)
    began = time.monotonic()
    first = Run(whole)
    first.read(SECONDS)
    start = time.monotonic() - began  # until the first shard is reported
    assert first.end() == 0, (folder / "whole.error").read_text()
    shard = (time.monotonic() - began - start) / len(first.told)

    reported, killed, damage, lost, left, same, stores = set(), 0, [], [], [], True, 0
    stormy = None
    while killed < kills:
        if stormy is None:  # the last store is complete, as a fast machine makes it soon
            stores, reported = stores + 1, set()
            stormy = compress_store.Request(
                source, str(folder / f"stormy{stores}"), adapter, **size
            )
        run = Run(stormy)
        if rng.random() < 0.3:  # at any moment of the start, else while it writes
            time.sleep(rng.uniform(0, 1.2 * start))
        else:
            run.read(SECONDS)
            time.sleep(rng.expovariate(1 / shard))
        killed += run.kill()
        reported |= ids(run)
        if not store.exists(stormy.store):
            continue
        with store.open_store(stormy.store) as opened:
            verified = upkeep.verify(opened)
            damage += [str(one) for one in verified.damage]
            lost += sorted(reported - set(opened))
            left.append(len(opened))
        if (run.told and run.told[-1] == []) or killed == kills:
            same &= Run(stormy).end() == 0 and held(stormy.store) == held(whole.store)
            stormy = None
    print(
        json.dumps(
            {
                "kills": killed,
                "damage": damage,
                "lost": lost,
                "same": same,
                "stores": stores,
                "documents": len(held(whole.store)[1]),
                "shards": len(held(whole.store)[0]),
                "after_each_kill": left,
                "seconds": time.monotonic() - began,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
