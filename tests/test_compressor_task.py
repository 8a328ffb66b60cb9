"""The compressor's task: what it refuses, what its losses may depend on."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from conftest import TINY, WORDS, write_jsonl

from icae_jax import files
from icae_jax.compression import encoder
from icae_jax.compression import trained as trained_tree
from icae_jax.interop.hub import base as bases
from icae_jax.objectives import targets
from icae_jax.training import step, train
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.workflows import sweep_results


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(rng.choice(WORDS[8:], size=n))

    source = write_jsonl(folder / "text.jsonl", [{"text": words(30)} for _ in range(9)])
    qa = [{"context": words(12), "question": words(4), "answers": [words(2)]} for _ in range(3)]
    return {
        "base": str(tiny_base),
        "batch_size": 4,
        "eval_examples": 9,
        "compression": {"k": 4, "rate": 4},
        "lora": {"rank": 4},
        "data": {
            "train": source,
            "eval": source,
            "context_lengths": [32],
            "cache_dir": str(folder / "cache"),
        },
        "qa": write_jsonl(folder / "qa.jsonl", qa),
    }


def task(raw, **changes):
    return CompressorTask(
        from_dict(TrainConfig, {k: v for k, v in raw.items() if k != "qa"} | changes)
    )


def contexts(batch):
    """The ids of each row's context, without padding."""
    ids, lengths = batch["context"], batch["lengths"]
    return [
        x[n[:, None] > np.arange(x.shape[1])].tolist() for x, n in zip(ids, lengths, strict=True)
    ]


def shapes(batch):
    return jax.tree.map(lambda x: (x.shape, x.dtype), {k: v for k, v in batch.items() if k != "k"})


