"""`icae serve`: answers over HTTP, by OpenAI's own client, equal those of a `Compressor`."""

import json
import math

import numpy as np
import openai
import pytest
from cli_helpers import sentence
from serve_helpers import load, running, write_adapter

from icae_jax.inference import store
from icae_jax.inference.sampling import Sampling
from icae_jax.interop.prompts import Turn, conversation_ids

RNG = np.random.default_rng(7)
TEXTS = {"one": sentence(RNG, 12), "a/b c": sentence(RNG, 30), "three": sentence(RNG, 14)}
QUESTION = "who saw the cat ?"


@pytest.fixture(scope="module")
def compressor(tmp_path_factory, tiny_base):
    return load(write_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny_base))


@pytest.fixture(scope="module")
def server(compressor, tmp_path_factory):
    """A server of a store with the texts above."""
    path = tmp_path_factory.mktemp("served") / "store"
    with running(compressor, str(path)) as server:
        for memory_id, text in TEXTS.items():
            body = {"text": text, "id": memory_id, "metadata": {"words": len(text.split())}}
            assert server.post("/v1/memories", body)[0] == 201
        yield server


def chat(server, content=QUESTION, memory=None, **fields):
    """The answer of OpenAI's client."""
    extra = fields.pop("extra_body", {}) | ({} if memory is None else {"memory": memory})
    messages = content
    if isinstance(content, str):
        messages = [{"role": "user", "content": content}]
    return server.client.chat.completions.create(
        model=server.service.name, messages=messages, extra_body=extra, **{"max_tokens": 8} | fields
    )


def asked(compressor, memory, question=QUESTION, most=8, **sampling):
    """What the compressor answers itself."""
    (answer,) = compressor.ask(
        memory, [question], most, details=True, sampling=Sampling(**sampling)
    )
    return answer


def test_a_chat_about_a_memory_is_answered_as_by_the_compressor(server, compressor):
    """Breaks when the served prompt, its positions or its stop differ from `Compressor.ask`'s."""
    for memory_id, text in TEXTS.items():
        memory = compressor.compress(text)
        want = asked(compressor, memory)
        got = chat(server, memory=memory_id)
        assert got.choices[0].message.content == want.text != ""
        assert got.choices[0].finish_reason == ("stop" if want.stopped else "length")
        head = len(compressor.adapter.template.head)
        prompt = compressor.adapter.template.prompt(compressor.question_ids(QUESTION))
        usage = got.usage.model_dump()
        assert usage["memory_tokens"] == memory.tokens[0] > 0
        assert usage["context_tokens"] == memory.lengths.sum()
        assert usage["prompt_tokens"] == head + memory.tokens[0] + len(prompt)
        assert usage["completion_tokens"] == len(want.ids)


