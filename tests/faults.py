"""Deliberate faults, and the tests that should fail of each: `tests/mutants.py` plants them, and those of `faults_of_input.py`."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: what it is, where (below icae_jax), the text and what stands in its place, and the arguments of pytest that try it."""

    what: str
    file: str
    text: str
    fault: str
    tests: str


MUTANTS = [
    # ------------------------------------------------------------------------------------------------ labels and losses
    Mutant(
        "padding counts as labels", "objectives/loss.py",
        'jnp.sum(jnp.where(targets[o]["label_mask"], losses[o], 0.0))', "jnp.sum(losses[o])", "test_loss.py -k sums_count",
    ),
    Mutant(
        "a continuation's first tokens are labels", "objectives/targets.py",
        "len(given) + LM_UNLABELLED)", "len(given))", "test_targets.py",
    ),
    Mutant(
        "labels are predicted by themselves", "objectives/packing.py",
        "np.arange(target.label_start - 1, inputs)", "np.arange(target.label_start, inputs + 1)", "test_targets.py test_loss.py -k pack",
    ),
    Mutant(
        "targets start at another text's position", "compression/decoder.py",
        "jnp.repeat(starts_B, G)[:, None]", "jnp.tile(starts_B, G)[:, None]", "test_loss.py -k packed_target",
    ),
    Mutant(
        "the gradient of the loss forgets the label", "objectives/loss.py",
        "jax.nn.softmax(logits, -1) - jax.nn.one_hot(labels, logits.shape[-1])", "jax.nn.softmax(logits, -1)",
        "test_loss.py -k cross_entropy",
    ),
    Mutant(
        "autoencoding never restarts at position 0", "compression/layout.py",
        'objective == "ae" and self.ae_restarts', "False", "test_layout.py test_loss.py -k starts",
    ),
    Mutant(
        "the mistral template loses [FT]", "objectives/targets.py",
        '(FT,), _ids(tokenizer, "[/INST]")', '(), _ids(tokenizer, "[/INST]")', "test_targets.py",
    ),
    Mutant(
        "the chat template's parts change places", "objectives/joint.py",
        "return tuple(heads[0]), *frame", "return frame[0], tuple(heads[0]), frame[1]", "test_targets.py",
    ),
    # ---------------------------------------------------------------------------------------------- positions, segments
    Mutant(
        "memory tokens sit at the start of their share", "compression/layout.py",
        "2 * jnp.arange(k) + 1) // (2 * k)", "2 * jnp.arange(k)) // (2 * k)", "test_layout.py -k spread",
    ),
    Mutant(
        "empty segments take positions", "compression/layout.py",
        "real = (lengths_BS > 0).astype(jnp.int32)", "real = jnp.ones_like(lengths_BS)", "test_layout.py -k missing_segment",
    ),
    Mutant(
        "the reference layout's memory is read at 0", "compression/layout.py",
        "(fixed_length if self.read_in_place else 0), ends[:, -1]", "0, ends[:, -1]", "test_layout.py -k decoder_positions",
    ),
    Mutant(
        "one token of padding is attended to", "compression/encoder.py",
        "jnp.arange(N)[None] < lengths[:, None]", "jnp.arange(N)[None] <= lengths[:, None]", "test_icae.py -k padding",
    ),
    Mutant(
        "segments are not near-equal", "compression/segments.py",
        "return segments, math.ceil(tokens / segments)", "return segments, min(tokens, config.segment_tokens)",
        "test_encoder.py -k segment",
    ),
    Mutant(
        "special rows count from the table's start", "compression/decoder.py",
        "jnp.where(ids < 0, ids + table.shape[0], 0)", "jnp.where(ids < 0, -ids - 1, 0)", "test_encoder.py -k negative",
    ),
    Mutant(
        "absent segments are read", "compression/memory.py",
        ".repeat(lengths_BS > 0, k, axis=1)", ".repeat(lengths_BS >= 0, k, axis=1)", "test_methods.py -k missing_segment",
    ),
    # ------------------------------------------------------------------------------------------------- the two methods
    Mutant(
        "the decoder has the encoder's LoRA", "compression/decoder.py",
        "lora = trained.get(DECODER_LORA)", 'lora = trained.get("lora")', "test_icae.py -k through_memory",
    ),
    Mutant(
        "K is kept after RoPE", "models/blocks.py",
        "return output(out), (rotated if self.rotated else k, v)", "return output(out), (rotated, v)", "test_x500.py -k real_tokens",
    ),
    Mutant(
        "K/V are read at the head's positions", "compression/memory.py",
        "h + self.positions, self.mask, self.v", "self.positions, self.mask, self.v", "test_x500.py -k real_tokens",
    ),
    Mutant(
        "slots are read at the head's positions", "compression/memory.py",
        "h + self.positions], 1)", "self.positions], 1)", "test_icae.py -k head_runs",
    ),
    Mutant(
        "a chosen k takes the table's last rows", "compression/encoder.py",
        'trained["memory_table"][:k]', 'trained["memory_table"][-k - 3 : -3]', "test_methods.py -k chosen_k",
    ),
    # ----------------------------------------------------------------------------------------------------- the model
    Mutant(
        "RoPE turns half of the pairs back", "models/rope.py",
        "x1 * cos - x2 * sin", "x1 * cos + x2 * sin", "test_rope.py -k distances",
    ),
    Mutant(
        "all layers' keys are rotated by the first layer's RoPE", "models/rope.py",
        "(jnp.stack(tables)[layer_kinds(config)] for tables", "(jnp.stack(tables)[:1] for tables",
        "test_families.py -k prefix_and_continuation",
    ),
    Mutant(
        "a layer takes another layer's RoPE", "models/llama.py",
        "jax.lax.dynamic_index_in_dim(t, kind, keepdims=False)", "t[0]", "test_families.py -k 'transformers and gemma3'",
    ),
    Mutant(
        "an exported cache turns all layers alike", "interop/export/hf_cache.py",
        ".astype(np.float64)[rope.layer_kinds(config)]", ".astype(np.float64)[:1]", "test_families.py -k further_rotation",
    ),
    Mutant(
        "attention's gradient forgets the soft cap", "models/plain_attention.py",
        "return gradient * (1 - jnp.square(jnp.tanh(scaled / self.softcap)))", "return gradient",
        "test_families.py -k soft_cap_of_scores",
    ),
    Mutant(
        "the loss's gradient forgets the logits' soft cap", "models/llama.py",
        "d_logits * (1 - jnp.square(logits / self.softcap))", "d_logits", "test_families.py -k frozen_head",
    ),
    Mutant(
        "the loss's gradient forgets the logits' divisor", "models/llama.py",
        "else d_logits / self.divisor", "else d_logits", "test_families.py -k frozen_head",
    ),
    Mutant(
        "memory starts among embeddings that are not multiplied", "compression/trained.py",
        "table = multiplier * (mean + std * table)", "table = mean + std * table",
        "test_families.py -k memory_starts",
    ),
    Mutant(
        "k is read from the rows of q", "interop/hub/weights.py",
        "stored_rows = slice(first_row + start, first_row + stop)", "stored_rows = slice(start, stop)",
        "test_families.py -k fused_tensors",
    ),
    Mutant(
        "a fused base has a fingerprint of its own", "interop/hub/identity.py",
        '_NEVER_COUNT = ("max_position_embeddings", "fused")', '_NEVER_COUNT = ("max_position_embeddings",)',
        "test_families.py -k fingerprints",
    ),
    Mutant(
        "a window is one position too wide", "models/blocks.py",
        "(query_positions - positions[:, None] < window)", "(query_positions - positions[:, None] <= window)", "test_llama.py -k window",
    ),
    Mutant(
        "chunks of queries take the first chunk's mask", "models/plain_attention.py",
        "mask[..., at, :]", "mask[..., : at.stop - at.start, :]", "test_attention.py -k 'not tpu and not mesh'",
    ),
    Mutant(
        "a chunk of queries does not see its own last key", "models/attention.py",
        "max()) + 1 for start in", "max()) for start in", "test_attention.py -k 'not tpu and not mesh'",
    ),
    Mutant(
        "LoRA's scale is left out", "models/blocks.py",
        "update * jnp.asarray(self.lora_scale, x.dtype)", "update", "test_lora.py -k merged",
    ),
    Mutant(
        "dropout does not keep the mean", "models/blocks.py",
        "x / (1 - self.lora_dropout), 0)", "x, 0)", "test_lora.py -k mean",
    ),
    Mutant(
        "the last layer keeps the keys of all positions", "models/blocks.py",
        "attention.keys_and_values(rows(normed, keep), kept)", "attention.keys_and_values(rows(normed, None), cos_sin)", "test_x500.py",
    ),
    Mutant(
        "remat frozen does a matmul twice", "models/llama.py",
        'save_only_these_names("projection", "lora", "attention")', 'save_only_these_names("lora", "attention")', "test_llama.py -k remat",
    ),
    # ---------------------------------------------------------------------------------------------------- training steps
    Mutant(
        "microbatches are divided by their own labels", "training/step.py",
        "jnp.maximum(counts[o], 1.0)", "jnp.maximum(task.counts(micro)[o] * accumulate, 1.0)", "test_step.py -k accumulating",
    ),
    Mutant(
        "all microbatches have one dropout key", "training/step.py",
        "jax.random.fold_in(key, number)", "key", "test_step.py -k randomness",
    ),
    Mutant(
        "all steps have one dropout key", "training/step.py",
        'jax.random.fold_in(jax.random.key(seed), state["step"])', "jax.random.key(seed)", "test_step.py -k randomness",
    ),
    Mutant(
        "the warm-up's first step does nothing", "training/optimizer.py",
        "return schedule(step + 1)", "return schedule(step)", "test_step.py -k learning_rate",
    ),
    Mutant(
        "the wrong memory is the right one", "data/examples.py",
        "self.example(*self.other_text(bucket, number))", "self.example(bucket, number)", "test_compressor_task.py -k control",
    ),
    Mutant(
        "a memory of another dtype is read in its own", "compression/memory.py",
        "jnp.asarray(x, decoder.base.dtype)", "jnp.asarray(x)", "test_compressor.py -k another_dtype",
    ),
    Mutant(
        "queries at some positions read the first rows of a mask", "models/blocks.py",
        "mask if mask.shape[1] == 1 else rows(mask, at)", "mask", "test_llama.py -k some_positions_behind",
    ),
    Mutant(
        "scoring runs the head at every position", "inference/reading.py",
        "round_up(max(longest)), round_up(labels)", "round_up(max(longest)), round_up(max(longest))", "test_compressor.py -k head_runs",
    ),
    Mutant(
        "attention is timed for every compressor", "runtime/attention_choice.py",
        "if key not in _TIMINGS:", "if True:", "test_attention_choice.py -k once",
    ),
    Mutant(
        "a name with two $ is a formula", "evaluation/report.py",
        r'text = str(text).replace("$", r"\$")', "text = str(text)", "test_report.py -k as_they_are",
    ),
    Mutant(
        "the checkpoint before the latest is not kept", "training/checkpoint.py",
        "managers.LatestN(n=2),", "managers.LatestN(n=1),", "test_checkpoint.py -k latest_two",
    ),
    Mutant(
        "the worst checkpoint is kept as the best", "training/checkpoint.py",
        "managers.BestN(", "managers.BestN(reverse=True, ", "test_checkpoint.py -k latest_two",
    ),
    Mutant(
        "a resumed run draws the data of its first steps", "training/train.py",
        "task.train_batches(start, stop, rows)", "task.train_batches(0, stop - start, rows)",
        "test_train.py -k 'stays_finished or bit_exactly'",
    ),
    # --------------------------------------------------------------------------------------------------------- data
    Mutant(
        "every step draws the same bucket", "data/drawing.py",
        "default_rng([seed, 0, step])", "default_rng([seed, 0])", "test_batches.py",
    ),
    Mutant(
        "every epoch has the same order", "data/drawing.py",
        "default_rng([seed, 1, bucket, epoch, *source])", "default_rng([seed, 1, bucket, *source])", "test_batches.py",
    ),
    Mutant(
        "the drawn k knows no seed", "data/drawing.py",
        "default_rng([seed, 3, step])", "default_rng([3, step])", "test_batches.py",
    ),
    Mutant(
        "later shares of a mixture count as if none came before", "data/mixture.py",
        "after - taken_after, left - share", "after - taken_after, left", "test_mixture.py",
    ),
    Mutant(
        "continuations too short to tell are LM targets", "data/index.py",
        "after - stop > min(LM_MINIMUM, size - 1)", "after - stop > 0", "test_batches.py",
    ),
    # ------------------------------------------------------------------------------------------------- what is on disk
    Mutant(
        "PEFT's matrices lie untransposed", "interop/adapters/lora_tensors.py",
        "np.ascontiguousarray(layer.T)", "np.ascontiguousarray(layer)", "test_adapter.py",
    ),
    Mutant(
        "PEFT's alpha is the scale", "interop/adapters/folder.py",
        '"lora_alpha": adapter.lora.scale * adapter.lora.rank', '"lora_alpha": adapter.lora.scale', "test_adapter.py",
    ),
    Mutant(
        "another base's memories are read", "inference/origin.py",
        "        if written_with != have:\n            yield (\n                f\"{what} was",
        '        if written_with != have and kind != "base":\n            yield (\n                f"{what} was', "test_memory_file.py -k another_base",
    ),
    # ------------------------------------------------------------------------------------------------------- decoding
    Mutant(
        "a row goes on behind its limit", "inference/requests.py",
        "if not full and not stopped:", "if not stopped:", "test_generate.py -k limit",
    ),
    Mutant(
        "ties after the end are counted", "inference/requests.py",
        "if not full or stopped:\n            self.ties", "if True:\n            self.ties", "test_generate.py -k limit",
    ),
    Mutant(
        "a stop id is kept in the text", "inference/requests.py",
        "if not full and not stopped:", "if not full:", "test_generate.py -k stop_id",
    ),
    Mutant(
        "rows that are prefilled decode along", "inference/decoding.py",
        "written=rows.written + active,", "written=rows.written + 1,", "test_engine.py -k 'long_prompt or come_and_go'",
    ),
    Mutant(
        "rows read their neighbour's memory", "inference/cache.py",
        "rows=places, heads_first=True)", "rows=None, heads_first=True)", "test_engine.py -k shared",
    ),
    Mutant(
        "rows read as much as their place ever held", "inference/cache.py",
        "memory_mask=self.memory_mask.at[places].set(mask, mode=\"drop\"),",
        "memory_mask=self.memory_mask.at[places].max(mask, mode=\"drop\"),", "test_engine.py -k shared",
    ),
    Mutant(
        "requests without a memory see what is in their place", "inference/engine.py",
        "prefix, text = self._nothing, 0", "prefix, text = self._memories[self._free[0]] or (self._nothing, 0)",
        "test_engine.py -k shared",
    ),
    Mutant(
        "one memory for all is that of the first row", "inference/engine.py",
        "np.int32(ready[0].place), how=how", "np.int32(ready[0].row), how=how", "test_engine.py -k shared",
    ),
    Mutant(
        "chunks are put at the start of a row", "inference/decoding.py",
        "_behind(chunks.offsets, choice.token)", "_behind(0 * chunks.offsets, choice.token)", "test_engine.py -k long_prompt",
    ),
    Mutant(
        "a later chunk does not see the earlier ones", "inference/decoding.py",
        "    if how.reach:\n", "    if False:\n", "test_engine.py -k long_prompt",
    ),
    Mutant(
        "others wait for a whole prompt", "inference/engine.py",
        "self._decode_next = True", "self._decode_next = False", "test_engine.py -k long_prompt",
    ),
    Mutant(
        "a removed row stays taken", "inference/engine.py",
        "        self._free = sorted([*self._free, running.row])\n", "        self._free = sorted(self._free)\n", "test_engine.py -k early",
    ),
    Mutant(
        "what is not finite reaches the next in a row", "inference/engine.py",
        "self._leave(running, finite=running.error is None)", "self._leave(running, finite=True)", "test_engine.py -k finite",
    ),
    Mutant(
        "an error takes a memory from those that share it", "inference/engine.py",
        "in self._doubted and not self._readers[running.place]:", "in self._doubted:", "test_engine.py -k shared_memory_stays",
    ),
    Mutant(
        "a request that is removed leaves what is not finite", "inference/engine.py",
        "self._leave(running, finite=False)", "self._leave(running, finite=True)", "test_engine.py -k removed_early",
    ),
    Mutant(
        "draws depend on the row", "inference/sampling.py",
        "drawn = jax.vmap(draw)(settings.key, number_R, allowed)",
        "drawn = jax.vmap(draw)(settings.key, number_R + jnp.arange(len(number_R)), allowed)", "test_engine.py -k seed",
    ),
    Mutant(
        "the penalty forgets the prompt", "inference/decoding.py",
        "ids = jnp.where(real, chunks.ids, before.shape[1])", "ids = jnp.where(real, before.shape[1], before.shape[1])",
        "test_engine.py -k penalty",
    ),
    Mutant(
        "the penalty counts the last tenant's tokens", "inference/decoding.py",
        "& (chunks.offsets > 0)[:, None]", "& (chunks.offsets >= 0)[:, None]", "test_engine.py -k penalty",
    ),
    Mutant(
        "top_p leaves out the token that reaches p", "inference/sampling.py",
        "before = jnp.cumsum(probabilities, -1) - probabilities", "before = jnp.cumsum(probabilities, -1)", "test_sampling.py -k allowed",
    ),
    Mutant(
        "half a character is shown", "inference/streaming.py",
        "if last or not now.endswith(INCOMPLETE):", "if True:", "test_sampling.py -k whole_characters",
    ),
    Mutant(
        "a stop text within one token alone is found", "inference/streaming.py",
        "        end = len(self._held) - keep\n", "        end = len(self._held)\n", "test_sampling.py -k across",
    ),
    Mutant(
        "stacked layers write their cache elsewhere", "inference/cache.py",
        "return constrain(jax.vmap(put)(cached, new), *AXES)", "return constrain(jax.vmap(put)(cached, new[::-1]), *AXES)",
        "test_engine.py -k stacked",
    ),
    # ----------------------------------------------------------------------------------------- evaluation, plans, sweeps
    Mutant(
        "intervals of 90 %", "evaluation/statistics.py",
        "LEVELS = (0.025, 0.975)", "LEVELS = (0.05, 0.95)", "test_statistics.py",
    ),
    Mutant(
        "questions are resampled apart from their contexts", "evaluation/statistics.py",
        "np.bincount(rng.integers(count, size=count), minlength=count)[member]",
        "np.bincount(rng.integers(len(member), size=len(member)), minlength=len(member))", "test_statistics.py",
    ),
    Mutant(
        "every example is a cluster of its own", "evaluation/run.py",
        "{r['set']} {r['cluster']}", "{r['set']} {r['key']}", "test_run.py -k scores_of_all",
    ),
    Mutant(
        "a loop's body counts once", "performance/hlo.py",
        'self._run(instruction.called("body"), times * turns)', 'self._run(instruction.called("body"), times)', "test_hlo.py",
    ),
    Mutant(
        "a plan outlives its sources", "performance/plan_cache.py",
        "host_devices, source_digest(), _versions()", "host_devices, _versions()", "test_plan_cache.py -k anew",
    ),
    Mutant(
        "a plan outlives its compiler", "performance/plan_cache.py",
        "source_digest(), _versions(), _environment()", "source_digest(), _environment()", "test_plan_cache.py -k anew",
    ),
    Mutant(
        "a damaged plan is believed", "performance/plan_cache.py",
        'if isinstance(record, dict) and record.get("checksum") == _checksum(record):', "if isinstance(record, dict):",
        "test_plan_cache.py -k damaged",
    ),
    Mutant(
        "a plan of half-edited sources is kept", "performance/plan_cache.py",
        "if about == identity(request, host_devices):", "if True:", "test_plan_cache.py -k while_it_compiles",
    ),
    Mutant(
        "what does not fit is compiled again", "performance/plan_cache.py",
        "answer = {OUT_OF_MEMORY: str(error)}", "raise", "test_plan_cache.py -k does_not_fit",
    ),
    Mutant(
        "plans are of full precision", "performance/programs.py",
        "quantized_shapes(shapes, c.quantize, c.jnp_dtype)", 'quantized_shapes(shapes, "", c.jnp_dtype)',
        "test_programs.py -k take_the_quantised",
    ),
    Mutant(
        "dequantising counts as matmuls", "performance/plan.py",
        'matmuls = _count(_quantized(spec, ""), shape, ask)', "matmuls = _count(spec, shape, ask)",
        "test_programs.py -k dequantising",
    ),
    Mutant(
        "ratios of different turns are compared", "performance/bench_bases.py",
        "value(turn[name]) / value(turn[first]) for turn in turns", "value(turn[name]) / value(turns[0][first]) for turn in turns",
        "test_bench.py -k turns",
    ),
    Mutant(
        "points of a sweep share a folder", "workflows/sweep_points.py",
        'f"{name}-{number}" if name in names else name', "name", "test_sweep.py -k 'name or folder'",
    ),
    # ------------------------------------------------------------------------------------------------------ many devices
    Mutant(
        "a weight is split along the other axis", "models/axes.py",
        '"o_proj": ("heads", "embed")', '"o_proj": ("embed", "heads")', "test_sharding.py -k 'split_as_the_rules'",
    ),
    Mutant(
        "batches are copied to every device", "runtime/sharding.py",
        "PartitionSpec(*[None] * axis, BATCH)", "PartitionSpec()", "test_sharding.py -k 'any_axis or split_as_the_rules'",
    ),
    # ------------------------------------------------------------------------------------- readers, exit codes, and agreement
    Mutant(
        "every ValueError and OSError is the user's", "errors.py",
        "return isinstance(error, UserError) or", "return isinstance(error, ValueError | OSError) or", "test_errors.py",
    ),
    Mutant("nothing is tried again", "errors.py", "TRIES = 6", "TRIES = 1", "test_errors.py"),
    Mutant(
        "tries within tries multiply", "errors.py", "or getattr(error, _GIVEN_UP, False) or", "or", "test_errors.py -k multiply",
    ),
    Mutant(
        "what has a checkpoint's name is one", "training/checkpoint_files.py",
        "if flaw(folder):\n            continue", "if False:\n            continue", "test_checkpoint.py -k changes_nothing",
    ),
    Mutant(
        "a checkpoint that goes while it is read is an error", "training/checkpoint_files.py",
        "if not is_whole(folder):\n                continue", "if False:\n                continue", "test_checkpoint.py -k goes_while",
    ),
    Mutant(
        "NaN is the best loss", "training/checkpoint_files.py",
        'if loss is not None and math.isfinite(loss)\n    ]', "if loss is not None]", "test_checkpoint.py -k nan",
    ),
    Mutant(
        "parameters that an update broke are saved", "training/train.py",
        '*losses.values(), grad_norm, param_norm]', '*losses.values(), grad_norm]', "test_train.py -k update_broke",
    ),
    Mutant(
        "a held-out loss of NaN is one", "training/train.py",
        "return loss is None or math.isfinite(loss)", "return True", "test_train.py -k not_finite",
    ),
    Mutant(
        "a notice to leave waits for the evaluation", "training/train.py",
        "evaluating = not asked_to_leave() and (", "evaluating = (asked_to_leave() or True) and (", "test_train.py -k notice",
    ),
    Mutant(
        "held-out losses take whole batches", "training/step.py",
        "if accumulate == 1:\n            return task.losses(trained", "if True:\n            return task.losses(trained",
        "test_train.py -k in_microbatches",
    ),
    Mutant(
        "processes that differ train on", "runtime/distributed.py", "    if lines:\n        shown", "    if False:\n        shown",
        "test_joining.py -k two_processes -m nightly",
    ),
    Mutant(
        "an allocation's shell is one of several processes", "runtime/distributed.py",
        'os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")', 'os.environ.get("SLURM_NTASKS", "")',
        "test_joining.py -k slurm",
    ),
    Mutant(
        "a sweep's points are counted anew", "workflows/sweep.py",
        'numbers = recorded.get("numbers") or', "numbers =", "test_sweep.py -k keeps_its_point",
    ),
    # ---------------------------------------------------------------------------------------- what users and strangers wrote
    Mutant("a spelled token is read by its letters", "interop/hub/text.py", 'split_special_tokens=True,', "", "test_text.py"),
    Mutant(
        "a word or piece that is a control token is the token", "interop/hub/text.py", "spelled = _control_tokens(tokenizer)", "spelled = {}",
        "test_text.py",
    ),
    Mutant(
        "a file's time is its identity", "data/reading.py",
        'digest = hashlib.sha256(f"{size} ".encode())', 'digest = hashlib.sha256(f"{size} {os.stat(path).st_mtime_ns}".encode())',
        "test_sources.py -k identity",
    ),
    Mutant(
        "a line may be of any length", "data/reading.py", "line = f.readline(most + 1)", "line = f.readline()",
        "test_sources.py -k bounded",
    ),
    Mutant(
        "an index names files elsewhere", "interop/hub/stored.py",
        r"""if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):""", "if not isinstance(file, str):",
        "test_stored.py -k files_of_its_folder",
    ),
    Mutant(
        "a tokenizer's code may run", "interop/hub/tokenizer.py",
        'local_files_only=True, trust_remote_code=False\n    )', "local_files_only=True, trust_remote_code=True)", "test_base.py -k code",
    ),
    Mutant(
        "what is replaced becomes open to all", "files.py",
        "mode = stat.S_IMODE((before or tmp.stat()).st_mode)", "mode = 0o644", "test_files.py",
    ),
    Mutant(
        "what was used last goes first", "cache.py", "(not e.outdated, e.used)", "(not e.outdated, -e.used)", "test_cache.py",
    ),
    Mutant(
        "what a process uses goes", "cache.py", "not everything) or entry.in_use():", "not everything):", "test_cache.py",
    ),
]  # fmt: skip