def of_two_lengths(raw, tmp_path, examples):
    """A task that fine-tunes with contexts of up to 12 and up to 32 tokens. examples: (words of a
    context, questions on it).
    """
    words = [
        " ".join(WORDS[8 + i % 40] for i in range(at, at + n)) for at, (n, _) in enumerate(examples)
    ]
    rows = [
        {"context": text, "question": f"who {WORDS[9 + q]} ?", "answers": ["the cat"]}
        for text, (_, questions) in zip(words, examples, strict=True)
        for q in range(questions)
    ]
    data = raw["data"] | {
        "train": write_jsonl(tmp_path / "qa.jsonl", rows),
        "context_lengths": [12, 32],
        "questions_per_context": 1,
    }
    both = {"objectives": {"ae": 0.5, "lm": 0.0, "qa": 0.5}, "eval_examples": 40}
    return task(raw, **finetuning(raw, tmp_path / "w", data=data | {"eval": data["train"]}) | both)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_control_reads_another_text_s_memory(raw, tmp_path, batch_size):
    """Breaks when the control reads the right memory somewhere: alone in a batch, beside another
    question on the same context, beside the same text once more, or where no other text has its
    length; when examples are left out, or the two programs are not one.
    """
    windows = task(raw, batch_size=batch_size)
    twice = write_jsonl(
        tmp_path / "twice.jsonl",
        [{"text": text} for text in ["the cat sat on the mat"] * 3 + ["a big dog ate"]],
    )
    same = task(raw, batch_size=batch_size, data=raw["data"] | {"eval": twice})
    questions = of_two_lengths(
        raw | {"batch_size": batch_size}, tmp_path, [(8, 1), (20, 5), (24, 5)]
    )
    for made, count in ((windows, 9), (same, 4), (questions, 11)):
        seen = 0
        for kinds in made.eval_batches():
            assert list(kinds) == ["memory", "wrong_memory"] and shapes(kinds["memory"]) == shapes(
                kinds["wrong_memory"]
            )
            jax.tree.map(np.testing.assert_array_equal, *(kinds[kind]["targets"] for kind in kinds))
            for own, other in zip(*map(contexts, kinds.values()), strict=True):
                own, other = (ids[len(made.framing.start) :] for ids in (own, other))
                assert bool(own) == bool(other) and (
                    not own or own[: len(other)] != other[: len(own)]
                )
                seen += bool(own)
        assert seen == count
        halves = (
            [
                list(made.eval_batches(slice(at, at + batch_size // 2)))
                for at in (0, batch_size // 2)
            ]
            if batch_size > 1
            else []
        )
        for whole, *parts in zip(made.eval_batches(), *halves, strict=bool(halves)):
            for kind in whole if halves else ():
                joined = np.concatenate([part[kind]["context"] for part in parts])
                np.testing.assert_array_equal(joined, whole[kind]["context"])


def test_one_text_has_no_control(raw, tmp_path):
    """Breaks when the only text's own memory, or a blank one, passes for a wrong one: the control
    is left out, and training goes on.
    """
    one = of_two_lengths(raw | {"batch_size": 2}, tmp_path, [(20, 3)])
    assert [list(kinds) for kinds in one.eval_batches()] == [["memory"]] * 2

    def eval_step(trained, frozen, batch):  # two nats a label
        counts = {o: float(np.sum(of["label_mask"])) for o, of in batch["targets"].items()}
        return {o: (2 * count, count) for o, count in counts.items()}

    losses = train.evaluate(one, eval_step, None, None, np.arange(2), 2)
    assert losses == {"memory": {"ae": 2.0, "qa": 2.0}} and one.held_out_loss(losses) == 2.0
    line = {"step": 1, "eval": losses, "eval_loss": 1.0}
    point = {
        "point": "a",
        "state": "done",
        "steps": 1,
        "train": {},
        "held_out": line["eval"],
        "eval_loss": 1.0,
        "best": None,
    }
    header, (row,) = sweep_results.table({"points": [point | {"tokens_per_second": None}]})
    assert (
        "AE, memory" in header
        and not any("wrong" in cell for cell in header)
        and len(row) == len(header)
    )


def test_the_control_differs_from_the_memory_at_batch_size_1(raw):
    """Breaks when at one example a batch the control is the right memory, to the last digit."""
    made = task(raw, batch_size=1, objectives={"ae": 1.0, "lm": 0.0})
    trained = jax.tree.map(lambda x: x + 0.1, made.init())
    with made.placement.active():
        losses = train.evaluate(
            made, step.make_eval_step(made), trained, made.frozen, np.arange(1), 1
        )
    assert abs(losses["memory"]["ae"] - losses["wrong_memory"]["ae"]) > 1e-4


@pytest.fixture(scope="module")
def losses_of_one_row(raw):
    """(a function of whether the memory is cut off from gradients and of whether rows have one
    another's contexts: `(sum of losses, its gradients by the encoder's embeddings and by the
    trained tree)`), of a task of k 1 or 4, with k 1.
    """
    compression = {"k": 4, "rate": 4, "k_choices": [1, 4]}
    made = task(
        raw, compression=compression, draw_k=["pretrain"], objectives={"ae": 0.5, "lm": 0.5}
    )
    batch = next(iter(made.eval_batches()))["memory_k1"]
    compress = encoder.compress_several
    rolled, trained = (
        batch | {"context": np.roll(batch["context"], 1, axis=0)},
        jax.tree.map(lambda x: np.asarray(x) + 0.1, made.init()),
    )

    def loss(embeddings, trained, batch, cut):
        def cuttable(
            base, *rest
        ):  # the encoder alone reads `embeddings`; the decoder's copy of the base is held apart
            (memory,) = compress(base.replace(params=base.params | {"embed": embeddings}), *rest)
            slots = jnp.where(cut, jax.lax.stop_gradient(memory.slots), memory.slots)
            return (memory.replace(slots=slots),)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "compress_several", cuttable)
            return sum(s for s, _ in made.losses(trained, made.frozen, batch, None).values())

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda cut=False, roll=False: jax.device_get(
        run(made.frozen["embed"], trained, rolled if roll else batch, cut)
    )


def test_the_decoder_sees_the_context_through_the_memory_alone(losses_of_one_row):
    """Breaks when the context reaches the loss past the memory: gradients with respect to it must
    vanish when the memory is cut.
    """
    value, (gradient, _) = losses_of_one_row()
    assert np.abs(gradient).max() > 0
    assert not np.any(losses_of_one_row(cut=True)[1][0])
    assert abs(value - losses_of_one_row(roll=True)[0]) > 1e-3


def test_fine_tuning_starts_from_the_adapter_and_checks_it(raw, tmp_path):
    """Breaks when the second phase starts anew, or with another shape than the first."""
    first = task(raw)
    trained = jax.tree.map(lambda x: x + 0.5, first.init())
    first.export(tmp_path, trained)
    qa = {
        "phase": "finetune",
        "init_from": str(tmp_path),
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0},
    }
    qa["data"] = raw["data"] | {"train": raw["qa"], "eval": raw["qa"]}
    second = task(raw, **qa)
    for a, b in zip(jax.tree.leaves(second.init()), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(
        ValueError,
        match=r"compression\.k is 8, but init_from .* with 4; give --config\.compression\.k=4",
    ):
        task(raw, **qa | {"compression": {"k": 8, "rate": 4}})
    with pytest.raises(ValueError, match=r"lora\.targets is \('k_proj',\)"):
        task(raw, **qa | {"lora": {"rank": 4, "targets": ["k_proj"]}})
    with pytest.raises(ValueError, match="init_from is not set"):
        task(raw, **qa | {"init_from": ""})


def test_more_encoder_layers_than_the_base_has_are_refused_before_data_are_read(raw):
    """Breaks when they are found out after minutes of loading and tokenising."""
    data = raw["data"] | {"train": "no/such/file.jsonl"}
    with pytest.raises(ValueError, match=r"encoder_layers is 9; the base has 2 layers"):
        task(raw, compression={"k": 4, "rate": 4, "encoder_layers": 9}, data=data)


def finetuning(raw, folder, **changes):
    task(raw).export(folder, task(raw).init())
    qa = {
        "phase": "finetune",
        "init_from": str(folder),
        "objectives": {"ae": 0.0, "lm": 0.0, "qa": 1.0},
    }
    return qa | {"data": raw["data"] | {"train": raw["qa"], "eval": raw["qa"]}} | changes


def test_weighted_sources(raw, tmp_path):
    """Breaks when the weights do not reach the batches, a source is missing from what a resumed run
    is held against, or one without usable examples goes unsaid.
    """
    cats = write_jsonl(tmp_path / "cats.jsonl", [{"text": "cat " * 30}])
    data = raw["data"] | {"train": f"{raw['data']['train']}, {cats}", "train_weights": [1, 3]}
    made = task(raw, data=data)
    contexts = [
        row for batch in made.train_batches(0, 4) for row in batch["context"].reshape(4, -1)
    ]
    assert sum(WORDS.index("cat") == np.median(row) for row in contexts) == 12
    plain = task(raw).identity["data.train"]
    for mixed, alone in zip(made.identity["data.train"], plain, strict=True):
        assert mixed.split(",")[0] == alone and len(mixed) == 2 * len(alone) + 1
    assert task(raw, data=data | {"train_weights": [1, 0]}).identity["data.train"] == plain
    with pytest.raises(
        ValueError,
        match=rf"data\.train source {cats}, of weight 3: no examples for phase finetune",
    ):
        task(raw, **finetuning(raw, tmp_path / "w", data=data | {"train": f"{raw['qa']},{cats}"}))
    with pytest.raises(
        ValueError,
        match=r"data\.train source absent\.jsonl, of weight 1: .*absent\.jsonl: no such file",
    ):
        task(raw, data=data | {"train": f"absent.jsonl,{cats}"})


def test_k_is_drawn_in_fine_tuning_unless_asked_for_in_pretraining(raw, tmp_path):
    """Breaks when pretraining draws k unasked, fine-tuning does not, an adapter offers what was not
    trained, or a k is not evaluated.
    """
    some = {"compression": {"k": 4, "rate": 4, "k_choices": [1, 4]}}
    for changes, choices in (
        (some, (4,)),
        (some | {"draw_k": ["pretrain"]}, (1, 4)),
        (finetuning(raw, tmp_path) | some, (1, 4)),
        (finetuning(raw, tmp_path) | some | {"draw_k": []}, (4,)),
    ):
        made = task(raw, **changes)
        batches = list(made.train_batches(0, 12))
        assert {batch["k"] for batch in batches} == set(choices) == set(made.compression.choices)
        assert [made.describe(b) for b in batches] == [
            {"k": b["k"]} if len(choices) > 1 else {} for b in batches
        ]
        kinds = next(iter(made.eval_batches()))
        assert {kind: batch["k"] for kind, batch in kinds.items()} == {
            "memory": 4,
            "wrong_memory": 4,
        } | ({"memory_k1": 1, "wrong_memory_k1": 1} if len(choices) > 1 else {})
        made.export(tmp_path / "out", made.init())
        info = json.loads((tmp_path / "out" / "adapter" / "icae.json").read_text())
        assert tuple(info["compression"]["k_choices"]) == (choices if len(choices) > 1 else ())
    losses = {
        "memory": {"qa": 1.0},
        "wrong_memory": {"qa": 9.0},
        "memory_k1": {"qa": 3.0},
        "wrong_memory_k1": {"qa": 9.0},
    }
    assert task(raw, **finetuning(raw, tmp_path)).held_out_loss(losses) == 2.0


def test_losses_of_a_k_depend_on_its_rows_alone(losses_of_one_row):
    """Breaks when a step with a smaller k trains rows of the table that it does not use."""
    _, (_, gradient) = losses_of_one_row()
    rows = np.abs(gradient["memory_table"]).max(1)
    assert rows[0] > 0 and not rows[1:4].any() and rows[4] > 0


def test_a_base_without_bos_gets_a_trained_trigger_and_says_so(
    raw, tmp_path, tiny_params, tiny_tokenizer
):
    """Breaks when 500xCompressor cannot be trained on a base without <s>, or its adapter claims to
    be triggered by one.
    """
    x500 = {
        "compression": {"method": "x500", "k": 4, "rate": 4},
        "objectives": {"ae": 1.0, "lm": 0.0},
    }
    made = task(raw, **x500)
    assert made.framing.trigger == 1 and made.compression.trigger == "bos" and not made.notes()
    bare = copy.deepcopy(tiny_tokenizer)
    bare.bos_token = None
    bases.save_base(tmp_path / "base", TINY, tiny_params, bare, dtype="float32")
    made = task(raw, **x500, base=str(tmp_path / "base"))
    assert made.framing.trigger == targets.AE and made.compression.trigger == "trained"
    assert "has no bos token; a trained trigger is used" in made.notes()[0]
    with pytest.raises(
        ValueError, match=r"compression\.method is 'x500', but init_from .* was trained with 'icae'"
    ):
        task(
            raw,
            **finetuning(raw, tmp_path / "w", compression={"method": "x500", "k": 4, "rate": 4}),
        )


def test_room_for_the_positions_of_the_reference_layout(raw):
    """Breaks when a fixed length that the base has no positions for is found out while compiling,
    or later.
    """
    reference = {"method": "x500", "k": 4, "layout": "reference"}
    assert (
        task(raw, compression=reference | {"rate": 62.0}).framing.start == ()
    )  # 248 + 4 + 4 = 256
    with pytest.raises(ValueError, match=r"needs 260 positions .* the base has 256"):
        task(raw, compression=reference | {"rate": 64.0})


def test_lora_is_drawn_by_one_program_whatever_the_run(raw):
    """Breaks when every task compiles the drawing of its LoRA anew."""
    task(raw).init()
    before = trained_tree._init_lora._cache_size()
    task(raw, seed=1).init()
    assert before and trained_tree._init_lora._cache_size() == before


def test_a_bos_that_begins_no_texts_is_no_trigger(raw, tmp_path, tiny_params, tiny_tokenizer):
    """Breaks when 500xCompressor asks for a text with a token behind which the base expects none of
    it, such as the start of a chat's turn, or a run that goes on changes its trigger.
    """
    chat = copy.deepcopy(tiny_tokenizer)
    chat.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A")
    bases.save_base(tmp_path / "base", TINY, tiny_params, chat, dtype="float32")
    x500 = {
        "compression": {"method": "x500", "k": 4, "rate": 4},
        "objectives": {"ae": 1.0, "lm": 0.0},
        "base": str(tmp_path / "base"),
    }
    made = task(raw, **x500)
    assert made.base.tokenizer.bos_token_id == 1
    assert made.framing.trigger == targets.AE and made.compression.trigger == "trained"
    assert "puts no bos token in front of texts; a trained trigger is used" in made.notes()[0]
    for number, (recorded, trigger) in enumerate(
        [({}, 1), ({"identity.trigger": "bos"}, 1), ({"identity.trigger": "trained"}, targets.AE)]
    ):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        files.write_json(workdir / "config.json", {"steps": 3} | recorded)
        assert CompressorTask(made.config, made.base, workdir).framing.trigger == trigger


def test_a_trigger_in_place_of_bos_starts_as_a_newline(raw, tmp_path, tiny_params, tiny_tokenizer):
    """Breaks when the [AE] row starts at random on a base that is not asked with its bos, behind
    which a frozen base looks back at nothing.
    """
    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"]["\n"] = content["model"]["vocab"].pop(WORDS[-1])
    content["post_processor"] = None
    chat = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
        **tiny_tokenizer.special_tokens_map,
    )
    chat.add_tokens(["\n"])
    bases.save_base(tmp_path / "base", TINY, tiny_params, chat, dtype="float32")
    newline = np.asarray(tiny_params["embed"])[chat.convert_tokens_to_ids("\n")]

    def row(method, **compression):
        compression = {"method": method, "k": 4, "rate": 4, **compression}
        objectives = {"ae": 1.0, "lm": 0.0}
        base = str(tmp_path / "base")
        made = task(raw, base=base, compression=compression, objectives=objectives)
        return np.asarray(made.init()["memory_table"])[targets.AE]

    np.testing.assert_array_equal(row("x500"), newline)
    np.testing.assert_array_equal(row("icae", trigger_token="\n"), newline)
    for others in (row("icae"), row("x500", trigger="trained"), row("x500", trigger_token="cat")):
        assert not np.array_equal(others, newline)


def test_trigger_token(raw):
    made = task(raw, compression={"k": 4, "rate": 4, "trigger_token": "cat"})
    row = made.init()["memory_table"][4]
    np.testing.assert_array_equal(row, made.frozen["embed"][WORDS.index("cat")])
    with pytest.raises(ValueError, match="trigger_token 'nonsense' is not a token"):
        task(raw, compression={"k": 4, "rate": 4, "trigger_token": "nonsense"}).init()
