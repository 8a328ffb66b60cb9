"""`icae bench serve --first_token`: a question on a stored document, against one on its text.

Ways to ask, which take turns in every round, each round on a document of its own:

    stored    the first question on a document: its memory is read from the store
    kept      the next one, when the server has the memory at hand
    full      the base reads the text itself, uncompressed
"""

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable
from typing import Any

from icae_jax.errors import UserError
from icae_jax.performance.bench import spread
from icae_jax.performance.bench_ask_ways import QUESTION, Subject
from icae_jax.performance.bench_serve_client import Answered
from icae_jax.performance.bench_serve_requests import CHAT, passage

WAYS = ("stored", "kept", "full")
QUESTIONS = {"stored": QUESTION, "kept": "Who is it about?", "full": QUESTION}
NEW_TOKENS = 4
PREFIX = "icae-bench-first-"  # of the documents' ids
PEOPLE = 4  # of a passage, many of which make a text


def prepare(subject: Subject, adapter: str | None = None, store: str | None = None) -> None:
    """Makes what a server is to open, in a process of its own that leaves no device in use.

    adapter: folder for the subject's adapter. store: folder for an empty store that also keeps the
    keys and values which the decoder reads of a memory. UserError on bad input.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(_prepare, subject, adapter, store).result()


def _prepare(subject, adapter, store):
    from icae_jax.inference.store import Info, Writer
    from icae_jax.interop.adapters.folder import save_adapter

    compressor = subject.load()
    if adapter is not None:
        save_adapter(adapter, compressor.adapter)
        compressor = dataclasses.replace(subject, adapter=adapter).load()
    if store is not None:
        Writer(store, Info.of(compressor, kv=compressor.adapter.template.name)).close()


def measure(
    client: Any,
    context_tokens: int,
    rounds: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Seconds to the first token, each way: `ways`, and ratios to that of the full context, by how
    many times it comes sooner: `sooner`.

    client: a `Client`. context_tokens: of a document, within a few. UserError if the server refuses
    a request.
    """
    progress("counting tokens")
    words = words_of(client, context_tokens)
    ids: list[str] = []
    turns, tokens = [], set()
    try:
        for turn in range(rounds + 1):  # the first one compiles
            progress(f"round {turn} of {rounds}" if turn else "compiling")
            text = _words(words, f"{seed} {turn}")
            body = {"text": text, "id": f"{PREFIX}{turn:04}"}
            memory = client.call("POST", "/v1/memories", body)
            ids.append(memory["id"])
            tokens.add(memory["context_tokens"])
            reads = {"memory": memory["id"]}, {"context": text, "compress": False}
            answers = {way: _ask(client, way, reads[way == "full"]) for way in WAYS}
            turns.append({way: answer.first for way, answer in answers.items()})
    finally:
        for memory_id in ids:
            client.call("DELETE", f"/v1/memories/{memory_id}")
    del turns[0]
    return {
        "context_tokens": [min(tokens), max(tokens)],
        "memory_tokens": memory["memory_tokens"],
        "prompt_tokens": {way: answer.usage["prompt_tokens"] for way, answer in answers.items()},
        "ways": {way: spread([turn[way] for turn in turns]) for way in WAYS},
        "sooner": {way: spread([turn["full"] / turn[way] for turn in turns]) for way in WAYS[:-1]},
    }


def _ask(client, way, reads) -> Answered:
    message = {"role": "user", "content": QUESTIONS[way]}
    # With log-probabilities there is a chunk for a token that is no text yet.
    how = {"max_tokens": NEW_TOKENS, "stream": True, "logprobs": True}
    how["stream_options"] = {"include_usage": True}
    answer = client.ask(CHAT, {"messages": [message], **reads, **how})
    if answer.error:
        raise UserError(f"a question of way {way!r} is refused: {answer.error}")
    return answer


def _words(count: int, seed: str) -> str:
    """A text of so many words."""
    words: list[str] = []
    number = 0
    while len(words) < count:
        words += passage(f"first {seed} {number}", PEOPLE)[0].split()
        number += 1
    return " ".join(words[:count])


def words_of(client: Any, tokens: int) -> int:
    """How many words have about so many tokens, as the server counts them."""
    words = tokens // 2
    for _ in range(2):
        body = {"text": _words(words, "count"), "keep": False}
        counted = client.call("POST", "/v1/memories", body)["context_tokens"]
        words = max(1, round(words * tokens / counted))
    return words
