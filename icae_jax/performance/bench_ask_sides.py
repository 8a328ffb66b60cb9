"""The sides of `icae bench ask`: processes that live as long as the benchmark and take turns.

`python -m icae_jax.performance.bench_ask_sides` reads requests on standard input, one line of JSON
each, and prints an answer to each as one line of JSON. The first request, `{"side": …}`, says who
answers.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from icae_jax.errors import UserError
from icae_jax.performance.worker import MARK

MODULE = "icae_jax.performance.bench_ask_sides"


class Side:
    """A side in a process of its own, to be used in a `with` statement.

    Args: those of the side's function in `SIDES`.
    """

    def __init__(self, name: str, **arguments: Any):
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the side)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen([sys.executable, "-m", MODULE], text=True, **pipes)
        self.facts = self._ask({"side": name, **arguments})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, what: str, **arguments: Any) -> Any:
        """The answer of a method of the side.

        UserError if the arguments are at fault. RuntimeError, with the process's output, if it
        dies, which no input should cause.
        """
        return self._ask({"what": what, **arguments})

    def _ask(self, request):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            lines = iter(self._process.stdout.readline, "")
            line = next((line for line in lines if line.startswith(MARK)), "")
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name} {self._death()}")
        answer = json.loads(line.removeprefix(MARK))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["answer"]

    def _death(self):
        code = self._process.wait()
        why = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._log.seek(0)
        return f"failed ({why}): {self._log.read().decode(errors='replace').strip()[-2000:]}"


# ---------------------------------------------------------------------------------- in the process


class Ours:
    """What the process of our side answers, see `bench_ask_ways`."""

    def __init__(self, **subject: Any):
        from icae_jax.performance import bench_ask_ways, memory_use

        self.ways = bench_ask_ways.Ways(bench_ask_ways.Subject(**subject))
        self.facts = self.ways.describe()
        self._memory = memory_use.Peak()
        self._throughput = None

    def check(self, contexts, new_tokens):
        """`Ways.check`."""
        self.ways.check(contexts, new_tokens)

    def prompts(self, tokens, requests):
        """`Ways.prompts`."""
        return self.ways.prompts(tokens, requests)

    def run(self, way, tokens, requests, new_tokens):
        """`Ways.run`."""
        return self.ways.run(way, tokens, requests, new_tokens)

    def throughput(self, drawn, rows):
        """`bench_ask_throughput.Throughput.run`."""
        from icae_jax.performance.bench_ask_throughput import Throughput

        if self._throughput is None:
            self._throughput = Throughput(self.ways.compressor, list(map(tuple, drawn)))
        return self._throughput.run(rows)

    def peak(self, **run):
        """Bytes at the peak of a run, when all is compiled and at hand, and before the first.

        run: the arguments of `run`.
        """
        return _peak(self._memory, lambda: self.run(**run))


class Theirs:
    """What transformers' process answers, see `bench_ask_transformers`."""

    def __init__(self, **arguments: Any):
        from icae_jax.performance import bench_ask_transformers, memory_use

        self._model = bench_ask_transformers.Transformers(**arguments)
        self.facts, self._memory = self._model.facts, memory_use.Peak()

    def run(self, **run):
        """`Transformers.run`."""
        return self._model.run(**run)

    def peak(self, **run):
        """As of `Ours`."""
        return _peak(self._memory, lambda: self.run(**run))


def _peak(memory, run):
    run()
    memory.start_again()
    run()
    return {"peak_bytes": memory.read(), "loaded_bytes": memory.before}


SIDES: Mapping[str, type] = {"ours": Ours, "transformers": Theirs}


def main() -> None:
    """Answers until standard input ends."""
    side = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if side is None:
                side = SIDES[request.pop("side")](**request)
                answer = {"answer": side.facts}
            else:
                answer = {"answer": getattr(side, request.pop("what"))(**request)}
        except UserError as error:
            answer = {"error": str(error)}
        print(MARK + json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
