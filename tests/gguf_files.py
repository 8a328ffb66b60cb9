"""GGUF files for tests, written with the gguf package as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
import safetensors.numpy

from icae_jax.interop.hub import gguf_tokenizer

KINDS = gguf.GGMLQuantizationType
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_IN_GEMMAS_LAYER = _IN_LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def name_in_file(name, architecture):
    """The name that the converter gives a tensor of the hub."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    names = _IN_GEMMAS_LAYER if architecture.startswith("gemma") else _IN_LAYER
    return f"blk.{layer}.{names[module]}.{kind}"


def permuted(weight, heads):
    """Rows of q or k in llama.cpp's order: the two that RoPE rotates together are neighbours."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.concatenate(
        [np.stack([head[0], head[1]], axis=1).reshape(-1, rows.shape[-1]) for head in rows]
    ).reshape(weight.shape)


def converted(tensors, raw, architecture):
    """The hub's tensors by the file's names, changed as the converter changes them."""
    result = {}
    for name, value in tensors.items():
        if architecture == "llama" and ".q_proj." in name:
            value = permuted(value, raw["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            value = permuted(value, raw["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        result[name_in_file(name, architecture)] = value
    return result


def sizes(raw, architecture):
    """The metadata of a model's sizes."""
    theta = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    keys = {
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "rope.freq_base": float(theta),
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def words_tokenizer(words):
    """Metadata of a byte-level BPE in which each of these ASCII words is a token, but for three."""
    alphabet = [chr(b) for b in range(33, 127)] + ["Ġ", "Ċ"]
    alphabet += [c for c in _byte_characters() if c not in alphabet]  # so that every text has ids
    tokens, merges = ["<unk>", "<s>", "</s>", *alphabet], []
    for word in words:
        piece = ""
        for character in f"Ġ{word}":
            if piece and piece + character not in tokens:
                merges.append(f"{piece} {character}")
                tokens.append(piece + character)
            piece += character
    kinds = [gguf_tokenizer.CONTROL] * 3 + [gguf_tokenizer.NORMAL] * (len(tokens) - 3)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def _byte_characters():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def sentencepiece_tokenizer(model, user_defined=(), **more):
    """Metadata of a SentencePiece model, as the converter writes them.

    user_defined: the pieces that are. more: further keys of tokenizer.ggml.
    """
    ids = range(model.get_piece_size())
    pieces = [model.id_to_piece(i) for i in ids]
    kinds = [
        gguf_tokenizer.UNKNOWN
        if model.is_unknown(i)
        else gguf_tokenizer.CONTROL
        if model.is_control(i)
        else gguf_tokenizer.BYTE
        if model.is_byte(i)
        else gguf_tokenizer.USER_DEFINED
        if pieces[i] in user_defined
        else gguf_tokenizer.NORMAL
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            piece.replace("▁", " ") if piece in user_defined else piece for piece in pieces
        ],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def write(path, architecture, metadata, tensors, kinds=None, default="F32", split=None):
    """Writes a GGUF file and returns its path.

    metadata: by key; the type of each value decides its type in the file. tensors: by the file's
    names, float32. kinds: block types by name, `default` for the others; vectors are F32.
    split: (number of this part, of all parts, of tensors in all parts).
    """
    writer = gguf.GGUFWriter(path, architecture)
    if split:
        metadata = metadata | dict(
            zip(("split.no", "split.count", "split.tensors.count"), split, strict=True)
        )
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, "F32" if value.ndim == 1 else default)
        data = np.ascontiguousarray(value, np.float32)
        if kind != "F32":
            data = gguf.quantize(data, KINDS[kind])
        writer.add_tensor(name, data, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_folder(path, folder, architecture, tokenizer, more=None, **kw):
    """Writes the model of a hub folder (float32, one safetensors file) as a GGUF file."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    metadata = sizes(raw, architecture) | tokenizer | (more or {})
    return write(path, architecture, metadata, converted(tensors, raw, architecture), **kw)
