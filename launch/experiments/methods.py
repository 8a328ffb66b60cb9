"""Compares the methods, their encoder masks and the share of autoencoding, on the shipped base.

    python launch/experiments/methods.py --workdir runs/methods
    python launch/experiments/methods.py --workdir runs/methods --summary

An arm is a method with an encoder mask, trained from scratch on `(1 - a) QA + a AE`. One model
serves all numbers of memory tokens: every step draws one. Everything else is equal: data and their
order, LoRA, steps, batch, optimizer. Each arm's learning rate is the better of two on a tenth of
the steps. A run leaves its scores in the workdir; the same command continues with the next one.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any

from icae_jax.runtime import compiled

compiled.set_up()  # before anything imports JAX

import jax  # noqa: E402
import methods_table  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from icae_jax import files  # noqa: E402
from icae_jax.compression.config import CompressionConfig  # noqa: E402
from icae_jax.data import synthetic  # noqa: E402
from icae_jax.data.config import DataConfig  # noqa: E402
from icae_jax.evaluation import plain, scores  # noqa: E402
from icae_jax.inference.compressor import Compressor  # noqa: E402
from icae_jax.interop.adapters import folder as adapters  # noqa: E402
from icae_jax.models import lora  # noqa: E402
from icae_jax.objectives import targets  # noqa: E402
from icae_jax.performance import flops  # noqa: E402
from icae_jax.runtime import sharding  # noqa: E402
from icae_jax.training import step  # noqa: E402
from icae_jax.training.compressor_task import CompressorTask  # noqa: E402
from icae_jax.training.config import (  # noqa: E402
    SCRATCH,
    ObjectivesConfig,
    OptimizerConfig,
    TrainConfig,
)
from icae_jax.training.optimizer import make_optimizer  # noqa: E402
from icae_jax.workflows import quickstart  # noqa: E402

# Layouts: `servable` (the default) for slots, `uniform` for keys and values. The first six are the
# comparison, each at both shares of AE.
ARMS: dict[str, dict[str, Any]] = {
    "icae-causal": {"method": "icae", "encoder_mask": "causal"},
    "icae-slots": {"method": "icae", "encoder_mask": "slots"},
    "pooled-causal": {"method": "pooled", "encoder_mask": "causal"},
    "pooled-all": {"method": "pooled", "encoder_mask": "all"},
    "x500": {"method": "x500", "layout": "uniform", "encoder_mask": "causal"},
    "sac": {"method": "sac", "layout": "uniform", "encoder_mask": "all"},
    # Listed apart.
    "x500-slots": {"method": "x500", "layout": "uniform", "encoder_mask": "slots"},
    "sac-causal": {"method": "sac", "layout": "uniform", "encoder_mask": "causal"},
    "pooled-all-sum": {"method": "pooled", "encoder_mask": "all", "sum_k": True},
    "icae-slots-lora": {"method": "icae", "encoder_mask": "slots", "decoder_lora": True},
    "pooled-causal-lora": {"method": "pooled", "encoder_mask": "causal", "decoder_lora": True},
    "x500-lora": {
        "method": "x500",
        "layout": "uniform",
        "encoder_mask": "causal",
        "decoder_lora": True,
    },
}
MAIN = tuple(ARMS)[:6]
SHARES = (0.0, 0.5)  # of AE
# 1e-2 looks good on a tenth of the steps, and then never learns whose a fact is.
RATES = (1e-3, 3e-3)
TOKENS_OF_ONE = 24  # the most tokens of a passage for each person
WARMUP = 10  # steps
CHECKED_EVERY = 20  # steps: whether the losses are finite
TRAIN_SEED, CHOICE_SEED, HELD_OUT_SEED = 11, 12, 13  # of passages
TRAIN_PASSAGES, CHOICE_PASSAGES = 4000, 32
BATCH = 32  # passages measured at once
ANSWER_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs share. questions: for each passage of a training example."""

    workdir: pathlib.Path
    ks: tuple[int, ...]
    people: int
    steps: int
    batch_size: int
    questions: int
    held_out: int

    @property
    def segment(self) -> int:
        """Tokens that a segment holds: every passage fits."""
        return TOKENS_OF_ONE * self.people


