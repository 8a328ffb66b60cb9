"""Deliberate faults of methods and of what they are trained with (`faults.py` has the rest)."""

from faults import Mutant

FAULTS_A = [
    Mutant(
        "KL goes from the student to the teacher", "objectives/loss.py",
        "jnp.sum(jnp.exp(teacher_log_p) * (teacher_log_p - log_p), -1)",
        "jnp.sum(jnp.exp(log_p) * (log_p - teacher_log_p), -1)", "test_distil.py -k gradient_is",
    ),
    Mutant(
        "the gradient forgets the KL's weight", "objectives/loss.py",
        "weight * (p - jnp.exp(teacher_log_p))", "(p - jnp.exp(teacher_log_p))", "test_distil.py -k gradient_is",
    ),
    Mutant(
        "a teacher reads the encoder's <s> too", "objectives/distil.py",
        "real = real.at[:, 0, :skipped].set(False).reshape(B, S * N)", "real = real.reshape(B, S * N)",
        "test_distil.py -k reads_the_whole",
    ),
    Mutant(
        "padding between segments takes positions", "objectives/distil.py",
        "return jnp.maximum(jnp.cumsum(real, 1, dtype=jnp.int32) - 1, 0)",
        "return jnp.maximum(jnp.cumsum(jnp.ones_like(real), 1, dtype=jnp.int32) - 1, 0)", "test_distil.py -k reads_the_whole",
    ),
    Mutant(
        "a teacher sees trained tokens", "objectives/distil.py",
        "prefix.visible, real=real, at=at)", "prefix.visible, at=at)", "test_distil.py -k reads_the_whole",
    ),
    Mutant(
        "a teacher predicts a label from a trained token", "objectives/distil.py",
        "jnp.where(real, jnp.arange(T)[None], 0)", "jnp.arange(T)[None] + 0 * ids", "test_distil.py -k reads_the_whole",
    ),
    Mutant(
        "every teacher is the base alone", "training/compressor_losses.py",
        "Decoder(FrozenModel(self.decoder, frozen), None, lora)", "Decoder(FrozenModel(self.decoder, frozen), None)",
        "test_distil.py -k teachers_differ",
    ),
    Mutant(
        "checkpoints are ranked with the KL", "training/compressor_task.py",
        "weights = self.config.objectives.weights", "weights = self.weights", "test_distil.py -k held_out",
    ),
    Mutant(
        "the control's teacher reads another text", "training/compressor_task.py",
        'batch[FULL_TEXT] = {name: batch[name] for name in ("context", "lengths")}', "pass", "test_distil.py -k held_out",
    ),
    Mutant(
        "a run does not record its teacher", "training/compressor_task.py",
        'self.identity["teacher"] = self.teacher.fingerprint if teacher else own', "pass", "test_distil.py -k belongs_to",
    ),
    Mutant(
        "a teacher's positions are not checked", "training/compressor_losses.py",
        "return before + text + max(qa,", "return 0 * max(qa,", "test_distil.py -k refusals",
    ),
    Mutant(
        "the meter leaves out the teacher", "performance/utilisation.py",
        "before=t.before,", "before=None,", "test_distil.py -k meter",
    ),
    Mutant(
        "answers go to other questions", "workflows/distil.py",
        "progress.add(dict(zip(chunk, answers, strict=True)))", "progress.add(dict(zip(chunk[::-1], answers, strict=True)))",
        "test_prepare_distil.py -k whole_context",
    ),
    Mutant(
        "a killed run answers all anew", "workflows/distil.py",
        "if i not in progress.answers)", "if True)", "test_prepare_distil.py -k killed",
    ),
    Mutant(
        "an adapter's teacher is the base alone", "workflows/distil.py",
        "jnp.zeros((1, base.config.hidden_size)), lora)", "jnp.zeros((1, base.config.hidden_size)), None)",
        "test_prepare_distil.py -k adapter_s",
    ),
]  # fmt: skip