def test_a_stream_is_the_whole_answer_in_pieces(server):
    """Breaks when pieces are lost or doubled, or the usage does not come."""
    whole = chat(server, memory="one", max_tokens=12)
    chunks = list(
        chat(
            server, memory="one", max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices[0].delta.role for chunk in chunks[:1]] == ["assistant"]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 3  # as they come, not at the end
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_memories_are_read_together(server, compressor):
    """Breaks when ids are read in another order, or one is left out."""
    ids = ["three", "one"]
    joined = compressor.join([compressor.compress(TEXTS[i]) for i in ids])
    got = chat(server, memory=ids)
    assert got.choices[0].message.content == asked(compressor, joined).text
    assert got.usage.model_dump()["memory_tokens"] == joined.tokens[0]
    longer = chat(server, memory=["three", "a/b c"]).usage.model_dump()["memory_tokens"]
    assert longer > joined.tokens[0]  # another join that begins alike
    other = compressor.join([compressor.compress(TEXTS[i]) for i in reversed(ids)])
    assert asked(compressor, joined).log_prob != asked(compressor, other).log_prob


def test_a_context_is_compressed_once_and_kept(server, compressor):
    """Breaks when a context is not the memory of its text, or is compressed for every question."""
    text, compressed = sentence(RNG, 25), []
    patched, server.service.memories._compressed = (
        server.service.memories._compressed,
        lambda *figures: compressed.append(figures),
    )
    try:
        got = [chat(server, q, extra_body={"context": text}) for q in (QUESTION, "what ran ?")]
    finally:
        server.service.memories._compressed = patched
    memory = compressor.compress(text)
    wanted = [asked(compressor, memory, q).text for q in (QUESTION, "what ran ?")]
    assert [answer.choices[0].message.content for answer in got] == wanted
    assert [tokens for tokens, _ in compressed] == [memory.lengths.sum()]


def test_a_context_behind_a_memory(server, compressor):
    """Breaks when one of the two is left out, or they change places."""
    text = sentence(RNG, 11)
    joined = compressor.join([compressor.compress(TEXTS["one"]), compressor.compress(text)])
    got = chat(server, memory="one", extra_body={"context": text})
    assert got.choices[0].message.content == asked(compressor, joined).text


def decoded(compressor, prompt, most=8):
    """Greedy text of the base alone."""
    from icae_jax.evaluation import plain

    return plain.generate(compressor, [prompt], [most], stop=compressor.adapter.template.stop)[0]


def test_without_a_memory_the_base_answers(server, compressor):
    """Breaks when the base alone does not read its chat template, or a raw context not at all."""
    tokenizer = compressor.base.tokenizer

    def framed(*contents):
        roles = ("system", "user") if len(contents) > 1 else ("user",)
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    none, full = framed(QUESTION), framed(f"{TEXTS['one']}\n{QUESTION}")
    got = chat(server)
    assert got.choices[0].message.content == decoded(compressor, none).text
    assert got.usage.prompt_tokens == len(none) and not got.usage.model_dump()["memory_tokens"]
    read = chat(server, extra_body={"context": TEXTS["one"], "compress": False})
    assert read.choices[0].message.content == decoded(compressor, full).text
    assert read.usage.prompt_tokens == len(full) and decoded(compressor, full).text != ""
    messages = [{"role": "system", "content": "be old"}, {"role": "user", "content": QUESTION}]
    told = chat(server, messages)
    assert told.choices[0].message.content == decoded(compressor, framed("be old", QUESTION)).text


def test_an_answer_goes_back_as_an_earlier_turn(server):
    """Breaks when what OpenAI's client has from an answer is refused with the next question."""
    messages = [{"role": "user", "content": QUESTION}]
    messages.append(chat(server, messages, memory="one").choices[0].message)
    messages.append({"role": "user", "content": "where ?"})
    assert chat(server, messages, memory="one").choices[0].message.content


def test_a_replaced_text_is_not_read_in_a_joined_memory(compressor):
    """Breaks when memories read together are kept for the ids alone, or an old one comes back."""
    with running(compressor) as server:
        ids, texts = ["x", "y"], {}
        for memory_id in (*ids, "x"):
            texts[memory_id] = sentence(RNG, 13)
            body = {"text": texts[memory_id], "id": memory_id}
            before = server.service.memories.cache.get(("cache", "x"))
            assert server.post("/v1/memories", body)[0] == 201
            if len(texts) == 2:
                joined = compressor.join([compressor.compress(texts[i]) for i in ids])
                got = chat(server, memory=ids).choices[0].message.content
                assert got == asked(compressor, joined).text
        server.service.memories.prefix(before, template=True)  # of the old one, late
        assert server.service.memories.find("x") is not before


def test_earlier_turns_stand_before_the_question(server, compressor):
    """Breaks when turns are dropped or framed otherwise, or the system's words are lost."""
    turns = [Turn("be old\n\nwho ran ?", "the king"), Turn("where ?", "in the sea")]
    messages = [{"role": "system", "content": "be old"}]
    for question, answer in [("who ran ?", "the king"), ("where ?", "in the sea")]:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": QUESTION})
    template, tokenizer = compressor.adapter.template, compressor.base.tokenizer
    prompt = conversation_ids(turns, QUESTION, tokenizer, template)
    memory = compressor.compress(TEXTS["one"])
    got = chat(server, messages, memory="one", logprobs=True)
    head = len(template.head)
    assert got.usage.prompt_tokens == head + memory.tokens[0] + len(prompt)
    from icae_jax.inference.reading import Request

    ((want,),) = compressor.reader.generate(memory, [Request([prompt], 8)], "qa", 1)
    assert got.choices[0].message.content == want.text
    log_probs = [token.logprob for token in got.choices[0].logprobs.content]
    assert len(log_probs) == len(want.ids) and math.isclose(
        sum(log_probs), asked_log_prob(want), rel_tol=1e-4
    )


def asked_log_prob(generation):
    """The sum without the stop token's, which no log-probability of a response has."""
    if not generation.stopped:
        return generation.log_prob
    pytest.skip("the answer stopped; its stop token is in the sum")


def test_choices_are_drawn_with_their_own_seeds(server, compressor):
    """Breaks when n gives copies, or a seed another draw than the compressor's."""
    got = chat(server, memory="one", n=3, temperature=1.5, seed=5, top_p=0.9)
    texts = [choice.message.content for choice in got.choices]
    memory = compressor.compress(TEXTS["one"])
    how = {"temperature": 1.5, "top_p": 0.9}
    assert texts == [asked(compressor, memory, seed=5 + i, **how).text for i in range(3)]
    assert len(set(texts)) > 1
    again = chat(server, memory="one", temperature=1.5, seed=5, top_p=0.9)
    assert again.choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for chunk in chat(server, memory="one", n=3, temperature=1.5, seed=5, top_p=0.9, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_log_probabilities_are_the_compressors(server, compressor):
    """Breaks when they belong to other tokens, or the most likely ones are not given."""
    got = chat(server, memory="one", logprobs=True, top_logprobs=3)
    want = asked(compressor, compressor.compress(TEXTS["one"]), alternatives=3)
    rows = got.choices[0].logprobs.content
    assert len(rows) == len(want.ids) > 2
    for row, token, (log_prob, others) in zip(rows, want.ids, want.alternatives, strict=True):
        assert row.token == compressor.base.tokenizer.decode([token])
        assert row.bytes == list(row.token.encode())
        assert math.isclose(row.logprob, log_prob, abs_tol=1e-4)
        assert len(row.top_logprobs) == 3 and row.top_logprobs[0].logprob >= row.logprob - 1e-6
        assert np.allclose([o.logprob for o in row.top_logprobs], [*others.values()], atol=1e-4)
    streamed = []
    for chunk in chat(server, memory="one", logprobs=True, top_logprobs=3, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [row.token for row in streamed] == [row.token for row in rows]


def test_an_answer_ends_before_a_stop_text(server, compressor):
    """Breaks when a stop text is shown, or ignored."""
    whole = chat(server, memory="one", max_tokens=12).choices[0].message.content
    stop = whole.split()[2]
    got = chat(server, memory="one", max_tokens=12, stop=[stop, "never there"])
    assert got.choices[0].finish_reason == "stop"
    assert got.choices[0].message.content == whole[: whole.index(stop)]


def test_completions_go_on_behind_a_memory(server, compressor):
    """Breaks when a completion is framed by a template, or prompts of ids are read otherwise."""
    tokenizer, memory = compressor.base.tokenizer, compressor.compress(TEXTS["one"])
    ids = compressor.ids("the king saw")
    from icae_jax.inference.reading import Request

    ((want,),) = compressor.reader.generate(memory, [Request([ids], 6)], "lm", 1)
    create = server.client.completions.create
    name = server.service.name
    for prompt in ("the king saw", ids, [ids, "the king saw"][:1]):
        got = create(
            model=name, prompt=prompt, max_tokens=6, logprobs=2, extra_body={"memory": "one"}
        )
        choice = got.choices[0]
        assert choice.text == want.text
        assert choice.logprobs.tokens == [tokenizer.decode([i]) for i in want.ids]
        assert len(choice.logprobs.top_logprobs[0]) == 2
        lengths = [len(token) for token in choice.logprobs.tokens]
        assert choice.logprobs.text_offset == [sum(lengths[:i]) for i in range(len(lengths))]
    plain = create(model=name, prompt=["the king saw", "the dog"], max_tokens=4, n=2)
    assert [choice.index for choice in plain.choices] == [0, 1, 2, 3]
    assert plain.usage.prompt_tokens == len(ids) + len(compressor.ids("the dog"))
    texts = [choice.text for choice in plain.choices]
    assert texts[0] == texts[1] == decoded(compressor, ids, 4).text and texts[2] == texts[3]
    streamed = "".join(
        chunk.choices[0].text for chunk in create(model=name, prompt=ids, max_tokens=4, stream=True)
    )
    assert streamed == texts[0]


def test_restoring(server, compressor):
    """Breaks when a text is restored behind the template's head, or cut short."""
    for memory_id, text in TEXTS.items():
        memory = compressor.compress(text)
        (want,) = compressor.restore(memory, details=True)
        path = f"/v1/memories/{memory_id.replace('/', '%2F').replace(' ', '%20')}/restore"
        status, got = server.post(path)
        assert status == 200 and got["id"] == memory_id and got["text"] == want.text != ""
        assert got["finish_reason"] == ("stop" if want.stopped else "length")
        status, lines, _ = server.ask("POST", path, {"stream": True})
        events = [line[6:] for line in lines.split("\n") if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events[:-1]]
        assert "".join(chunk["delta"] for chunk in chunks) == want.text and events[-1] == "[DONE]"
    assert (
        server.post("/v1/memories/one/restore", {"max_tokens": 2})[1]["finish_reason"] == "length"
    )


def test_documents_come_and_go(compressor, tmp_path):
    """Breaks when an id is mangled, a page skips or repeats one, or what was removed is read."""
    ids = [f"d/{i}%../'; DROP TABLE entries" for i in range(5)]
    with running(compressor, str(tmp_path / "s")) as server:
        for i, memory_id in enumerate(ids):
            body = {"text": sentence(RNG, 10 + i), "id": memory_id, "metadata": {"n": i}}
            status, made = server.post("/v1/memories", body)
            assert status == 201 and made["kept"] == "store" and made["metadata"] == {"n": i}
            assert server.post("/v1/memories", body)[0] == 200  # as it is
        seen, after = [], ""
        while True:
            _, page, _ = server.ask("GET", f"/v1/memories?limit=2{after}")
            seen += [one["id"] for one in page["data"]]
            if not page["has_more"]:
                break
            after = "&after=" + quoted(page["last_id"])
        assert seen == ids
        _, page, _ = server.ask("GET", "/v1/memories?prefix=" + quoted(ids[3]))
        assert [one["metadata"] for one in page["data"]] == [{"n": 3}]
        path = "/v1/memories/" + quoted(ids[2])
        assert server.ask("GET", path)[1] == page_of(server, ids[2])
        assert chat(server, memory=ids[2]).choices[0].message.content
        status, gone, _ = server.ask("DELETE", path)
        assert status == 200 and gone == {
            "id": ids[2],
            "object": "memory.deleted",
            "deleted": True,
        }
        assert server.ask("GET", path)[0] == server.ask("DELETE", path)[0] == 404
        with pytest.raises(openai.NotFoundError, match="neither stored nor kept"):
            chat(server, memory=ids[2])
        text = sentence(RNG, 20)
        replaced = {"text": text, "id": ids[0], "metadata": {}}
        changed = body | {"metadata": {"n": "other"}}
        assert server.post("/v1/memories", changed)[1]["metadata"] == {"n": "other"}
        assert server.ask("GET", "/v1/memories/" + quoted(ids[4]))[1]["metadata"] == {"n": "other"}
        assert server.post("/v1/memories", replaced)[0] == 201
        want = asked(compressor, compressor.compress(text)).text
        assert chat(server, memory=ids[0]).choices[0].message.content == want
    with store.open_store(tmp_path / "s") as opened:
        assert set(opened) == {*ids} - {ids[2]}


def page_of(server, memory_id):
    """A document's row in the list."""
    _, page, _ = server.ask("GET", "/v1/memories?limit=100")
    return next(one for one in page["data"] if one["id"] == memory_id)


def quoted(text):
    """A text in a URL."""
    from urllib.parse import quote

    return quote(text, safe="")


def test_without_a_store_memories_are_kept_until_others_need_the_room(compressor):
    """Breaks when the cache grows without bound, or forgets what was just used."""
    with running(compressor, cache_mib=1) as server:
        status, first = server.post("/v1/memories", {"text": TEXTS["one"]})
        assert status == 201 and first["kept"] == "cache" and first["id"].startswith("mem-")
        assert server.post("/v1/memories", {"text": TEXTS["one"]})[0] == 200
        named = server.post("/v1/memories", {"text": TEXTS["three"], "id": "x"})[1]
        _, page, _ = server.ask("GET", "/v1/memories")
        assert sorted(one["id"] for one in page["data"]) == sorted([first["id"], "x"])
        want = asked(compressor, compressor.compress(TEXTS["three"])).text
        assert chat(server, memory=named["id"]).choices[0].message.content == want
        cache = server.service.memories.cache
        cache.most = 2 * cache.used
        for i in range(12):
            assert chat(server, memory="x").choices[0].message.content == want
            assert server.post("/v1/memories", {"text": sentence(RNG, 15 + i)})[0] == 201
        assert cache.used <= cache.most
        assert server.ask("GET", f"/v1/memories/{first['id']}")[0] == 404
        assert server.ask("GET", "/v1/memories/x")[0] == 200
        assert server.ask("DELETE", "/v1/memories/x")[0] == 200
        assert server.ask("GET", "/v1/memories/x")[0] == 404


def test_a_ratio_is_met_as_near_as_the_adapter_can(tmp_path, tiny_base):
    """Breaks when ratio and memory tokens are ignored, or memories of two k are joined."""
    path = write_adapter(tmp_path / "a", tiny_base, k=4, rate=4, k_choices=(1, 4))
    compressor = load(path)
    with running(compressor) as server:
        text = sentence(RNG, 16)
        made = [
            server.post("/v1/memories", {"text": text} | how)[1]
            for how in ({}, {"ratio": 14.0}, {"memory_tokens": 1}, {"ratio": 4.0})
        ]
        ks = [one["memory_tokens_per_segment"] for one in made]
        assert ks[0] == ks[3] == 4 and ks[1] == ks[2] == 1
        want = asked(compressor, compressor.compress(text, k=1)).text
        assert chat(server, memory=made[1]["id"]).choices[0].message.content == want
        got = chat(server, extra_body={"context": text, "ratio": 14.0})
        assert got.choices[0].message.content == want
        with pytest.raises(openai.BadRequestError, match="cannot be read together"):
            chat(server, memory=[made[0]["id"], made[1]["id"]])
        status, reply = server.post(
            "/v1/memories", {"text": text, "ratio": 4.0, "memory_tokens": 1}
        )
        assert status == 400 and reply["error"]["param"] == "ratio"
        assert server.ask("GET", "/v1/models")[1]["data"][0]["compressor"][
            "memory_tokens_per_segment"
        ] == [1, 4]


def test_kv_memories_and_a_store_with_kv(tmp_path, tiny_base):
    """Breaks when K/V memories are not served, or stored K/V are read behind another head."""
    from icae_jax.cli import main as cli

    adapter = write_adapter(tmp_path / "x500", tiny_base, method="x500")
    compressor = load(adapter)
    slots = write_adapter(tmp_path / "icae", tiny_base)
    source = tmp_path / "texts.jsonl"
    source.write_text(json.dumps({"id": "t", "text": TEXTS["one"]}) + "\n")
    argv = ["compress", "--adapter", str(slots), "--input", str(source), "--kv"]
    assert cli.main([*argv, "--store", str(tmp_path / "kv")]) == 0
    with running(compressor, str(tmp_path / "s")) as server:
        assert server.post("/v1/memories", {"text": TEXTS["one"], "id": "t"})[0] == 201
        want = asked(compressor, compressor.compress(TEXTS["one"])).text
        assert chat(server, memory="t").choices[0].message.content == want
    compressor = load(slots)
    with running(compressor, str(tmp_path / "kv")) as server:
        assert server.post("/v1/memories", {"text": TEXTS["three"], "id": "u"})[0] == 201
        kept = server.service.memories.find("t")
        assert [*kept.prefixes] == [True]  # it was stored, behind the template's head
        for memory_id, text in (("t", TEXTS["one"]), ("u", TEXTS["three"])):
            memory = compressor.compress(text)
            got = chat(server, memory=memory_id).choices[0].message.content
            assert got == asked(compressor, memory).text
            restored = server.post(f"/v1/memories/{memory_id}/restore")[1]["text"]
            assert restored == compressor.restore(memory)[0]
    with store.open_store(tmp_path / "kv") as opened:
        assert opened["u"].has_kv  # as all of that store


def test_what_the_model_says_of_itself(server, compressor):
    """Breaks when clients that list models, or the page, are told wrong facts."""
    (model,) = server.client.models.list().data
    assert model.id == server.service.name == "base-icae"
    facts = model.model_dump()["compressor"]
    assert facts["method"] == "icae" and facts["context_positions"] == 256
    assert facts["documents"] and facts["writable"]
    longest = facts["max_context_tokens"]
    text = " ".join(["cat"] * (longest - 1))  # and <s>
    assert server.post("/v1/memories", {"text": text, "keep": False})[0] == 201
    assert chat(server, "who", extra_body={"context": text}, max_tokens=1).choices
    status, reply = server.post("/v1/memories", {"text": text + " cat", "keep": False})
    assert status == 400 and reply["error"]["code"] == "context_length_exceeded"
    assert server.client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-9")


def test_many_clients_at_once_get_the_answers_of_one(server, compressor):
    """Breaks when rows of the engine mix, or an answer depends on its neighbours."""
    import concurrent.futures

    rng, jobs = np.random.default_rng(3), []
    for i in range(40):
        fields = {"max_tokens": int(rng.integers(1, 12))}
        if i % 4 == 1:
            fields["memory"] = "one"
        elif i % 4 == 2:
            fields["memory"] = ["a/b c", "three"]
        elif i % 4 == 3:
            fields["extra_body"] = {"context": TEXTS["three"] + " the cat" * (i // 8)}
        jobs.append((sentence(rng, int(rng.integers(2, 20))), fields))

    def run(job):
        answer = chat(server, job[0], **job[1])
        return answer.choices[0].message.content, answer.usage.completion_tokens

    alone = [run(job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(run, jobs))
    assert together == alone and len(set(alone)) > 20
    assert server.wait_idle()
