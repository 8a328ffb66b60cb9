"""The training loop, read top to bottom: `icae train` runs it for compressors and small bases."""

import contextlib
import importlib.metadata
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from absl import logging as absl_logging
from jaxtyping import PyTree
from tqdm import tqdm

from icae_jax import errors, files
from icae_jax.models.quantize import is_quantized
from icae_jax.runtime import distributed, profiler, sharding
from icae_jax.training import checkpoint, metrics, step
from icae_jax.training.config import BaseConfig, TrainConfig
from icae_jax.training.optimizer import make_optimizer
from icae_jax.training.task import MeanLosses, Rows, Task
from icae_jax.training.workdir import check_workdir, nothing_trained, shared_fields, steps_done

DONE, PREEMPTED, DIVERGED = 0, 75, 3  # exit codes; 2 is bad input
QUIET, NORMAL, VERBOSE = 0, 1, 2  # how much `train` says
ALREADY = "{workdir} is done already ({steps})"
# Shapes, values or files depend on the versions of these.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
TRACED = (3, 5)  # first and last step after a start that are traced: compilation is over by then


@runtime_checkable
class Meter(Protocol):
    """Measures how well the devices are used (`performance.utilisation.Meter`)."""

    def least_flops(self, batch: PyTree) -> int:
        """The fewest FLOPs that a step on a global batch takes."""

    def utilisation(self, least_flops: float, seconds: float) -> float | None:
        """The share of the devices' peak; None where that is unknown."""


def parameter_table(trained: PyTree, frozen: PyTree) -> str:
    """A text table with a row for each array, trained and frozen."""
    lines = [f"{'parameter':58}{'shape':>22}{'count':>14}"]
    for kind, tree in (("trained", trained), ("frozen", frozen)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized):
            name, size = "/".join(str(k.key) for k in path), math.prod(leaf.shape)
            lines.append(f"{kind + ' ' + name:58}{leaf.shape!s:>22}{size:>14,}")
    return "\n".join(lines)


def parameter_counts(trained: PyTree, frozen: PyTree) -> str:
    """One line: how many parameters are trained, of how many."""
    ours, theirs = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(t, is_leaf=is_quantized))
        for t in (trained, frozen)
    )
    total = ours + theirs
    return f"trains {ours:,} of {total:,} parameters ({100 * ours / max(1, total):.2f} %)"


def evaluate(
    task: Task,
    eval_step: Callable,
    trained: PyTree,
    frozen: PyTree,
    rows: Rows,
    batch_size: int,
    leaving: Callable[[], bool] = lambda: False,
) -> MeanLosses | None:
    """Mean held-out losses in nats; {} without held-out data, None if `leaving()` between batches.

    Their kinds are the task's. A compressor's are "memory" and the control "wrong_memory",
    another text's: what the right memory does not improve on was not read from it.
    """
    mesh, totals = task.placement.mesh, {}
    for batches in task.eval_batches(rows):
        if leaving():
            return None
        for kind, batch in batches.items():
            losses = eval_step(trained, frozen, sharding.put_batch(mesh, batch, rows, batch_size))
            of_kind = totals.setdefault(kind, {})
            for objective, (loss, count) in losses.items():
                loss_before, count_before = of_kind.get(objective, (0.0, 0.0))
                of_kind[objective] = (loss_before + float(loss), count_before + float(count))
    return {
        kind: {o: loss / count for o, (loss, count) in of_kind.items() if count}
        for kind, of_kind in totals.items()
    }


def put_ahead(
    mesh: jax.sharding.Mesh | None, host_batches: Iterable, rows: Rows | None, batch_size: int
) -> Iterator[tuple]:
    """Yields `(host batch, device batch)`; each is transferred one step before it is used."""
    ready = None
    for batch in host_batches:
        previous, ready = ready, (batch, sharding.put_batch(mesh, batch, rows, batch_size))
        if previous:
            yield previous
    if ready:
        yield ready


