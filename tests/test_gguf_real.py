"""Published models from their GGUF files: transformers' logits, continuations and tokens.

transformers' model gets the same dequantised weights by another path: read by `gguf.GGUFReader`,
each tensor dequantised whole, and put into the hub's form by this file's own code.
"""

import gzip
import json

import gguf
import jax
import numpy as np
import pytest
import real_models
from conftest import SHARED, close, shared
from test_llama import logits

from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub.text import user_ids

TIED = 1e-4  # two best logits that lie closer together may change places
LENGTH, CONTINUED = 32, 64

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.nightly, pytest.mark.slow]


def reads(path):
    """All texts of a file of the reference data."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row[k] for k in ("text", "context", "question") if k in row)


def sample(count):
    """Texts of every kind, from the middle of the files."""
    names = ("arxiv/valid", "squad/valid", "fairytaleqa/valid", "tinystories/valid")
    each = [list(reads(shared(f"data/{name}.jsonl.gz"))) for name in names]
    each = [[text for text in texts if len(text) > 400] for texts in each]
    return [each[i % len(each)][7 * i] for i in range(count)]


def state_dict(reader, heads, kv_heads):
    """The file's weights by transformers' names, in float32."""
    architecture = reader.get_field("general.architecture").contents()
    gemma, result = architecture.startswith("gemma"), {}
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
    }
    for tensor in reader.tensors:
        value = torch.tensor(np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type)))
        *layer, part, kind = tensor.name.split(".")
        if not gemma and part in ("attn_q", "attn_k"):
            n = heads if part == "attn_q" else kv_heads
            rows = value.view(n, len(value) // n // 2, 2, -1)
            value = torch.cat((rows[:, :, 0], rows[:, :, 1]), 1).reshape(value.shape)
        if gemma and "norm" in part:
            value = value - 1
        name = f"model.layers.{layer[1]}.{parts[part]}" if layer else parts[part]
        result[f"{name}.{kind}"] = value
    return result


class Real:
    """A file as this package reads it, as a torch model with its weights, and its raw content."""

    def __init__(self, path, model, config):
        self.path, self.base = path, bases.load_base(path)
        self.reader = gguf.GGUFReader(path)
        heads = config.num_attention_heads, config.num_key_value_heads
        self.model = model(config).eval()
        state = state_dict(self.reader, *heads)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.model.load_state_dict(state)

    def theirs(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor(ids)).logits.numpy()

    def ours(self, ids):
        return np.asarray(logits(self.base.config, self.base.params, ids))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """A cache of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def smollm2():
    import transformers

    path = real_models.find(real_models.SMOLLM2)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    return Real(path, transformers.LlamaForCausalLM, config)


@pytest.fixture(scope="module")
def gemma3():
    import transformers

    path = real_models.find(real_models.GEMMA3)
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tie_word_embeddings=True,
    )
    return Real(path, transformers.Gemma3ForCausalLM, config)


def check_logits(real, texts=20, batch=5):
    """On each text the logits are transformers' to 1e-3 of the largest."""
    rows = [real.base.tokenizer(text)["input_ids"][:LENGTH] for text in sample(texts)]
    rows = np.asarray(rows)
    assert rows.shape == (texts, LENGTH)
    for start in range(0, texts, batch):
        ids = rows[start : start + batch]
        for got, want in zip(real.ours(ids), real.theirs(ids), strict=True):
            close(got, want, 1e-3)


def check_continuation(real, texts=2):
    """Behind each text the greedy tokens are transformers', but where two logits are tied.

    A first token that differs ends a comparison, since texts differ behind it. Our own logits at
    all positions of transformers' continuation tell whether ours would be the same.
    """
    rows = [real.base.tokenizer(text)["input_ids"][:16] for text in sample(texts)]
    theirs = real.model.generate(
        torch.tensor(rows),
        attention_mask=torch.ones(texts, 16, dtype=torch.long),
        do_sample=False,
        max_new_tokens=CONTINUED,
        min_new_tokens=CONTINUED,
        pad_token_id=0,
    ).numpy()
    stops = real.model.generation_config.eos_token_id
    scores = real.ours(theirs)[:, 15:-1].copy()
    if stops is not None:  # transformers may not choose it before so many tokens
        scores[..., stops] = -np.inf
    ties = 0
    for row, wanted in zip(scores, theirs[:, 16:], strict=True):
        for at, token in enumerate(wanted):
            best = row[at].argmax()
            if best != token:
                assert row[at][best] - row[at][token] <= TIED * np.abs(row[at]).max(), at
                ties += 1
                break
    print(f"{real.path.name}: {texts} continuations of {CONTINUED} tokens, {ties} ended by a tie")
    assert ties <= texts // 2


def converted_tokenizer(real):
    """transformers' own conversion of the file's tokenizer.

    It knows no pre-tokenizers by name: SmolLM's is the one of the hub's tokenizer.json.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations import gguf as conversion

    fields = {"tokens", "merges", "scores", "token_type", "bos_token_id", "eos_token_id"}
    fields |= {"unknown_token_id", "padding_token_id", "add_space_prefix", "model"}
    content = {
        name.rpartition(".")[2]: field.contents()
        for name, field in real.reader.fields.items()
        if name.startswith("tokenizer.ggml.") and name.rpartition(".")[2] in fields
    }
    architecture = real.reader.get_field("general.architecture").contents()
    content["tokenizer_type"] = content.pop("model")
    converted, _ = conversion.convert_gguf_tokenizer(architecture, content)
    if architecture == "llama":
        cuts = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
        converted.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    return converted


def check_tokens(real):
    """Every text of the reference data has the ids that transformers' conversion gives it."""
    theirs = converted_tokenizer(real)
    theirs.encode_special_tokens = True  # as ours: a text cannot spell a control token
    count = 0
    for path in sorted((SHARED / "data").glob("*/*.jsonl.gz")):
        texts = list(reads(path))
        got = user_ids(real.base.tokenizer, texts)
        want = theirs.encode_batch_fast(texts, add_special_tokens=False)
        for text, one, other in zip(texts, got, want, strict=True):
            assert one == other.ids, text
        count += len(texts)
    print(f"{real.path.name}: {count} texts with equal tokens")
    assert count > 100


def test_smollm2s_logits(smollm2):
    """Breaks when a tensor of the file is dequantised, permuted or named wrongly, or a field of
    the configuration is not the model's."""
    check_logits(smollm2)


def test_smollm2s_continuation(smollm2):
    """Breaks when greedy tokens differ from transformers'."""
    check_continuation(smollm2)


def test_smollm2s_tokens(smollm2):
    """Breaks when texts are cut otherwise than by transformers' conversion, or than the ids that
    the hub's tokenizer is known to give."""
    check_tokens(smollm2)
    known = {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, ids in known.items():
        assert user_ids(smollm2.base.tokenizer, text) == ids
    assert smollm2.base.stop_ids == (0, 2)
    chat = smollm2.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_gemma3s_logits(gemma3):
    """Breaks when a norm's 1 or a layer's window or RoPE is not Gemma's."""
    check_logits(gemma3)


def test_gemma3s_continuation(gemma3):
    """Breaks when greedy tokens differ from transformers'."""
    check_continuation(gemma3)


def test_gemma3s_tokens(gemma3):
    """Breaks when texts are cut otherwise than by transformers' conversion."""
    check_tokens(gemma3)


@pytest.fixture(autouse=True)
def _forget_programs():
    yield
    jax.clear_caches()
