"""A chat over documents: what it reads, which turns are compressed, and what its commands say."""

import dataclasses
import errno
import os

import numpy as np
import pytest
from cli_helpers import sentence
from conftest import TINY, close, eight_devices, random_trained, write_jsonl

from icae_jax import files
from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.evaluation import plain
from icae_jax.inference import loading, stored
from icae_jax.inference.reading import MemoryReader, Request
from icae_jax.inference.sampling import GREEDY, Sampling
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.interop.prompts import Turn, conversation_ids
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.runtime import sharding
from icae_jax.workflows.chat import Chat
from icae_jax.workflows.chat_commands import Session
from icae_jax.workflows.chat_documents import Text, read_files
from icae_jax.workflows.chat_history import Split, Window, transcript

NEW = 6  # tokens of an answer
RNG = np.random.default_rng(3)
TEXTS = [Text(f"t{i}", sentence(RNG, n), f"text {i}") for i, n in enumerate((30, 12, 40))]
QUESTIONS = [sentence(RNG, n) for n in (4, 3, 5, 4, 6, 3, 4, 5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """The folder of an adapter of each method, and stores of the texts.

    The template has a head, trained tokens and an answer's frame. Store `stored` has 4 memory
    tokens per segment and the decoder's K/V, `small` has 1.
    """
    folder, base = tmp_path_factory.mktemp("chat"), bases.load_base(tiny_base)
    for method in ("icae", "x500"):
        adapter = adapters.Adapter(
            CompressionConfig(method=method, k=4, rate=4, k_choices=(1, 4)),
            LoraConfig(4, 2.0, 0.0),
            targets.make_template("mistral", base.tokenizer),
            random_trained(TINY, 4),
            str(tiny_base),
            base.fingerprint,
        )
        adapters.save_adapter(folder / method, adapter)
    rows = [{"id": text.id, "text": text.text} for text in TEXTS]
    source = write_jsonl(folder / "texts.jsonl", rows)
    argv = ["compress", "--adapter", str(folder / "icae"), "--input", source, "--store"]
    assert cli.main([*argv, str(folder / "stored"), "--kv"]) == 0
    assert cli.main([*argv, str(folder / "small"), "--k", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def icae(world):
    return loading.load(world / "icae")


@pytest.fixture(scope="module", params=["icae", "x500"])
def compressor(request, world, icae):
    return icae if request.param == "icae" else loading.load(world / request.param)


@pytest.fixture
def opened(world):
    _, opened = loading.load_with_store(world / "stored")
    with opened:
        yield opened


def said(chat, question):
    return "".join(chat.ask(question))


def memory_of(compressor, texts, turns=(), k=None):
    """Documents and older turns as one memory, by hand; None of nothing."""
    texts = [text.text for text in texts] + ([transcript(turns)] if turns else [])
    parts = [compressor.compress(text, k=k) for text in texts]
    return compressor.join(parts) if parts else None


def by_hand(compressor, memory, turns, question, most=NEW, sampling=GREEDY):
    """The answer behind a memory and turns in full."""
    ids = conversation_ids(turns, question, compressor.base.tokenizer, compressor.adapter.template)
    request = Request([ids], most, sampling=sampling)
    return compressor.reader.generate(memory, [request], "qa", 1)[0][0].text


# --- Asking ---


def test_a_first_answer_is_that_of_ask(compressor):
    """Breaks when documents are left out or out of order, the prompt or the sampling is another, or
    the text does not come in pieces.
    """
    memory = compressor.join([compressor.compress(text.text) for text in TEXTS[:2]])
    for sampling in (GREEDY, Sampling(temperature=0.8, seed=3, stop=("cat",))):
        chat = Chat(compressor, TEXTS[:2], max_new_tokens=NEW, sampling=sampling)
        pieces = list(chat.ask(QUESTIONS[0]))
        (want,) = compressor.ask(memory, QUESTIONS[:1], NEW, sampling=sampling)
        assert "".join(pieces) == want and len(pieces) > 1
        assert chat.turns == [Turn(QUESTIONS[0], want)]
    swapped = compressor.join([compressor.compress(text.text) for text in TEXTS[1::-1]])
    answers = {
        compressor.ask(m, QUESTIONS[:4], NEW)[i] for m in (memory, swapped) for i in range(4)
    }
    assert len(answers) > 4  # the order of documents matters


def test_later_answers_stand_behind_the_turns(compressor):
    """Breaks when a turn is left out, or framed otherwise than `conversation_ids` does."""
    chat, memory = Chat(compressor, TEXTS[:1], max_new_tokens=NEW), memory_of(compressor, TEXTS[:1])
    engines = set()
    for i, question in enumerate(QUESTIONS[:4]):
        want = by_hand(compressor, memory, chat.turns, question)
        assert said(chat, question) == want
        assert i == 0 or want != by_hand(compressor, memory, [], question)
        engines |= set(map(id, chat._engines.values()))
    assert chat.split == Split() and len(chat.turns) == 4 and len(engines) == 1
    ids = conversation_ids(
        chat.turns[:3], QUESTIONS[3], compressor.base.tokenizer, compressor.adapter.template
    )
    end = len(compressor.adapter.template.head) + int(memory.end[0])
    assert chat.status.positions == end + len(ids) + len(chat.last.ids)


def test_a_mesh_answers_alike(world, icae):
    """Breaks when one text cannot be split over several devices."""
    alone = Chat(icae, TEXTS[:1], max_new_tokens=NEW, history_tokens=20)
    with eight_devices():
        mesh = sharding.local_mesh(sharding.parse("fsdp=2"))
        chat = Chat(
            loading.load(world / "icae", mesh=mesh),
            TEXTS[:1],
            max_new_tokens=NEW,
            history_tokens=20,
        )
        for question in QUESTIONS[:3]:
            said(chat, question)
        restored = "".join(chat.restore("t0"))
    for question in QUESTIONS[:3]:
        said(alone, question)
    assert chat.turns == alone.turns and chat.split == alone.split == Split(0, 2)
    assert restored == "".join(alone.restore("t0"))


@pytest.mark.parametrize("documents", [1, 0])
def test_older_turns_are_compressed_behind_the_documents(compressor, documents):
    """Breaks when older turns are lost, still read in full, or compressed otherwise than as one
    text; when their memory does not stand behind the documents'; when it is not read.
    """
    texts = TEXTS[:documents]
    chat = Chat(compressor, texts, max_new_tokens=NEW, history_tokens=60)
    splits, template = [], plain.template_of(compressor)
    for question in QUESTIONS * 2:
        before = list(chat.turns)
        got = said(chat, question)
        forgotten, compressed = chat.split
        assert forgotten == 0
        memory = memory_of(compressor, texts, before[:compressed])
        if memory is None:
            ids = conversation_ids(before, question, compressor.base.tokenizer, template)
            (want,) = plain.generate(
                compressor, [[*template.head, *ids]], [NEW], stop=template.stop
            )
            want = want.text
        else:
            close(*(read_of(compressor, m) for m in (chat._memory(chat.split)[0], memory)))
            want = by_hand(compressor, memory, before[compressed:], question)
        assert got == want
        splits.append(compressed)
    assert splits[0] == 0 and splits == sorted(splits) and len(set(splits)) > 2
    status = chat.status
    assert status.turns + status.turns_in_memory == len(chat.turns) == 16
    assert status.turns_in_memory == splits[-1] and status.memory_tokens == 8 * documents
    tokens = len(compressor.context_ids(transcript(chat.turns[: splits[-1]])))
    assert status.turn_memory_tokens == 4 * -(-tokens // 16)


def read_of(compressor, memory):
    """What was written for the real tokens of a memory, and where it is read."""
    x = np.concatenate([np.moveaxis(np.asarray(x), memory.TEXT_AXIS, 0)[0].reshape(-1)
                        for x in memory.contents.values()])  # fmt: skip
    return np.concatenate([x, np.asarray(memory.positions)[0], np.asarray(memory.end)])


def test_a_long_chat_stays_within_the_positions(compressor, monkeypatch):
    """Breaks when what is read grows without end, the oldest turns are not forgotten at last, their
    memory takes all room, or an answer's room is given away.
    """
    chat, requests = Chat(compressor, TEXTS[:1], max_new_tokens=30), []
    run = Chat._run
    monkeypatch.setattr(
        Chat, "_run", lambda self, request: requests.append(request) or run(self, request)
    )
    start = Window(compressor, [16, 15], 4, 30).start()
    for i in range(30):
        before = chat.split
        said(chat, QUESTIONS[i % len(QUESTIONS)])
        request, status = requests[-1], chat.status
        end = request.start + len(request.prompt) + request.sampling.max_new_tokens
        assert request.sampling.max_new_tokens == 30 and end <= TINY.max_position_embeddings
        assert status.positions <= end
        assert chat.split.forgotten >= before.forgotten and chat.split.compressed >= before[1]
        assert request.start - start <= (TINY.max_position_embeddings - start - 30) // 2
        assert status.turns + status.turns_in_memory + status.turns_forgotten == i + 1
    assert chat.split.forgotten > 0 and status.turns > 1
    assert f"{status.turns_in_memory} more in" in str(status)
    assert f", {status.turns_forgotten} forgotten" in str(status)


def test_no_turn_is_compressed_before_it_must_be_and_no_more_than_needed(icae):
    """Breaks when turns that fit are compressed, or more than half of the room is cleared."""
    window = Window(icae, [16, 16], 4, NEW, 40)
    turns = [Turn(sentence(RNG, 5), sentence(RNG, 4)) for _ in range(12)]

    def in_full(turns):
        return len(window.prompt(turns, "who ?", True)) - len(window.prompt([], "who ?", True))

    fit = next(n for n in range(12) if in_full(turns[: n + 1]) > 40)
    assert window.plan("who ?", turns[:fit]).split == Split()
    plan = window.plan("who ?", turns[: fit + 1])
    assert 0 < plan.split.compressed <= fit and plan.most == NEW
    kept = turns[plan.split.compressed : fit + 1]
    assert in_full(kept) <= 20 < in_full([turns[plan.split.compressed - 1], *kept])
    assert plan.prompt == window.prompt(kept, "who ?", True)
    assert transcript(turns[:1]) == f"{turns[0].question}\n{turns[0].answer}\n"
    everything = dataclasses.replace(window, history_tokens=0).plan("who ?", turns[:3])
    assert everything.split == Split(0, 3)


def failing(self, request):
    """As `Chat._run`, of a base that is damaged."""
    raise UserError("what the base computes is not finite")
    yield


def test_what_fails_leaves_the_chat_as_it_was(icae, monkeypatch):
    """Breaks when a question that does not fit moves turns, or is a turn itself; or when a long one
    that leaves room for a short answer is refused.
    """
    chat = Chat(icae, TEXTS[:1], max_new_tokens=NEW, history_tokens=25)
    for question in QUESTIONS[:3]:
        said(chat, question)
    before = list(chat.turns), chat.split, chat.status
    with pytest.raises(UserError, match=r"prompt of 3\d\d tokens.* of the base's 256 positions"):
        said(chat, "cat " * 300)
    assert (chat.turns, chat.split, chat.status) == before
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "_run", failing)
        with pytest.raises(UserError, match="not finite"):
            said(chat, QUESTIONS[3])
    assert (chat.turns, chat.split, chat.status) == before
    got, turns, compressed = said(chat, QUESTIONS[3]), before[0], chat.split.compressed
    memory = memory_of(icae, TEXTS[:1], turns[:compressed])
    assert got == by_hand(icae, memory, turns[compressed:], QUESTIONS[3]) and len(chat.turns) == 4
    start = Window(icae, [16, 15], 4, NEW).start()
    room = TINY.max_position_embeddings - start - len(icae.adapter.template.prompt([]))
    said(chat, " ".join(["cat"] * (room - 2)))
    assert len(chat.last.ids) <= 2 and chat.status.positions <= 256
    assert chat.status.turns_forgotten == 4
    for limit, message in ((dict(max_new_tokens=0), "it must be positive"),
                           (dict(history_tokens=-1), "history_tokens is -1"),
                           (dict(ratio=0), "ratio is 0")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Chat(icae, **limit)


@pytest.mark.parametrize("closed", [False, True])
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(icae, closed, monkeypatch):
    """Breaks when the next question does not see it, or it still holds the engine's row."""
    chat = Chat(icae, TEXTS[:1], max_new_tokens=40)
    answer = chat.ask(QUESTIONS[0])
    text = next(answer)
    if closed:
        answer.close()
    else:
        chat.stop()
        text += "".join(answer)
        assert chat.stopped
    assert chat.turns == [Turn(QUESTIONS[0], text)] and text and len(chat.last.ids) < 4
    want = by_hand(icae, memory_of(icae, TEXTS[:1]), chat.turns, QUESTIONS[1], 40)
    assert said(chat, QUESTIONS[1]) == want and not chat.stopped
    chat.ask(QUESTIONS[2])  # never begun
    assert len(chat.turns) == 2
    restored = chat.restore("t0")
    next(restored)
    chat.stop()
    assert not list(restored) and len(chat.turns) == 2
    # The first word is held back, since it may begin a stop text.
    chat.sampling = Sampling(stop=(f"{said(chat, QUESTIONS[3]).split()[0]} stop",))
    chat.turns.pop()
    run = Chat._run

    def stopped_at_once(self, request):
        for running in run(self, request):
            self.stop()
            yield running

    monkeypatch.setattr(Chat, "_run", stopped_at_once)
    assert not list(chat.ask(QUESTIONS[3])) and len(chat.turns) == 2 and chat.last is None


# --- Documents ---


def test_documents_of_a_store(icae, opened, monkeypatch):
    """Breaks when a store's document is another, its K/V are computed again though they are stored,
    or are read where they are not those of what is joined.
    """
    (document,) = next(stored.batches(opened, ["t2"], icae.adapter.template.head, []))
    ((want,),) = stored.ask(icae, [document], QUESTIONS[:1], NEW)
    chat = Chat(icae, store=opened, ids=["t2"], max_new_tokens=NEW)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryReader, "read", None)
        assert said(chat, QUESTIONS[0]) == want.text
    (text,) = icae.restore(icae.compress(TEXTS[2].text))
    assert "".join(chat.restore("t2")) == text
    chat.clear()
    chat.add(TEXTS[:1])
    memory = memory_of(icae, [TEXTS[2], TEXTS[0]])
    assert said(chat, QUESTIONS[0]) == by_hand(icae, memory, [], QUESTIONS[0])
    assert chat.status.memory_tokens == 20 and chat.status.documents == 2
    for name in ("t0", "t2"):
        chat.drop(name)
    assert not chat.documents and chat.status.memory_tokens == 0
    with pytest.raises(UserError, match="has no entry 'x'"):
        chat.add(ids=["x"])


def test_ratios(icae, opened, world):
    """Breaks when texts or older turns keep their old ratio, memories of two k are joined, or a
    store's document counts as compressed anew.
    """
    chat = Chat(icae, TEXTS[:2], max_new_tokens=NEW, history_tokens=20)
    for question in QUESTIONS[:3]:
        said(chat, question)
    chat.set_ratio(16)
    assert chat.k == 1 and [document.memory_tokens for document in chat.documents] == [2, 1]
    before = list(chat.turns)
    got, compressed = said(chat, QUESTIONS[3]), chat.split.compressed
    memory = memory_of(icae, TEXTS[:2], before[:compressed], 1)
    assert compressed and got == by_hand(icae, memory, before[compressed:], QUESTIONS[3])
    assert chat.status.turn_memory_tokens == int(memory.tokens[0]) - 3
    chat.store = opened
    added = chat.add(ids=["t2"])
    assert [d.k for d in chat.documents] == [4] * 3 and added[0].entry is not None and chat.k == 4
    with pytest.raises(UserError, match=r"keep theirs, 4 \('t2'\)"):
        chat.set_ratio(16)
    with pytest.raises(UserError, match="'t2' is read already"):
        chat.add(ids=["t2"])
    _, chat.store = loading.load_with_store(world / "small")
    with chat.store:
        chat.drop("t0")
        with pytest.raises(UserError, match="4 memory tokens per segment, 't0' has 1"):
            chat.add(ids=["t0"])
        assert [d.id for d in chat.documents] == ["t1", "t2"] and chat.k == 4
        small = Chat(icae, TEXTS[:1], store=chat.store, ids=["t1"])
    assert [d.k for d in small.documents] == [1, 1] and small.documents[0].id == "t1"
    assert Chat(icae, TEXTS, ratio=14).k == 1


def test_documents_that_leave_no_room_are_refused(icae):
    """Breaks when documents fill the base's positions, or a refused one is read all the same."""
    long = [Text(f"l{i}", sentence(RNG, 400), f"long {i}") for i in range(3)]
    chat = Chat(icae, long[:2], max_new_tokens=NEW)
    with pytest.raises(UserError, match=r"the documents need 31\d positions, the base has 256"):
        chat.add(long[2:])
    assert len(chat.documents) == 2 and said(chat, QUESTIONS[0])
    chat.set_ratio(16)
    assert len(chat.add(long[2:])) == 1 and len(chat.documents) == 3
    with pytest.raises(UserError, match="compress them at a higher ratio"):
        chat.set_ratio(1)
    assert chat.k == 1 and said(chat, QUESTIONS[1])


# --- Commands ---


@pytest.fixture
def session(icae, opened):
    return Session(Chat(icae, TEXTS[:2], store=opened, max_new_tokens=NEW))


def told(session, line):
    return "".join(session.answer(line))


def test_commands(session, tmp_path, world):
    """Breaks when a command does something else, or says something else than it did."""
    chat = session.chat
    docs = told(session, "/docs").splitlines()
    assert docs[0] == "t0: 31 tokens in 8 memory tokens (3.9x), 1,024 bytes, text"
    assert [line.split(":")[0] for line in docs] == ["t0", "t1"]
    found = told(session, "/docs t").splitlines()
    assert [line.split(":")[0] for line in found] == ["t0", "t1", "t2"]
    assert "41 tokens in 12 memory tokens" in found[2] and "no document" in told(session, "/docs x")
    assert "of the store" in told(session, "/add t2") and len(chat.documents) == 3
    assert told(session, "/restore t2") == chat.compressor.restore(chat.documents[2].memory)[0]
    every = told(session, "/restore")
    assert [line.split(":")[0] for line in every.splitlines()] == ["t0", "t1", "t2"]
    assert "keep the ratio" in told(session, "/ratio 4")
    assert told(session, "/drop t2") == "t2 is no longer read"
    assert told(session, "/ratio").startswith("now 4.0x (4 memory tokens per segment); known: 4.0x")
    assert "(15.5x)" in told(session, "/ratio 16") and chat.k == 1
    path = tmp_path / "a b.txt"
    path.write_text("the cat sat")
    assert told(session, f"/add {path}").startswith("a b.txt: 4 tokens in 1 memory tokens")
    told(session, "/drop a b.txt")
    assert "memory tokens per segment now" in told(session, "/add t2")  # back to the store's 4
    assert told(session, "/history") == "no turns yet"
    chat.history_tokens = 20
    answers = [told(session, question) for question in QUESTIONS[:3]]
    history = told(session, "/history").splitlines()
    assert [line.split()[:2] for line in history] == [
        ["1", "memory"],
        ["2", "memory"],
        ["3", "full"],
    ]
    assert history[2].endswith(f"{QUESTIONS[2]} → {answers[2]}")
    out = tmp_path / "talk.txt"
    assert told(session, f"/save {out}") == f"3 turns in {out}"
    assert f"> {QUESTIONS[1]}\n{answers[1]}\n" in out.read_text()
    assert told(session, "/clear") and not chat.turns and chat.split == Split()
    for name in ("/docs", "/add", "/drop", "/restore", "/ratio", "/history", "/clear", "/save"):
        assert name in told(session, "/help")
    assert told(session, "/quit") == "" and session.ended


def test_commands_that_cannot_be_done(session, tmp_path, monkeypatch):
    """Breaks when the chat ends or changes, or the message does not say what to do."""
    write = files.write_text

    def on_a_full_disk(path, text):
        if "full" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(files, "write_text", on_a_full_disk)
    (tmp_path / "here").write_text("x")
    before = list(session.chat.documents)
    for line, message in (
        ("/nix 3", "'/nix' is no command; /help lists them"),
        ("/Docs", "'/Docs' is no command"),
        ("/add", "/add needs a document of the store or a file"),
        ("/add nothing", "/add nothing: no document of the store, and no file"),
        ("/add t0", "document 't0' is read already"),
        ("/drop x", "document 'x' is not read; those that are: 't0', 't1'"),
        ("/restore x", "document 'x' is not read"),
        ("/ratio many", "/ratio many: give a number"),
        ("/ratio nan", "ratio is nan"),
        ("/save", "/save needs a file"),
        (f"/save {tmp_path / 'here'}", "it is there already"),
        (f"/save {tmp_path / 'here' / 'x'}", "cannot be written"),
        (f"/save {tmp_path / 'full'}", "No space left on device; give another file"),
    ):
        with pytest.raises(UserError, match="^.*" + message.replace(".", r"\.")):
            told(session, line)
    assert session.chat.documents == before and (tmp_path / "here").read_text() == "x"
    assert told(session, " /nix is a question") and session.chat.turns[0].question[0] == "/"
    session.chat.store = None
    for line in ("/docs t", "/add t2"):
        with pytest.raises(UserError, match=r"no store is open|no such file"):
            told(session, line)


def test_a_list_of_the_store_is_short(session, monkeypatch):
    """Breaks when a large store is printed whole, or the rest is not told."""
    monkeypatch.setattr("icae_jax.workflows.chat_commands.LISTED", 2)
    lines = told(session, "/docs t").splitlines()
    assert len(lines) == 3 and lines[2].startswith("… and more")


def test_files_are_read_with_their_ids(tmp_path):
    """Breaks when files of one name are taken for each other, or rows lose their ids."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"the {folder}")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"id": "r", "text": "the cat"}])
    texts = read_files([str(tmp_path / "a" / "x.txt"), str(tmp_path / "b" / "x.txt"), rows])
    assert [(t.id, t.text) for t in texts] == [
        ("a/x.txt", "the a"),
        ("b/x.txt", "the b"),
        ("r", "the cat"),
    ]
    assert read_files([]) == []
    with pytest.raises(UserError, match="no such file"):
        read_files([str(tmp_path / "absent.txt")])