def finished(config: TrainConfig | BaseConfig, workdir: str | os.PathLike) -> bool:
    """Whether a workdir already has the steps that a configuration asks for.

    Reads its files alone, before base or data are loaded. A collective: all processes call it.
    UserError where the workdir belongs to a configuration with other mathematics.
    """
    if not distributed.agreed(steps_done(workdir) >= config.steps):
        return False
    check_workdir(workdir, config, None, writes=lambda: False)
    return True


def shared_by_processes(config: TrainConfig | BaseConfig) -> dict[str, object]:
    """What all processes must agree on before loading anything (`distributed.check_agreement`)."""
    return shared_fields(config) | {
        f"version of {name}": importlib.metadata.version(name) for name in ("icae_jax", *PACKAGES)
    }


class _StepResult(NamedTuple):
    """A step whose metrics are still on the devices. least_flops: 0 without a meter."""

    step: int
    device_metrics: dict[str, Any]
    extra_fields: dict[str, Any]
    least_flops: int


class _StepLog:
    """Turns step results into metrics lines and the progress bar; keeps the clock between lines."""

    def __init__(self, config, lines: metrics.MetricsFile | None, bar: tqdm, learning_rate, meter):
        self._config, self._lines, self._bar = config, lines, bar
        self._learning_rate, self._meter = learning_rate, meter
        self._restart_clock()

    def _restart_clock(self):
        self._since, self._tokens, self._least_flops = time.perf_counter(), 0.0, 0

    def write(self, result: _StepResult, check: Callable[[], None]) -> bool:
        """Waits for a step's metrics and writes a line where one is due.

        Returns whether all is finite: losses, gradients, and the parameters after the update,
        which are what a checkpoint would hold. check: raises if this run lost its workdir.
        """
        values = jax.device_get(result.device_metrics)
        losses = metrics.means(values["sums"], values["counts"])
        grad_norm, param_norm = float(values["grad_norm"]), float(values["param_norm"])
        self._tokens += float(values["tokens"])
        self._least_flops += result.least_flops
        if not all(map(math.isfinite, [*losses.values(), grad_norm, param_norm])):
            return False
        if result.step % self._config.log_every and result.step != self._config.steps:
            return True
        seconds = time.perf_counter() - self._since
        line = {
            "step": result.step,
            **result.extra_fields,
            "train": losses,
            "grad_norm": grad_norm,
            "learning_rate": float(self._learning_rate(result.step - 1)),
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        if self._meter:
            mfu = self._meter.utilisation(self._least_flops, seconds)
            line |= {} if mfu is None else {"mfu": mfu}
        self._restart_clock()
        check()
        if self._lines:
            self._lines.write(line)
        shown = {o: f"{loss:.3f}" for o, loss in losses.items()}
        self._bar.set_postfix(shown | {"tok_s": f"{line['tokens_per_second']:.0f}"})
        return True


class _Trace:
    """Traces steps `TRACED` after a start into a folder; without a folder it does nothing."""

    def __init__(self, folder: str | os.PathLike | None, start: int, stop: int):
        self._folder, self._context = folder, contextlib.ExitStack()
        self._first, self._last = start + TRACED[0], min(start + TRACED[1], stop)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.close()

    def before(self, number: int, state: PyTree) -> None:
        """Starts tracing before the first traced step."""
        if self._folder and number == self._first:
            jax.block_until_ready(state)
            self._context.enter_context(profiler.tracing(self._folder))

    def after(self, number: int, state: PyTree) -> str:
        """Ends tracing after the last traced step; returns a line to log, else ""."""
        if not self._folder or number != self._last or self._last < self._first:
            return ""
        jax.block_until_ready(state)
        self._context.close()
        count = self._last - self._first + 1
        return f"traced {errors.counted(count, 'steps')}; look at them with: xprof {self._folder}"


def train(
    config: TrainConfig | BaseConfig,
    task: Task,
    workdir: str | os.PathLike,
    *,
    log: Callable[[str], Any] | None = None,
    verbosity: int = NORMAL,
    title: str | None = None,
    watch: Callable[[int, PyTree], Any] | None = None,
    meter: Meter | None = None,
    profile: str | os.PathLike | None = None,
) -> int:
    """Trains `task` in `workdir` until `config.steps`, from its latest checkpoint if there is one.

    Several processes all call this with one workdir; process 0 writes metrics and the result.

    Args:
      config: the configuration that the task was made from; its step counts may differ.
      task: what is trained.
      workdir: takes checkpoints, metrics and the result.
      log: takes lines of text; by default they go to stderr.
      verbosity: `QUIET` (only why a run ends early), `NORMAL`, or `VERBOSE` (all parameters).
      title: stands before the progress bar.
      watch: called as `watch(step, trained)` after every step, in every process; the parameters
        are donated to the next step as soon as it returns.
      meter: adds `mfu` to the metrics.
      profile: a folder for a trace of a few steps.

    Returns:
      0: every step is done, the result is exported and `DONE` written. 75: a preemption signal
      came and the state is saved. 3: a loss, gradient, updated parameter or held-out loss was
      not finite; nothing of it was saved.

    Raises:
      UserError: another process trains there, the workdir belongs to a configuration with other
        mathematics, or the processes disagree.
    """
    workdir = pathlib.Path(workdir)
    log = log or (lambda text: tqdm.write(text, file=sys.stderr))
    main_process = jax.process_index() == 0

    def say(text, level=NORMAL):
        if main_process and verbosity >= level:
            log(text)

    with contextlib.ExitStack() as stack:
        # ------------------------------------------------- workdir: ours, not done, agreed upon?
        with errors.naming(f"--workdir {workdir}", "give a folder that can be written"):
            workdir.mkdir(parents=True, exist_ok=True)
        distributed.check_shared(workdir)
        mesh = task.placement.mesh
        stack.enter_context(task.placement.active())
        lock = None
        if not finished(config, workdir):
            lock = stack.enter_context(distributed.only_writer(workdir, "--workdir"))
        sharding.check_batch_size(mesh, config.batch_size, config.accumulate)
        rows = sharding.local_rows(mesh, config.batch_size)
        if finished(config, workdir):  # another run may have finished it while this one waited
            say(ALREADY.format(workdir=workdir, steps=errors.counted(config.steps, "steps")))
            return DONE
        distributed.check_agreement(shared_by_processes(config) | task.shared_by_processes())
        binding = not distributed.agreed(nothing_trained(workdir))
        changes = check_workdir(workdir, config, task.identity, distributed.main_after_all, binding)
        for line in task.notes() + [f"changed: {change}" for change in changes]:
            say(line)

        # ------------------------------------ state: resumed, or from `init_from`, or from scratch
        optimizer, learning_rate = make_optimizer(config.optimizer, config.steps)
        frozen, state = task.frozen, step.init_state(task.init(), optimizer)
        shardings = task.placement.tree(state)
        state = sharding.put(state, shardings)
        say(parameter_table(state["trained"], frozen), VERBOSE)
        say(parameter_counts(state["trained"], frozen))
        # Orbax logs a traceback from each thread of a failed save; the error is raised anyway.
        absl_logging.set_verbosity(absl_logging.FATAL)
        saved, state = checkpoint.resume(workdir, state, lambda text: say(text, QUIET))
        checkpoints = checkpoint.Checkpoints(workdir)
        start, stop = saved or 0, config.steps
        init_from = getattr(config, "init_from", "")
        if saved is not None:
            say(f"resumed at step {saved}")
        else:
            say(f"initialised from {init_from}" if init_from else "starting from scratch")
        lines = None
        if main_process:
            lines = metrics.MetricsFile(workdir, -1 if saved is None else saved)
            stack.callback(lines.close)
        stack.enter_context(checkpoints)
        preemption = stack.enter_context(distributed.Preemption(lock.leave))
        leaving = False

        def asked_to_leave():
            """Whether a preemption signal has come. A collective: all call it equally often."""
            nonlocal leaving
            leaving = leaving or preemption.asked()
            return leaving

        # ---------------------------------------------------------------------------- evaluation
        eval_step = step.make_eval_step(task, config.accumulate)

        def held_out(number):
            """Evaluates and writes the line. Returns the loss to rank by, NaN if any is not finite.

            None without held-out data, or where a preemption signal came meanwhile.
            """
            losses = evaluate(
                task, eval_step, state["trained"], frozen, rows, config.batch_size, asked_to_leave
            )
            if not losses:
                return None
            if not all(math.isfinite(x) for of_kind in losses.values() for x in of_kind.values()):
                return math.nan
            total = task.held_out_loss(losses)
            if lines:
                lines.write({"step": number, "eval": losses, "eval_loss": total})
            texts = [
                f"{kind} {', '.join(f'{o} {loss:.4f}' for o, loss in of_kind.items())}"
                for kind, of_kind in losses.items()
            ]
            say(f"step {number}: held out: {'; '.join(texts)}")
            return total

        def finite(loss):
            return loss is None or math.isfinite(loss)

        def diverged(number):
            checkpoints.wait()
            good = checkpoints.latest()
            say(
                f"step {number}: a loss, a gradient or a parameter is not finite; "
                f"last good checkpoint: {'none' if good is None else f'step {good}'}",
                QUIET,
            )
            return DIVERGED

        # A step saved on a preemption signal, which left no time to evaluate it, is evaluated now.
        due = saved is not None and (saved % config.eval_every == 0 or saved == stop)
        due = due and not distributed.agreed(bool(lines and lines.has_evaluation(saved)))
        if (saved is None or due) and not finite(held_out(start)):
            return diverged(start)
        if leaving:
            done = "nothing to save yet" if saved is None else f"saved step {saved}"
            say(f"SIGTERM: {done}; the same command continues", QUIET)
            return PREEMPTED

        # --------------------------------------------------------------------------------- steps
        train_step = step.make_train_step(
            task, optimizer, config.seed, config.accumulate, shardings
        )
        bar = tqdm(
            total=stop,
            initial=start,
            desc=title,
            unit="step",
            file=sys.stderr,
            disable=not main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        stack.enter_context(bar)
        trace = stack.enter_context(_Trace(profile, start, stop))
        step_log = _StepLog(config, lines, bar, learning_rate, meter)
        pending = None  # the step before: read one step late, when the devices are busy again
        batches = task.train_batches(start, stop, rows)
        batches = put_ahead(mesh, batches, rows, config.batch_size)
        for number, (host_batch, batch) in zip(range(start + 1, stop + 1), batches, strict=True):
            trace.before(number, state)
            state, device_metrics = train_step(state, frozen, batch)
            if traced := trace.after(number, state):
                say(traced)
            if pending and not step_log.write(pending, lock.check):
                return diverged(pending.step)
            least_flops = meter.least_flops(batch) if meter else 0
            pending = _StepResult(number, device_metrics, task.describe(host_batch), least_flops)
            bar.update()
            if watch:
                watch(number, state["trained"])
            evaluating = not asked_to_leave() and (
                number % config.eval_every == 0 or number == stop
            )
            if evaluating or leaving or number % config.checkpoint_every == 0:
                if not step_log.write(pending, lock.check):
                    return diverged(number)
                pending = None
                loss = held_out(number) if evaluating else None
                if not finite(loss):
                    return diverged(number)
                lock.check()
                checkpoints.save(number, state, loss)
            if leaving:
                checkpoints.wait()
                say(f"SIGTERM: saved step {number}; the same command continues", QUIET)
                return PREEMPTED

        # ------------------------------------------------------------------------------- result
        lock.check()
        checkpoints.wait()
        trained, best = sharding.on_host(state["trained"]), checkpoints.best()
        if main_process:
            folder = errors.retrying(lambda: task.export(workdir, trained), "writing the result")
            errors.retrying(lambda: files.write_text(workdir / "DONE", f"{stop}\n"), "writing DONE")
            lowest = "" if best is None else f", lowest held-out loss at step {best}"
            say(f"done: {errors.counted(stop, 'steps')}{lowest}; {folder}")
        return DONE
