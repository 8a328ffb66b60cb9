"""`icae prepare distil`: a teacher's answers as a source to train on."""

import json

import pytest
from conftest import TINY, random_lora, random_trained, write_jsonl
from suite_helpers import load_base, reference_answer

from icae_jax.cli import main as cli
from icae_jax.compression.config import CompressionConfig
from icae_jax.data import forms, sources
from icae_jax.interop.adapters import folder as adapters
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.workflows import distil

ROWS = [
    {"context": "the cat sat on the mat .", "question": "who sat ?", "answers": ["the cat"]},
    {"context": "a big dog ate milk", "question": "what ?", "id": "d"},
    {"context": "the sea was blue " * 80, "question": "what ?"},
    {"context": "the cat sat on the mat .", "question": "where ?", "answer": None},
]


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "asked.jsonl", ROWS)


def command(tiny_base, source, output, *more):
    argv = ["prepare", "distil", "--from", source, "--base", str(tiny_base), "--output"]
    return [*argv, str(output), "--max_new_tokens", "5", "--batch_size", "2", *more]


def test_answers_are_the_base_s_of_the_whole_context(tiny_base, source, tmp_path, capsys):
    """Breaks when a question is put otherwise than to the base in evaluation, an answer goes to
    another question, what the source answered is lost, or the output is no source.
    """
    output = tmp_path / "taught.jsonl"
    assert cli.main(command(tiny_base, source, output, "--json")) == 0
    about = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert about["answers"] == len(rows) and about["prepared_now"]
    assert about["left_out"][distil.TOO_LONG] == 1
    assert about["answers"] + sum(about["left_out"].values()) == len(ROWS)
    tokenizer = load_base(tiny_base).tokenizer
    template = targets.make_template("plain", tokenizer)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for row in rows:
        prompt = [1, *ids(row["context"]), *template.prompt(ids(row["question"]))]
        new = reference_answer(tiny_base, prompt, 5, {2})
        assert row["answer"] == tokenizer.decode(new, skip_special_tokens=True)
    given = {row["question"]: row.get(distil.GIVEN) for row in rows}
    assert given.get("who sat ?", ["the cat"]) == ["the cat"] and not given.get("where ?")
    read = list(sources.read_rows(str(output)))
    assert [row.answer for row in read] == [row["answer"] for row in rows]
    assert cli.main(command(tiny_base, source, output)) == 0
    assert "already prepared, of these files" in capsys.readouterr().out
    other = command(tiny_base, source, output, "--template", "none")
    assert cli.main(other) == 2
    assert "was made of other files or with other options" in capsys.readouterr().err


def test_questions_of_paragraphs_may_have_no_answer():
    """Breaks when SQuAD's and MRQA's forms are refused without answers, which a teacher gives."""
    asked = {
        "context": "a cat",
        "qas": [{"question": "who ?"}, {"question": "b", "answers": ["c"]}],
    }
    for raw in (asked, {"paragraphs": [asked]}):
        rows = forms.parse(raw, "here", "0", unanswered=True)
        assert [(row.question, row.answers) for row in rows] == [("who ?", ()), ("b", ("c",))]
        with pytest.raises(ValueError, match="answers is missing in a question of qas"):
            forms.parse(raw, "here", "0")


def test_a_killed_run_goes_on(tiny_base, source, tmp_path, monkeypatch):
    """Breaks when what was answered is asked again, a line cut short counts, or half an output is
    written.
    """
    output = tmp_path / "taught.jsonl"
    request = distil.Request(source, str(output), str(tiny_base), batch_size=1, max_new_tokens=5)

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil.distil(request, killed)
    assert not output.exists()
    progress = tmp_path / ".taught.jsonl.distil"
    progress.write_text(progress.read_text() + '{"row": 0, "ans')
    asked, answers = [], distil.Teacher.answers
    monkeypatch.setattr(
        distil.Teacher, "answers", lambda *args: (asked.append(1), answers(*args))[1]
    )
    about = distil.distil(request)
    assert len(asked) == 2 and output.exists()
    assert about["answers"] + sum(about["left_out"].values()) == len(ROWS)


def test_an_adapter_s_decoder_lora_answers(tiny_base, source, tmp_path):
    """Breaks when the base answers alone although an adapter is given, or one without a decoder
    LoRA passes for a teacher.
    """
    base = load_base(tiny_base)
    identity = {"base_fingerprint": base.fingerprint, "base_identity": base.identity}
    lora = {"decoder_lora": random_lora(TINY, seed=5)}
    for name, more in (("with", lora), ("without", {})):
        adapter = adapters.Adapter(
            CompressionConfig(k=4, rate=4, decoder_lora=bool(more)),
            LoraConfig(4, 2.0, 0.0),
            targets.make_template("mistral", base.tokenizer),
            random_trained(TINY, 4) | more,
            base.path,
            **identity,
        )
        adapters.save_adapter(tmp_path / name, adapter)
    request = distil.Request(source, "-.jsonl", adapter=str(tmp_path / "with"))
    teacher = distil.load_teacher(request)
    assert teacher.template.before == () and teacher.template.head == (1, 3)
    prompt = teacher.prompt(next(iter(sources.read_rows(source, unanswered=True))))
    assert prompt[:2] == [1, 3] and prompt[-1] == 4 and min(prompt) >= 0
    alone = distil.Teacher(base, teacher.decoder.replace(lora=None), teacher.template)
    prompts = [prompt, [*prompt, 9], [*prompt, 10, 11]]
    both = [t.answers(prompts, 3, 8) for t in (teacher, alone)]
    assert both[0] != both[1]
    request = distil.Request(source, "-.jsonl", adapter=str(tmp_path / "without"))
    with pytest.raises(ValueError, match="has no decoder LoRA, so the base answers alone"):
        distil.load_teacher(request)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; it must be positive"),
        (["--base", ""], "--base is not given; name the teacher"),
        (["--output", "gs://b/a.jsonl"], "give a local file named .jsonl"),
        (["--from", "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(
    tiny_base, source, tmp_path, capsys, more, message
):
    """Breaks when a flag that cannot be is found out after a base was loaded or a file written."""
    before = sorted(tmp_path.iterdir())
    assert cli.main(command(tiny_base, source, tmp_path / "t.jsonl", *more)) == 2
    assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before