def config_of(settings: Settings, arm: str, share: float, seed: int, base: str) -> TrainConfig:
    """The configuration of a run. Its learning rate is 1: `Trainer` scales each update."""
    fields = dict(ARMS[arm])
    sum_k = fields.pop("sum_k", False)
    k = max(settings.ks)
    return TrainConfig(
        phase="finetune",
        base=base,
        init_from=SCRATCH,
        seed=seed,
        steps=settings.steps,
        batch_size=settings.batch_size,
        attention="xla",
        eval_examples=0,
        sum_k=sum_k,
        compression=CompressionConfig(
            k=k,
            rate=settings.segment / k,
            k_choices=settings.ks,
            trigger="trained",
            trigger_token=synthetic.REPEAT,  # the base was trained to copy after it
            **fields,
        ),
        lora=lora.LoraConfig(rank=32, dropout=0.0, targets=tuple(lora.PROJECTIONS)),
        objectives=ObjectivesConfig(ae=share, lm=0.0, qa=1 - share),
        optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=0, b2=0.98, weight_decay=0.0),
        data=DataConfig(
            train=str(settings.workdir / "train.jsonl"),
            context_lengths=(settings.segment,),
            questions_per_context=settings.questions,
            max_target_tokens=32,
            cache_dir=str(settings.workdir / "cache"),
        ),
    )


# ----------------------------------------------------------------------------------------- training


def decay(number: int, steps: int) -> float:
    """The share of the rate at update `number`, from 1: a linear warm-up, then half a cosine."""
    warmup = min(WARMUP, -(-steps // 4))
    return min(1.0, number / warmup) * 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))


class Trainer:
    """Trains an arm at any seed and learning rate with programs that are compiled once."""

    def __init__(self, settings: Settings, base: Any, arm: str, share: float):
        self.settings, self.arm, self.share, self.base = settings, arm, share, base
        task = self.task(0)
        one, _ = make_optimizer(task.config.optimizer, settings.steps)
        # AdamW's update without decay is proportional to the rate, which is part of the state.
        scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
        self.optimizer = optax.chain(one, scale)
        self.shardings = task.placement.tree(step.init_state(task.init(), self.optimizer))
        self.step = step.make_train_step(task, self.optimizer, 0, 1, self.shardings)
        self.flops = 0  # of a step, averaged over the numbers of memory tokens

    def task(self, seed: int) -> CompressorTask:
        """The task of a seed: parameters as training starts, and the order of data."""
        config = config_of(self.settings, self.arm, self.share, seed, str(self.base.path))
        return CompressorTask(config, self.base)

    def train(self, seed: int, rate: float, steps: int) -> Compressor | None:
        """The compressor after `steps`, its rate decayed to 0; None if it diverged."""
        task = self.task(seed)
        state = step.init_state(task.init(), self.optimizer)
        state = sharding.put(state, self.shardings)
        mesh, size, spent = task.placement.mesh, task.config.batch_size, 0
        for number, batch in enumerate(task.train_batches(0, steps), 1):
            spent += flops.least(
                self.base.config, task.config.lora, task.compression, batch, task.heads
            ).total
            others, scale = state["opt_state"]
            now = {"step_size": np.float32(rate * decay(number, steps))}
            scale = scale._replace(
                hyperparams=sharding.put(now, self.shardings["opt_state"][1].hyperparams)
            )
            state = state | {"opt_state": (others, scale)}
            rows = sharding.local_rows(mesh, size)
            device_batch = sharding.put_batch(mesh, batch, rows, size)
            state, metrics = self.step(state, task.frozen, device_batch)
            if number % CHECKED_EVERY == 0 or number == steps:
                values = jax.device_get(metrics)
                losses = {o: float(values["sums"][o] / values["counts"][o]) for o in values["sums"]}
                if not np.isfinite([*losses.values(), float(values["param_norm"])]).all():
                    return None
                shown = " ".join(f"{o} {loss:.3f}" for o, loss in losses.items())
                print(f"  step {number}: {shown}", file=sys.stderr, flush=True)
        self.flops = spent / steps
        return self.compressor(task, state["trained"])

    def compressor(self, task: CompressorTask, trained: Any) -> Compressor:
        """A compressor of trained parameters."""
        base = self.base
        adapter = adapters.Adapter(
            task.compression, task.config.lora, task.template, trained, base.path, base.fingerprint
        )
        return Compressor(base, adapter, self.arm, mesh=task.placement.mesh)


# --------------------------------------------------------------------------------------- measuring


