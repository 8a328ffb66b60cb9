"""Deliberate faults in what methods, masks and distillation compute, as in `faults.py`."""

from faults import Mutant

MUTANTS = [
    # ------------------------------------------------------------------------------------------------ masks and layers
    Mutant(
        "memory tokens stay causal under mask slots", "compression/encoder.py",
        "return real[:, None] & (causal_mask(T) | mutual)", "return real[:, None] & causal_mask(T)",
        "test_encoder_mask.py -k definition",
    ),
    Mutant(
        "under mask slots padding is seen", "compression/encoder.py",
        "return real[:, None] & (causal_mask(T) | mutual)", "return (real[:, None] & causal_mask(T)) | mutual | causal_mask(T)",
        "test_encoder_mask.py -k definition",
    ),
    Mutant(
        "the last layer takes a mask's first rows", "models/blocks.py",
        "mask = mask if mask.shape[1] == 1 else rows(mask, at)", "mask = mask if mask.shape[1] == 1 or at is None else mask[:, : at.shape[-1]]",
        "test_encoder_mask.py -k known_times",
    ),
    Mutant(
        "an encoder that stops early has the final norm", "models/llama.py",
        'return x if self.stop else norm(c, "norm")(x), kv', 'return norm(c, "norm")(x), kv', "test_encoder_mask.py -k stops_early",
    ),
    Mutant(
        "an encoder that stops early runs one layer more", "models/llama.py",
        "count = layers if at is None else layers - 1", "count = layers", "test_encoder_mask.py -k stops_early",
    ),
    Mutant(
        "cuDNN pads a mask of one line with what nobody sees", "models/attention.py",
        "mask_BTS = jnp.concatenate([jnp.broadcast_to(m, (B, T, m.shape[2])) for m in masks], 2)",
        "mask_BTS = masks[0] if len(masks) == 1 else jnp.concatenate([jnp.broadcast_to(m, (B, T, m.shape[2])) for m in masks], 2)",
        "test_attention.py -k everything_real",
    ),
    Mutant(
        "splash computes a full mask as a causal one", "models/attention.py",
        "return _splash(*qkv, real, None, None, scale)", "return _splash(*qkv, real, None, 0, scale)",
        "test_attention.py -k everything_real",
    ),
    Mutant(
        "the mask of one query behind a prefix goes to splash", "models/attention.py",
        "not (_is_full(mask) and not prefix)", "not _is_full(mask)", "test_attention.py -k one_query",
    ),
    Mutant(
        "attention is timed causal, whatever the mask", "runtime/attention_choice.py",
        "        mask=mask,\n        rows=max", "        rows=max", "test_attention_choice.py",
    ),
    # ------------------------------------------------------------------------------------------------- pooling and SAC
    Mutant(
        "a group is a token too long", "compression/methods/pooled.py",
        "stop = jnp.maximum((j + 1) * n // k, first + 1)", "stop = jnp.maximum(((j + 1) * n + k - 1) // k, first + 1)",
        "test_pooled.py -k groups",
    ),
    Mutant(
        "the projection is transposed", "compression/methods/pooled.py",
        "(means @ W)", "(means @ W.T)", "test_pooled.py -k groups",
    ),
    Mutant(
        "an anchor of two numbers gets the second vector", "compression/methods/sac.py",
        "number = (anchors[:, None] < tokens).sum(-1)", "number = (anchors[:, None] <= tokens).sum(-1) - 1",
        "test_sac.py -k by_hand",
    ),
    Mutant(
        "the vector is added to every token", "compression/methods/sac.py",
        "jnp.where(is_anchor[..., None], vectors, 0)", "vectors", "test_sac.py",
    ),
    Mutant(
        "anchors are a token late", "compression/methods/sac.py",
        "contexts.lengths.reshape(B * S)) - 1", "contexts.lengths.reshape(B * S))", "test_sac.py",
    ),
    # ----------------------------------------------------------------------------------------------- FLOPs, several k
    Mutant(
        "layers that do not run are counted", "performance/flops.py",
        "compression.encoder_config(model_config), max(ks)", "model_config, max(ks)", "test_flops.py -k every_method",
    ),
    Mutant(
        "of a pooling encoder's last layer k rows are counted", "performance/flops.py",
        "length if method.pools else k", "k", "test_flops.py -k every_method",
    ),
    Mutant(
        "the decoder is counted once for several k", "performance/flops.py",
        "batch, heads or {}, k) for k in ks]", "batch, heads or {}, k) for k in ks[:1]]",
        "test_flops.py -k every_method",
    ),
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
        "test_distil.py -k teachers_differ -m nightly",
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
        "paragraphs must have answers for a teacher too", "data/forms.py",
        'for field in ("qas", "paragraphs") if', 'for field in () if', "test_prepare_distil.py -k paragraphs",
    ),
    Mutant(
        "a benchmark of several k counts the labels of one", "performance/steps.py",
        "len(ks_of(batch)) * labels", "labels", "test_steps.py -k labels_behind",
    ),
    Mutant(
        "layers that the base has not are found out late", "training/compressor_task.py",
        "c.compression.encoder_config(sizes)", "pass", "test_compressor_task.py -k more_encoder_layers",
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
    # ------------------------------------------------------------------------------------- any ratio, cascade, evaluation
    Mutant(
        "the nearest k is nearest in tokens",
        "compression/segments.py",
        "round(abs(math.log(k) - best), 9)",
        "round(abs(k - math.exp(best)), 9)",
        "test_any_ratio.py -k nearest",
    ),
    Mutant(
        "segments are not counted where a ratio is chosen",
        "compression/segments.py",
        "best = np.log(wanted / segments).mean()",
        "best = np.log(wanted).mean()",
        "test_any_ratio.py -k nearest",
    ),
    Mutant(
        "of two k as near the smaller is taken",
        "compression/segments.py",
        "- best), 9), -k))",
        "- best), 9), k))",
        "test_any_ratio.py -k half_and_twice",
    ),
    Mutant(
        "a ladder of shared passes is written one by one",
        "inference/writing.py",
        "passes = [tuple(ks)] if together else",
        "passes = [(k,) for k in ks] if together else",
        "test_any_ratio.py -k single_ks",
    ),
    Mutant(
        "the stop token's log-probability is left out",
        "inference/requests.py",
        "            self.log_probs.append(float(choice.log_prob[i]))",
        "            self.log_probs += [] if stopped else [float(choice.log_prob[i])]",
        "test_cascade.py -k scoring_gives",
    ),
    Mutant(
        "a token's log-probability is that of its neighbour in the vocabulary",
        "inference/sampling.py",
        "log_prob = jnp.take_along_axis(logits_RV, at, 1)[:, 0] - total",
        "log_prob = jnp.take_along_axis(logits_RV, at - 1, 1)[:, 0] - total",
        "test_cascade.py -k scoring_gives",
    ),
    Mutant(
        "likely answers are asked again",
        "inference/cascade.py",
        ".mean_log_prob < threshold]",
        ".mean_log_prob >= threshold]",
        "test_cascade.py -k all_or_none",
    ),
    Mutant(
        "likelihood is not by the token",
        "inference/reading.py",
        "return self.log_prob / (len(self.ids) + stop_tokens)",
        "return self.log_prob",
        "test_cascade.py -k scoring_gives",
    ),
    Mutant(
        "what smaller memories took is forgotten",
        "inference/cascade.py",
        "tokens_read=generation.tokens_read + earlier.tokens_read,",
        "",
        "test_cascade.py -k rung_that_they_name",
    ),
    Mutant(
        "the first questions of a text go on, not those left",
        "inference/cascade.py",
        "requests[row].prompts[i] for i in indices",
        "requests[row].prompts[i] for i in range(len(indices))",
        "test_cascade.py -k rung_that_they_name",
    ),
    Mutant(
        "every rung compresses all texts",
        "inference/compressor.py",
        "lambda rows: self.compress_ids([contexts[row] for row in rows], batch_size, k)",
        "lambda rows: self.compress_ids(contexts, batch_size, k)[rows]",
        "test_cascade.py -k where_they_are_needed",
    ),
    Mutant(
        "the tuned full context is the base alone",
        "evaluation/suites/common.py",
        "return self.compressor.decoder if arm == TUNED else",
        "return self.compressor.plain_decoder if arm == TUNED else",
        "test_suite_qa.py -k decoders_lora",
    ),
    Mutant(
        "losses of the tuned full context are the base's",
        "evaluation/plain.py",
        "_losses(model, lora, *placed)",
        "_losses(model, None, *placed)",
        "test_suite_qa.py -k decoders_lora",
    ),
    Mutant(
        "retention is always of the base alone",
        "evaluation/suites/qa.py",
        "for r in with_arm] for a in (arm, full))",
        "for r in with_arm] for a in (arm, FULL))",
        "test_suite_qa.py -k tuned_full",
    ),
    Mutant(
        "a memory's size is the first text's",
        "evaluation/suites/common.py",
        "tokens = int(memory.tokens[row])",
        "tokens = int(memory.tokens[0])",
        "test_suite_qa.py -k sizes",
    ),
    Mutant(
        "scores against bytes stand at tokens",
        "evaluation/page.py",
        "xs = [sizes[arm][unit] for arm in points]",
        'xs = [sizes[arm]["tokens"] for arm in points]',
        "test_page.py -k tokens_and_bytes",
    ),
    # ------------------------------------------------------------------------------- adapters and exports of every method
    Mutant(
        "the README's memory tokens stay causal under mask slots", "interop/adapters/peft_folder.py",
        "        sees[memory[:, None], memory] = 1\n", "", "test_peft_folder.py -k sees_what",
    ),
    Mutant(
        "the README's groups may be empty", "interop/adapters/peft_folder.py",
        "max((j + 1) * n // k, j * n // k + 1)", "(j + 1) * n // k", "test_peft_folder.py -k any_k",
    ),
    Mutant(
        "the README's anchors have the first vector all", "interop/adapters/peft_folder.py",
        "table[min(kept.index(i), len(table) - 1)]", "table[0]", "test_peft_folder.py -k anchors",
    ),
    Mutant(
        "the README's slots of a middle layer are normed", "interop/adapters/peft_folder.py",
        "encoder.layers[:@LAYERS@], torch.nn.Identity()", "encoder.layers[:@LAYERS@], encoder.norm", "test_peft_folder.py -k stops",
    ),
    Mutant(
        "the projection is not in the README", "interop/adapters/peft_folder.py",
        "parts.append(means@MAPS@)", "parts.append(means)", "test_peft_folder.py -k any_k",
    ),
    Mutant(
        "a mask of one's own passes a window over", "interop/adapters/peft_folder.py",
        "    needed = segment if why else 0\n", '    needed = segment if why and mask == "causal" else 0\n', "test_peft_folder.py -k windows",
    ),
    Mutant(
        "keys that a window cuts off are kept", "interop/adapters/peft_folder.py",
        "needed = max(needed, held + 1)", "needed = max(needed, held)", "test_peft_folder.py -k windows",
    ),
    Mutant(
        "the decoder's folder holds the encoder's LoRA", "interop/adapters/folder.py",
        'adapter.trained["lora" if name == ENCODER else DECODER_LORA]', 'adapter.trained["lora"]', "test_peft_folder.py -k own",
    ),
    Mutant(
        "the decoder's LoRA is of the encoder's layers", "interop/adapters/folder.py",
        "layers = adapter.compression.encoder_layers if lora == ENCODER else 0", "layers = adapter.compression.encoder_layers",
        "test_method_adapters.py -k first_layers",
    ),
    Mutant(
        "a causal mask is lost where the method's default is another", "interop/adapters/info.py",
        ' and not (masked and name == "encoder_mask")', "", "test_method_adapters.py -k round_trip",
    ),
    Mutant(
        "earlier versions cannot read what they could", "interop/adapters/info.py",
        "            del compression[name]\n", "            pass\n", "test_method_adapters.py -k earlier_versions",
    ),
    Mutant(
        "a memory does not say how the encoder read", "inference/origin.py",
        "    expected |= _how_written(origin)\n", "", "test_memory_file.py -k how_the_encoder",
    ),
    Mutant(
        "files of earlier versions had any mask", "inference/origin.py",
        "stated.get(field, str(EARLIER.get(field, have)))", "stated.get(field, have)", "test_memory_file.py -k how_the_encoder",
    ),
    Mutant(
        "transformers decodes without the decoder's LoRA", "interop/export/scripts/use_cache.py",
        "    return peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()\n",
        "    plain = peft.PeftModel.from_pretrained(model, folder).unload()\n    plain.peft_config = {}\n    return plain\n",
        "test_hf_cache.py -k decoder_with",
    ),
    Mutant(
        "a causal implementation gets another mask", "interop/adapters/formats.py",
        'if compression.encoder_mask != "causal":', "if False:", "test_method_adapters.py -k formats",
    ),
    # ------------------------------------------------------------------------- the comparison of methods, its passages
    Mutant(
        "passages are about two people, whatever is asked", "data/synthetic.py",
        "_draw(rng, FACTS, people, fewest", "_draw(rng, FACTS, 2, fewest", "test_synthetic.py -k more_people",
    ),
    Mutant(
        "people share values in the count of passages", "data/synthetic.py",
        "math.perm(len(values), stated.count(kind))", "len(values) ** stated.count(kind)", "test_synthetic.py -k bits",
    ),
    Mutant(
        "seeds count as new passages", "../launch/experiments/methods_table.py",
        "np.tile(passages, len(seeds))", "np.arange(len(vectors))", "test_methods_experiment.py -k same_passages",
    ),
    Mutant(
        "EM is divided by F1", "../launch/experiments/methods_table.py",
        "np.concatenate(of_seeds)[:, columns]", "np.concatenate(of_seeds)", "test_methods_experiment.py -k same_passages",
    ),
    Mutant(
        "every rate trains alike", "../launch/experiments/methods.py",
        "rate * decay(number, steps)", "decay(number, steps)", "test_methods_experiment.py -k every_rate -m nightly",
    ),
    Mutant(
        "another passage's memory is the passage's own", "../launch/experiments/methods.py",
        "memory[np.roll(np.arange(len(rows)), -1)]", "memory[np.arange(len(rows))]",
        "test_methods_experiment.py -k scores_of_every -m nightly",
    ),
    # ------------------------------------------------------------------------------------------------ what is asked of a ladder
    Mutant(
        "texts are compressed before what is asked is checked", "inference/compressor.py",
        "            written = functools.cache(", "            self.compress_ids_ladder(contexts, ladder, batch_size)\n            written = functools.cache(",
        "test_cascade.py -k checked_before",
    ),
    Mutant(
        "a base must have as few layers as an encoder runs", "workflows/inspection.py",
        'if compression.get("encoder_layers"):', 'if compression.get("no_such_field"):', "test_method_adapters.py -k inspecting",
    ),
    Mutant(
        "a run from before the encoder's mask cannot go on", "training/workdir.py",
        "defaults | {k: v for k, v in earlier.items() if k in defaults} | found", "defaults | found", "test_workdir.py -k encoders_mask",
    ),
]  # fmt: skip
