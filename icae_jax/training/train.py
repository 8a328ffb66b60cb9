"""The training loop, read top to bottom: `icae train` (a compressor) and `icae train-base` (a small base model) both run it."""

import contextlib
import importlib.metadata
import math
import pathlib
import sys
import time

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from icae_jax import errors, files
from icae_jax.performance import chips
from icae_jax.performance import profile as profiles
from icae_jax.runtime import distributed, sharding
from icae_jax.training import checkpoint, metrics, step
from icae_jax.training.workdir import check_workdir, nothing_trained, shared_fields, steps_done

DONE, PREEMPTED, DIVERGED = 0, 75, 3  # exit codes; 2 is bad input
QUIET, NORMAL, VERBOSE = 0, 1, 2  # how much `train` says
ALREADY = "{workdir} is done already ({steps} steps)"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)  # on whose versions shapes, values or files depend
TRACED = (
    3,
    5,
)  # the first and the last step of a start that --profile traces: those before them compile


def parameter_table(trained, frozen):
    """A text table of parameters, trained and frozen: a row for each array."""
    lines = [f"{'parameter':58}{'shape':>22}{'count':>14}"]
    for kind, tree in (("trained", trained), ("frozen", frozen)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for path, leaf in leaves:
            name = "/".join(str(k.key) for k in path)
            lines.append(f"{kind + ' ' + name:58}{leaf.shape!s:>22}{leaf.size:>14,}")
    return "\n".join(lines)


def parameter_counts(trained, frozen):
    """How many parameters are trained and frozen, in one line."""
    counts = [sum(x.size for x in jax.tree.leaves(t)) for t in (trained, frozen)]
    return f"trains {counts[0]:,} of {sum(counts):,} parameters ({100 * counts[0] / max(1, sum(counts)):.2f} %)"


def evaluate(task, eval_step, trained, frozen, rows, batch_size, leaving=lambda: False):
    """Mean held-out losses, `{kind: {objective: nats}}`; empty without held-out data, and None where `leaving()` says so between batches.

    The kinds are the task's: for a compressor "memory" and, as the control, "wrong_memory", another text's: what stays the same
    there was not read from the memory. rows: of each batch, those that this process makes.
    """
    mesh, totals = task.placement.mesh, {}
    for batches in task.eval_batches(rows):
        if leaving():
            return None
        for kind, batch in batches.items():
            found = eval_step(trained, frozen, sharding.put_batch(mesh, batch, rows, batch_size))
            for o, (loss, count) in found.items():
                loss_before, count_before = totals.setdefault(kind, {}).get(o, (0.0, 0.0))
                totals[kind][o] = (loss_before + float(loss), count_before + float(count))
    return {
        kind: {o: loss / count for o, (loss, count) in t.items() if count}
        for kind, t in totals.items()
    }


def put_ahead(mesh, host_batches, rows, batch_size):
    """`(batch on the host, the same on the devices)` of every batch, each put there while the one before it is still being used."""
    ready = None
    for batch in host_batches:
        behind, ready = ready, (batch, sharding.put_batch(mesh, batch, rows, batch_size))
        if behind:
            yield behind
    if ready:
        yield ready


def finished(config, workdir) -> bool:
    """Whether a workdir already has the steps that a configuration asks for: told by its files, before base or data are loaded.

    The same in all processes, which call it together. UserError where the workdir belongs to a configuration with other mathematics.
    """
    if not distributed.agreed(steps_done(workdir) >= config.steps):
        return False
    check_workdir(workdir, config, None, writes=lambda: False)
    return True


def shared_by_processes(config) -> dict[str, object]:
    """What all processes of a run must have alike before any of them loads anything, see `distributed.check_agreement`."""
    return shared_fields(config) | {
        f"version of {name}": importlib.metadata.version(name) for name in ("icae_jax", *PACKAGES)
    }


def train(
    config, task, workdir, *, log=None, profile=None, verbosity=NORMAL, title=None, watch=None
):
    """Trains `task` in `workdir` until `config.steps`; continues what is there. Returns an exit code.

    0: every step done, the result exported and `DONE` written. 75: SIGTERM came, the state is saved. 3: a loss, a gradient, an updated
    parameter or a held-out loss was not finite; nothing of it was saved. UserError: another process trains there, the workdir belongs to a
    configuration with other mathematics, or the processes differ in what they must have alike.
    Several processes all call this, with one workdir; the first writes metrics and the result. profile: a folder, into which steps
    `TRACED` after this start are traced, for XProf.
    log: takes lines of text, by default to stderr. verbosity: `QUIET` (only why it ends early, beside the progress bar), `NORMAL`, or
    `VERBOSE` (the table of parameters too). title: stands before the progress bar.
    watch: called as `watch(step, trained)` after every step, in every process; it may use the parameters only until it returns.
    """
    log = log or (lambda text: tqdm.write(text, file=sys.stderr))
    workdir = pathlib.Path(workdir)
    with errors.naming(f"--workdir {workdir}", "give a folder that can be written"):
        workdir.mkdir(parents=True, exist_ok=True)
    distributed.check_shared(workdir)
    writing = (
        contextlib.nullcontext()
        if finished(config, workdir)
        else distributed.only_writer(workdir, "--workdir")
    )
    with task.placement.active(), writing as lock:
        return _train(config, task, workdir, lock, log, profile, verbosity, title, watch)


def _train(config, task, workdir, lock, log, profile, verbosity, title, watch):
    main_process = jax.process_index() == 0

    def say(text, level=NORMAL):
        if main_process and verbosity >= level:
            log(text)

    mesh = task.placement.mesh
    sharding.check_batch_size(mesh, config.batch_size, config.accumulate)
    rows = sharding.local_rows(mesh, config.batch_size)

    # ---------------------------------------------------- the workdir: whose is it, is it done, do all processes mean the same?
    if finished(config, workdir):  # again: another run may have finished it while this one waited
        say(ALREADY.format(workdir=workdir, steps=config.steps))
        return DONE
    distributed.check_agreement(shared_by_processes(config) | task.shared_by_processes())
    binding = not distributed.agreed(nothing_trained(workdir))
    changes = check_workdir(workdir, config, task.identity, distributed.main_after_all, binding)
    for line in task.notes() + [f"changed: {change}" for change in changes]:
        say(line)

    # ----------------------------------------------------------------- state: resume, then initialise from, then scratch
    optimizer, learning_rate = step.make_optimizer(config.optimizer, config.steps)
    frozen, state = task.frozen, step.init_state(task.init(), optimizer)
    shardings = task.placement.tree(state)
    state = sharding.put(state, shardings)
    say(parameter_table(state["trained"], frozen), VERBOSE)
    say(parameter_counts(state["trained"], frozen))
    absl_logging.set_verbosity(
        absl_logging.FATAL
    )  # Orbax logs each thread's traceback of a failed save; the error is raised anyway
    saved, state = checkpoint.resume(workdir, state, lambda text: say(text, QUIET))
    first = -1 if saved is None else saved
    checkpoints = checkpoint.Checkpoints(workdir)
    if first < 0:
        source = (
            f"initialised from {config.init_from}"
            if getattr(config, "init_from", "")
            else "starting from scratch"
        )
        say(source)
    else:
        say(f"resumed at step {first}")
    lines = metrics.MetricsFile(workdir, first) if main_process else None

    # ----------------------------------------------------------------------------------------------------------- steps
    train_step = step.make_train_step(task, optimizer, config.seed, config.accumulate, shardings)
    eval_step = step.make_eval_step(task, config.accumulate)
    start = max(first, 0)
    stop = config.steps
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
    chip = chips.find(mesh.devices.flat[0].device_kind)
    shown, pending, clock, tokens_since, flops_since = {}, None, time.perf_counter(), 0.0, 0

    def flush(pending):
        """Reads one step's metrics (which waits for it), writes its line where due. Returns whether all of it is finite: losses and
        gradients, and the parameters after the update, which are what a checkpoint would hold.
        """
        nonlocal clock, tokens_since, flops_since
        at, device, about, least_flops = pending
        values = jax.device_get(device)
        losses = metrics.means(values["sums"], values["counts"])
        tokens_since += float(values["tokens"])
        flops_since += least_flops or 0
        if not all(
            map(
                math.isfinite,
                [*losses.values(), float(values["grad_norm"]), float(values["param_norm"])],
            )
        ):
            return False
        if at % config.log_every == 0 or at == stop:
            now = time.perf_counter()
            line = {"step": at, **about, "train": losses, "grad_norm": float(values["grad_norm"])}
            line |= {"learning_rate": float(learning_rate(at - 1))}
            line |= {"seconds": now - clock, "tokens_per_second": tokens_since / (now - clock)}
            utilisation = (
                metrics.mfu(flops_since, now - clock, chip, mesh.size) if flops_since else None
            )
            line |= {} if utilisation is None else {"mfu": utilisation}
            clock, tokens_since, flops_since = now, 0.0, 0
            lock.check()
            if lines:
                lines.write(line)
            shown.update(
                {o: f"{v:.3f}" for o, v in losses.items()}, tok_s=f"{line['tokens_per_second']:.0f}"
            )
            bar.set_postfix(shown)
        return True

    leaving = False

    def asked_to_leave():
        """Whether a notice to leave has come; the same in every process, which all call it equally often."""
        nonlocal leaving
        leaving = leaving or preemption.asked()
        return leaving

    def held_out(at):
        """Evaluates and writes the line. Returns the weighted loss: None without held-out data or where a notice to leave came meanwhile,
        NaN where any of them is not finite.
        """
        losses = evaluate(
            task, eval_step, state["trained"], frozen, rows, config.batch_size, asked_to_leave
        )
        if not losses:
            return None
        if not all(
            math.isfinite(loss)
            for by_objective in losses.values()
            for loss in by_objective.values()
        ):
            return math.nan
        total = task.held_out_loss(losses)
        if lines:
            lines.write({"step": at, "eval": losses, "eval_loss": total})
        parts = [
            f"{kind} {', '.join(f'{o} {v:.4f}' for o, v in of.items())}"
            for kind, of in losses.items()
        ]
        say(f"step {at}: held out: {'; '.join(parts)}")
        return total

    def is_finite(score):
        return score is None or math.isfinite(score)

    def diverged(at):
        checkpoints.wait()
        good = checkpoints.latest()
        what = "a loss, a gradient or a parameter"
        say(
            f"step {at}: {what} is not finite; last good checkpoint: {'none' if good is None else f'step {good}'}",
            QUIET,
        )
        return DIVERGED

    try:
        with (
            checkpoints,
            distributed.Preemption(lock.leave) as preemption,
            bar,
            contextlib.ExitStack() as tracing,
        ):
            due = first > 0 and (first % config.eval_every == 0 or first == stop)
            due = due and not distributed.agreed(bool(lines and lines.has_evaluation(first)))
            # due: it was saved on a notice to leave, which left no time to evaluate it.
            if (first < 0 or due) and not is_finite(held_out(start)):
                return diverged(start)
            if leaving:
                say(
                    f"SIGTERM: {'nothing to save yet' if first < 0 else f'saved step {first}'}; the same command continues",
                    QUIET,
                )
                return PREEMPTED
            ahead = put_ahead(mesh, task.train_batches(start, stop, rows), rows, config.batch_size)
            for at, (host_batch, batch) in zip(range(start + 1, stop + 1), ahead, strict=True):
                if profile and at - start == TRACED[0]:
                    jax.block_until_ready(state)
                    tracing.enter_context(profiles.tracing(profile))
                state, device = train_step(state, frozen, batch)
                if profile and at == min(start + TRACED[1], stop) and at - start >= TRACED[0]:
                    jax.block_until_ready(state)
                    tracing.close()
                    say(
                        f"traced {at - start - TRACED[0] + 1} steps; look at them with: xprof {profile}"
                    )
                if pending and not flush(
                    pending
                ):  # one step late: the device is already busy with the next
                    return diverged(pending[0])
                pending = (at, device, task.describe(host_batch), task.least_flops(batch))
                bar.update()
                if watch:
                    watch(at, state["trained"])
                evaluating = not asked_to_leave() and (at % config.eval_every == 0 or at == stop)
                if evaluating or leaving or at % config.checkpoint_every == 0:
                    if not flush(pending):
                        return diverged(at)
                    pending = None
                    score = held_out(at) if evaluating else None
                    if not is_finite(score):
                        return diverged(at)
                    lock.check()
                    checkpoints.save(at, state, score)
                if leaving:
                    checkpoints.wait()
                    say(f"SIGTERM: saved step {at}; the same command continues", QUIET)
                    return PREEMPTED
            lock.check()
            checkpoints.wait()
            trained, best = sharding.on_host(state["trained"]), checkpoints.best()
            if main_process:
                folder = errors.retrying(
                    lambda: task.export(workdir, trained), "writing the result"
                )
                errors.retrying(
                    lambda: files.write_text(workdir / "DONE", f"{stop}\n"), "writing DONE"
                )
                say(
                    f"done: {stop} steps{'' if best is None else f', lowest held-out loss at step {best}'}; {folder}"
                )
            return DONE
    finally:
        if lines:
            lines.close()
