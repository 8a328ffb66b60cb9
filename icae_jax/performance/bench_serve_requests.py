"""What `icae bench serve` asks: documents and requests of mixed kinds and lengths, from a seed.

The texts are of the made-up world that the shipped base was trained on (`data.synthetic`); another
base reads them as English.
"""

import hashlib
import random
from typing import Any, NamedTuple

from icae_jax.data import synthetic

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What a request reads, with how often of twenty.
KINDS = {"memory": 8, "joined": 3, "context": 5, "text": 2, "nothing": 2}
PEOPLE = 2, 5  # fewest and most of a text
JOINED = 2, 4  # memories read together
EARLIER = 2  # most turns of a chat before the question
WORDS = 2, 16  # of the beginning that a completion goes on from
FEWEST_NEW = 4


class Drawn(NamedTuple):
    """A request. kind: of `KINDS`. path, body: of HTTP."""

    kind: str
    path: str
    body: dict[str, Any]


def passage(seed: str, people: int) -> tuple[str, list[str]]:
    """A text about so many people, and questions about it."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8])
    (row,) = synthetic.passages(number, 1, people)
    return row["context"], [question["question"] for question in row["questions"]]


def documents(seed: int, count: int) -> list[str]:
    """The texts of a store."""
    rng = random.Random(f"documents {seed}")
    return [passage(f"document {seed} {i}", rng.randint(*PEOPLE))[0] for i in range(count)]


def request(seed: int, number: int, ids: list[str], new_tokens: int) -> Drawn:
    """A request, which depends on seed, number and the ids alone.

    ids: of the store's memories. new_tokens: the most of an answer.
    """
    rng = random.Random(f"request {seed} {number}")
    kinds = KINDS if ids else {k: n for k, n in KINDS.items() if k not in ("memory", "joined")}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    text, questions = passage(f"request {seed} {number}", rng.randint(*PEOPLE))
    body: dict[str, Any] = {"max_tokens": rng.randint(min(FEWEST_NEW, new_tokens), new_tokens)}
    if kind == "memory":
        body["memory"] = rng.choice(ids)
    elif kind == "joined":
        body["memory"] = rng.sample(ids, min(len(ids), rng.randint(*JOINED)))
    elif kind in ("context", "text"):
        body["context"] = text
        if kind == "text":
            body["compress"] = False
    if rng.random() < 0.5:
        path = CHAT
        messages = []
        for _ in range(rng.randint(0, EARLIER)):
            messages.append({"role": "user", "content": rng.choice(questions)})
            messages.append({"role": "assistant", "content": rng.choice(text.split()).strip(".")})
        body["messages"] = [*messages, {"role": "user", "content": rng.choice(questions)}]
    else:
        path = COMPLETIONS
        body["prompt"] = " ".join(text.split()[: rng.randint(*WORDS)])
    if rng.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Drawn(kind, path, body)