def measure(compressor: Compressor, rows: list[dict[str, Any]], k: int) -> dict[str, Any]:
    """Scores of each passage at k memory tokens, as sums that `Summary` adds up.

    qa, wrong_qa: EM, F1 (in percent) and the number of questions; ae, wrong_ae: nats and tokens;
    bleu: `scores.bleu_counts`. Wrong: with the next passage's memory.
    """
    contexts = [row["context"] for row in rows]
    asked = [[question["question"] for question in row["questions"]] for row in rows]
    memory = compressor.compress(contexts, batch_size=BATCH, k=k)
    wrong = memory[np.roll(np.arange(len(rows)), -1)]
    measured = {"tokens": float(memory.tokens.mean()), "bytes": float(memory.bytes.mean())}
    for name, given in (("qa", memory), ("wrong_qa", wrong)):
        answers = compressor.ask(given, asked, ANSWER_TOKENS, batch_size=BATCH)
        measured[name] = [qa_sums(of_one, row) for of_one, row in zip(answers, rows, strict=True)]
    for name, given in (("ae", memory), ("wrong_ae", wrong)):
        of_text = compressor.score_restoring(given, contexts, batch_size=BATCH)
        measured[name] = [[-score.log_prob, score.tokens] for score in of_text]
    restored = compressor.restore(memory, batch_size=BATCH)
    pairs = list(zip(restored, contexts, strict=True))
    measured["bleu"] = [scores.bleu_counts(*pair).astype(int).tolist() for pair in pairs]
    return measured


def qa_sums(answers: list[str], row: dict[str, Any]) -> list[float]:
    """EM and F1 summed over a passage's questions, and how many there are."""
    pairs = [
        (answer, question["answers"])
        for answer, question in zip(answers, row["questions"], strict=True)
    ]
    em, f1 = (sum(score(*pair) for pair in pairs) for score in (scores.squad_em, scores.squad_f1))
    return [em, f1, len(pairs)]


def held_out_loss(
    compressor: Compressor, rows: list[dict[str, Any]], share: float, ks: tuple[int, ...]
) -> float:
    """The arm's own objective on held-out passages, averaged over the numbers of memory tokens."""
    contexts, template = [row["context"] for row in rows], compressor.adapter.template
    qa = [
        [
            template.target(compressor.question_ids(q["question"]), compressor.ids(q["answers"][0]))
            for q in row["questions"]
        ]
        for row in rows
    ]
    ae = [
        [targets.ae_target(compressor.context_ids(text), compressor.framing)] for text in contexts
    ]
    weighted = [("qa", 1 - share, qa), ("ae", share, ae)]
    losses = []
    for k in ks:
        memory = compressor.compress(contexts, batch_size=BATCH, k=k)
        for objective, weight, rows_of in weighted:
            if weight:
                of_rows = compressor.score_targets(memory, rows_of, objective, BATCH)
                flat = list(itertools.chain(*of_rows))
                nats = -sum(score.log_prob for score in flat) / sum(score.tokens for score in flat)
                losses.append(weight * nats)
    return sum(losses) / len(ks)


def base_alone(compressor: Compressor, rows: list[dict[str, Any]]) -> dict[str, float]:
    """EM of the base with the passage in its prompt, and without."""
    asked = [[question["question"] for question in row["questions"]] for row in rows]
    result = {}
    for name, contexts in (("full", [row["context"] for row in rows]), ("none", None)):
        answers = plain.answer(compressor, asked, contexts, ANSWER_TOKENS, BATCH)
        sums = np.sum([qa_sums(*pair) for pair in zip(answers, rows, strict=True)], 0)
        result[name] = float(sums[0] / sums[2])
    return result


# -------------------------------------------------------------------------------------- the runs


def run(settings: Settings, arm: str, share: float, seed: int, trainer_of: Any) -> None:
    """Trains and measures an arm at a seed, unless that is done; chooses its rate before.

    trainer_of: `trainer_of(arm, share)`, the `Trainer`.
    """
    name = f"{arm}-ae{share:g}"
    path = settings.workdir / "runs" / f"{name}-seed{seed}.json"
    if path.exists():
        return
    trainer = trainer_of(arm, share)
    rate = choose_rate(settings, name, trainer)
    began = time.perf_counter()
    compressor = trainer.train(seed, rate, settings.steps)
    if compressor is None:
        print(f"{name}, seed {seed}: diverged", file=sys.stderr, flush=True)
        return
    seconds = time.perf_counter() - began
    rows = synthetic.passages(HELD_OUT_SEED, settings.held_out, settings.people)
    by_k = {str(k): measure(compressor, rows, k) for k in settings.ks}
    sizes = compressor.base.config, compressor.adapter.lora, (1, 1, settings.segment)
    record = {
        "arm": arm,
        "share": share,
        "seed": seed,
        "rate": rate,
        "steps": settings.steps,
        "seconds": seconds,
        "training_flops": trainer.flops * settings.steps,
        "encoder_flops": {
            str(k): flops.compress(*sizes, k, compressor.config).total for k in settings.ks
        },
        "by_k": by_k,
    }
    files.write_json(path, record)
    em = {k: np.sum(of_k["qa"], 0) for k, of_k in by_k.items()}
    em = {k: round(float(sums[0] / sums[2]), 1) for k, sums in em.items()}
    spent = time.perf_counter() - began
    print(f"{name}, seed {seed}: EM {em}, {spent:.0f} s", file=sys.stderr, flush=True)
    alone = settings.workdir / "base.json"
    if not alone.exists():
        files.write_json(alone, base_alone(compressor, rows))


