"""Fields of config.json that are known not to change the logits.

A field that is neither listed here nor read by `config_json` is refused there by name, since its
effect is unknown. The lists hold what transformers' configuration classes of the supported families
write and ignore, in current and older versions, and what trainers and converters leave behind.
"""

import re

# Harmless at any value, grouped by subject.
_HARMLESS = {
    "who made the file, from what and with what": """
        _name_or_path name_or_path _commit_hash _from_auto _from_pipeline _from_model_config
        base_model base_model_name base_model_name_or_path base_model_id parent_model
        original_model finetuned_from merged_from model_name model_name_or_path model_id author
        license language tags description date created_at revision note notes comment comments
        _comment task finetuning_task task_specific_params custom_pipelines transformers.js_config
        pipeline_tag library_name adapted_from
    """,
    "storage, and outputs beside the logits": """
        dtype torch_dtype _pre_quantization_dtype weight_dtype params_dtype use_bfloat16 bf16 fp16
        use_cache keys_to_ignore_at_inference return_dict use_return_dict output_attentions
        output_hidden_states output_scores output_logits output_past tie_last_hidden_states
        torchscript tf_legacy_loss tie_encoder_decoder is_decoder save_safetensors
        tie_weights_keys
    """,
    "the attention kernel": """
        _attn_implementation attn_implementation _attn_implementation_autoset
        _attn_implementation_internal _experts_implementation experts_implementation
        _experts_implementation_internal attention_implementation attn_impl use_flash_attn
        use_flash_attn_2 use_flash_attention use_flash_attention_2 flash_attn
        _flash_attn_2_enabled use_sdpa use_memory_efficient_attention use_xformers
        use_liger_kernel pretraining_tp tensor_parallel_size
    """,
    "training": """
        initializer_range initializer_factor initializer_gain initializer_std init_std
        init_method_std init_method weight_init gradient_checkpointing
        gradient_checkpointing_kwargs use_gradient_checkpointing neftune_noise_alpha noise_alpha
        label_smoothing label_smoothing_factor loss_type ce_loss_weight ignore_index learning_rate
        weight_decay warmup_steps freeze_embeddings group_size_ratio seed trainable_params
        _unsloth_previous_dtype use_logits_to_keep num_logits_to_keep
    """,
    "text lengths and tokenizer; max_position_embeddings holds all the same": """
        max_sequence_length max_seq_length max_seq_len seq_length seq_len sequence_length
        train_max_seq_len training_sequence_length max_length_train model_max_length
        tokenizer_model_max_length max_context_length context_length n_ctx n_positions cutoff_len
        tokenizer_padding_side padding_side tokenizer_class tokenizer_name tokenizer_name_or_path
        tokenizer_type chat_template add_bos_token add_eos_token add_prefix_space bos_token
        eos_token pad_token unk_token prefix padding_idx vocab_file pad_vocab_size_multiple
        pad_to_multiple_of make_vocab_size_divisible_by original_vocab_size padded_vocab_size
    """,
    "heads of other tasks": """
        num_labels id2label label2id problem_type summary_type summary_use_proj summary_activation
        summary_proj_to_labels
    """,
    "defaults of generation": """
        max_length min_length max_new_tokens min_new_tokens max_time early_stopping stop_strings
        do_sample num_beams num_beam_groups penalty_alpha dola_layers temperature top_k top_p
        top_h min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty
        encoder_repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints
        remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens sequence_bias token_healing guidance_scale low_memory
        watermarking_config num_return_sequences return_dict_in_generate is_assistant
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
        target_lookbehind cache_implementation cache_config return_legacy_cache prefill_chunk_size
        compile_config disable_compile generation_config max_cache_len use_mtp
    """,
    "attention in chunks over very long texts, which only serving engines compute": """
        dual_chunk_attention_config
    """,
}
HARMLESS = frozenset(" ".join(_HARMLESS.values()).split())
# Harmless groups of names: token ids, dropout, versions of libraries, unsloth's notes.
_LIBRARIES = (
    "transformers|adapter_transformers|huggingface_hub|tokenizers|torch|peft|trl|unsloth|axolotl"
    "|llamafactory|accelerate|mlx|mlx_lm|nemo"
)
HARMLESS_NAMES = re.compile(
    rf"\w+_token_ids?|\w*dropout\w*|\w+_pdrop|unsloth_\w+|({_LIBRARIES})_version|version"
)

# Harmless at these values, and at null.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish", "swiglu"),
    "activation": ("silu", "swish", "swiglu"),
    "is_llama_config": (True,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attn_bias": (False,),
    "bias": (False,),
    "use_bias": (False,),
    "add_bias_linear": (False,),
    "lm_head_bias": (False,),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "use_rmsnorm": (True,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "clip_qkv": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "use_rope": (True,),
    "use_mrope": (False,),
    "use_mla": (False,),
    "use_dual_chunk_attention": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_mtp_layers": (False,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_ratio": (1,),
    "rope_condense_ratio": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "quantization_config": ({},),
    "quantization": ({},),
    "quantize": ({}, False),
    "quant_config": ({},),
    "compression_config": ({},),
    "auto_map": ({},),
}

# How the weights beside config.json are quantised; its method, if this package quantised them.
QUANTIZATION, QUANTIZED_HERE = "quantization_config", "icae_jax"

# Fields of RoPE, besides those that each type reads (`config_rope.FIELDS`).
ROPE_HARMLESS = frozenset(("finetuned", "original_max_position_embeddings"))
ROPE_NEUTRAL = {"partial_rotary_factor": (1,), "extrapolation_factor": (1,), "attn_factor": (1,)}


def is_neutral(field: str, value: object, neutral: dict[str, tuple] = NEUTRAL) -> bool:
    """Whether a top-level field of this value is known to change nothing.

    As in transformers, true and false are not numbers.
    """
    return (
        value is None
        or field in HARMLESS
        or HARMLESS_NAMES.fullmatch(field) is not None
        or _is_any(value, neutral.get(field, ()))
    )


def is_neutral_rope(field: str, value: object) -> bool:
    """Whether a field of RoPE of this value is known to change nothing."""
    return field in ROPE_HARMLESS or _is_any(value, ROPE_NEUTRAL.get(field, ()))


def _is_any(value: object, values: tuple) -> bool:
    return any(
        value == same and isinstance(value, bool) == isinstance(same, bool) for same in values
    )
