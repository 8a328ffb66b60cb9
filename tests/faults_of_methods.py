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
        "splash gives NaN where a row is all padding", "models/attention.py",
        "real = mask[:, 0] | ~mask[:, 0].any(1, keepdims=True)", "real = mask[:, 0]", "test_attention.py -k everything_real",
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
        "for k in ks]\n    return _added(trained, *read)", "for k in ks[:1]]\n    return _added(trained, *read)",
        "test_flops.py -k every_method",
    ),
]  # fmt: skip

FAULTS_C = [
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
        "a memory does not say how the encoder read", "inference/memory_file.py",
        "    expected |= {name: str(getattr(compression, name)) for name in _WRITES}\n", "", "test_memory_file.py -k how_the_encoder",
    ),
    Mutant(
        "files of earlier versions had any mask", "inference/memory_file.py",
        "metadata.get(field, str(EARLIER.get(field, have)))", "metadata.get(field, have)", "test_memory_file.py -k how_the_encoder",
    ),
    Mutant(
        "transformers decodes without the decoder's LoRA", "interop/export/scripts/use_cache.py",
        "    return peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()\n",
        "    plain = peft.PeftModel.from_pretrained(model, folder).unload()\n    plain.peft_config = {}\n    return plain\n",
        "test_hf_cache.py -k decoder_with",
    ),
    Mutant(
        "a server reads without the decoder's LoRA", "interop/export/prompt_embeds.py",
        "return DECODER_LORA if self.reader.adapter.has_decoder_lora else self.reader.base_path", "return self.reader.base_path",
        "test_prompt_embeds.py -k served",
    ),
    Mutant(
        "a causal implementation gets another mask", "interop/adapters/formats.py",
        'if compression.encoder_mask != "causal":', "if False:", "test_method_adapters.py -k formats",
    ),
]  # fmt: skip
