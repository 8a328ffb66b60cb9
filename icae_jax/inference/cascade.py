"""The cascade (FlexComp, arXiv 2609.11192): the smallest memory whose answer is likely enough.

Texts are read at the first k of a ladder. A question whose answer is less likely than a threshold
is asked again at the next k; the last answer is taken as it is.
"""

import math
from collections.abc import Callable, Sequence

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Prefix
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError
from icae_jax.inference.batching import few_shapes
from icae_jax.inference.reading import Generation, MemoryReader, Request, check_most

LIKELY = math.log(0.9)  # nats a token: each token of the answer has probability 0.9, in the mean

Rung = Callable[[list[int]], Memory]
"""The memory, at one k, of the texts of these rows; a row may come several times."""


def checked(
    ladder: Sequence[int], config: CompressionConfig, name: str = "ladder"
) -> tuple[int, ...]:
    """A ladder's numbers. UserError unless they rise and the compressor knows them all."""
    ks = list(ladder)
    if not ks or ks != sorted(set(ks)):
        raise UserError(f"{name} is {tuple(ks)}; give rising memory tokens per segment, as 2, 8")
    return tuple(config.choose(k) for k in ks)


def rungs_of(memories: Sequence[Memory]) -> list[Rung]:
    """The rungs of memories. UserError unless they are of the same texts, of rising k."""
    if not memories:
        raise UserError("there is no memory to ask; give at least one")
    if len({len(memory) for memory in memories}) > 1:
        counts = ", ".join(str(len(memory)) for memory in memories)
        raise UserError(f"the memories of a ladder hold {counts} texts; give those of the same")
    ks = [memory.tokens_per_segment for memory in memories]
    if ks != sorted(set(ks)):
        raise UserError(f"the memories of a ladder have k {ks}; give them by rising k")

    def rung(memory):
        every = list(range(len(memory)))
        return lambda rows: memory if rows == every else memory[rows]

    return [rung(memory) for memory in memories]


def generate(
    reader: MemoryReader,
    rungs: Sequence[Rung],
    requests: Sequence[Request],
    threshold: float,
    batch_size: int,
    prefixes: Sequence[Prefix] | None = None,
) -> list[list[Generation]]:
    """Answers by the cascade, nested as the prompts are.

    Each is the `Generation` of the memory that gave it. Its `tokens_read` and `ties` are sums over
    all memories that were read for it.

    Args:
      reader: of memories.
      rungs: the memories, the smallest first.
      requests: the questions of each text.
      threshold: the least mean log-probability of an answer's tokens, stop token included; nats.
      batch_size: texts read at once.
      prefixes: of each text, where there is a single memory, which was read before.

    Raises:
      UserError: as `MemoryReader.generate` does, or threshold is no number.
    """
    if math.isnan(threshold):
        raise UserError(f"threshold is {threshold}; give nats per token, such as {LIKELY:.3f}")
    check_most(requests)  # before a memory is written
    answers = [[None] * len(request.prompts) for request in requests]
    left = {row: list(range(len(request.prompts))) for row, request in enumerate(requests)}
    for rung in rungs:
        if not left:
            break
        # Padded by repetition, so that memories are written in few shapes whatever number is left.
        rows = _repeated(list(left), few_shapes(len(left), min(len(requests), batch_size)))
        memory = rung(rows)
        again = [
            requests[row]._replace(prompts=[requests[row].prompts[i] for i in indices])
            for row, indices in left.items()
        ]
        memory = memory if len(memory) == len(again) else memory[: len(again)]
        generations = reader.generate(memory, again, "qa", batch_size, prefixes)
        unlikely = {}
        for (row, indices), of_row in zip(left.items(), generations, strict=True):
            for i, generation in zip(indices, of_row, strict=True):
                answers[row][i] = _with_earlier(generation, answers[row][i])
            below = [i for i in indices if answers[row][i].mean_log_prob < threshold]
            if below:
                unlikely[row] = below
        left = unlikely
    return answers


def _repeated(items: list, count: int) -> list:
    return [items[i % len(items)] for i in range(count)]


def _with_earlier(generation: Generation, earlier: Generation | None) -> Generation:
    """A generation with what was read before it."""
    if earlier is None:
        return generation
    return generation._replace(
        tokens_read=generation.tokens_read + earlier.tokens_read,
        ties=generation.ties + earlier.ties,
    )