def choose_rate(settings: Settings, name: str, trainer: Trainer) -> float:
    """The rate of `RATES` with the lowest held-out loss after a tenth of the steps, at seed 0."""
    path = settings.workdir / "runs" / f"{name}-rate.json"
    if not path.exists():
        rows = synthetic.passages(CHOICE_SEED, CHOICE_PASSAGES, settings.people)
        losses = {}
        for rate in RATES:
            compressor = trainer.train(0, rate, max(settings.steps // 10, 1))
            if compressor is not None:
                losses[rate] = held_out_loss(compressor, rows, trainer.share, settings.ks)
            print(f"{name}, rate {rate:g}: {losses.get(rate)}", file=sys.stderr, flush=True)
        files.write_json(
            path, {"rate": min(losses, key=losses.get), "losses": list(losses.items())}
        )
    return files.read_json(path, "the choice of a rate")["rate"]


# ---------------------------------------------------------------------------------------- command


def arguments() -> argparse.Namespace:
    """The command line; ends the process where a value is impossible."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--workdir", required=True, type=pathlib.Path, help="the same command continues it")
    add("--arms", nargs="+", default=MAIN, choices=list(ARMS), help="by default the first six")
    add("--shares", nargs="+", type=float, default=SHARES, help="of AE in the loss")
    add("--seeds", type=int, default=3, help="how many")
    add("--k", nargs="+", type=int, default=(1, 3, 11), help="memory tokens that each model learns")
    add("--people", type=int, default=2, help="in a passage, about 23 tokens each")
    add("--steps", type=int, default=400)
    add("--batch_size", type=int, default=8)
    add("--questions", type=int, default=4, help="on each passage of a batch")
    add("--held_out", type=int, default=64, help="passages to measure on")
    add("--summary", action="store_true", help="train nothing; print what there is")
    args = parser.parse_args()
    bounds = {
        "shares": (0, 1),
        "seeds": (1, None),
        "k": (1, TOKENS_OF_ONE * args.people),
        "people": (1, len(synthetic.FIRST_NAMES)),
        "steps": (1, None),
        "batch_size": (1, None),
        "questions": (1, None),
        "held_out": (2, None),  # each is also read with another's memory
    }
    for name, (least, most) in bounds.items():
        values = getattr(args, name)
        for value in [values] if isinstance(values, int) else values:
            if not (value >= least and (most is None or value <= most)):
                limits = f"at least {least}" + (f" and at most {most}" if most else "")
                parser.error(f"--{name} is {value}; it must be {limits}")
    return args


def main() -> int:
    """Trains what is missing. Returns the exit code."""
    args = arguments()
    workdir = args.workdir
    if not args.summary:
        ks = tuple(sorted(set(args.k)))
        sizes = args.people, args.steps, args.batch_size, args.questions, args.held_out
        settings = Settings(workdir, ks, *sizes)
        prepare(settings)
        base = quickstart.load_base(quickstart.SHIPPED_BASE)
        trainer = functools.cache(functools.partial(Trainer, settings, base))
        # Seed by seed, so that arms can be compared whenever it is stopped.
        for seed, arm, share in itertools.product(range(args.seeds), args.arms, args.shares):
            run(settings, arm, share, seed, trainer)
    methods_table.summarise(workdir)
    return 0


def prepare(settings: Settings) -> None:
    """Writes the training passages. Ends the process if the workdir's runs have other settings."""
    fields = json.loads(json.dumps(dataclasses.asdict(settings) | {"workdir": ""}))
    path = settings.workdir / "settings.json"
    if path.exists():
        before = files.read_json(path, "settings")
        for name, value in fields.items():
            if before.get(name, value) != value:
                flag = "k" if name == "ks" else name
                raise SystemExit(
                    f"--{flag} is {value}, but the runs of {settings.workdir} have {before[name]}; "
                    "give the same, or another --workdir"
                )
    settings.workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, fields)
    lines = [
        json.dumps({"context": row["context"], **question}) + "\n"
        for row in synthetic.passages(TRAIN_SEED, TRAIN_PASSAGES, settings.people)
        for question in row["questions"]
    ]
    files.write_text(settings.workdir / "train.jsonl", "".join(lines))


if __name__ == "__main__":
    sys.exit(main())
