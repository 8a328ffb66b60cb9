"""The controls without a memory, against transformers' own generation from the same prompt."""

import pytest
from conftest import TINY, random_trained

from icae_jax.compression.encoder import CompressionConfig
from icae_jax.evaluation import plain
from icae_jax.inference.compressor import Compressor
from icae_jax.interop import adapter as adapters
from icae_jax.interop import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

CONTEXTS = ["the cat sat on the mat .", "a big dog ate milk and bread in the old house"]
QUESTIONS = [["who sat ?", "where ?"], ["what did the dog eat ?"]]


def make(tiny_base, template):
    base = bases.load_base(tiny_base)
    made = targets.make_template(template, base.tokenizer)
    trained = random_trained(TINY, 4)
    adapter = adapters.Adapter(CompressionConfig(k=4, rate=4), LoraConfig(4), made, trained, str(tiny_base), base.fingerprint)
    return Compressor(base, adapter, tiny_base)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_answers_equal_transformers(tiny_base, template):
    """Breaks when the prompt of a control is not the plain text prompt, or no context sees some of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    compressor = make(tiny_base, template)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = compressor.base.tokenizer
    t = compressor.adapter.template
    answers = 0
    for contexts in (CONTEXTS, None):
        got = plain.answer(compressor, QUESTIONS, contexts, max_new_tokens=6)
        for i, row in enumerate(QUESTIONS):
            for j, question in enumerate(row):
                text = tokenizer(contexts[i], add_special_tokens=False)["input_ids"] if contexts else []
                head = list(t.head) or [tokenizer.bos_token_id]
                asked = [*t.before, *tokenizer(question, add_special_tokens=False)["input_ids"], *t.after]
                prompt = torch.tensor([[*head, *text, *asked]])
                out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
                want = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
                assert got[i][j] == want
                answers += 1
    assert answers == 6 and plain.answer(compressor, QUESTIONS, CONTEXTS) != plain.answer(compressor, QUESTIONS)


def test_trained_tokens_in_a_template_are_refused(tiny_base):
    with pytest.raises(ValueError, match="template mistral holds trained tokens"):
        plain.answer(make(tiny_base, "mistral"), QUESTIONS, CONTEXTS)
