"""Reads cache.safetensors with transformers alone: python use_cache.py BASE ["question" …]"""

import json
import pathlib
import sys

import safetensors
import torch
import transformers

with safetensors.safe_open(pathlib.Path(__file__).with_name("cache.safetensors"), "pt") as file:
    INFO = {name: json.loads(text) for name, text in file.metadata().items()}
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def with_lora(model):
    """The model with the decoder's LoRA, if the cache was made with one."""
    if not INFO.get("decoder_lora"):
        return model
    import peft

    folder = pathlib.Path(__file__).with_name("decoder_lora")
    return peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()


def load(model, rows=None):
    """(cache, its mask [rows, P]) of some rows, by default all.

    `generate` changes the cache that it is given: load a new one for every call.
    """
    rows = list(range(len(INFO["ids"]))) if rows is None else list(rows)
    key, value = (TENSORS[name][:, rows].to(model.device, model.dtype) for name in ("key", "value"))
    cache = transformers.DynamicCache(ddp_cache_data=list(zip(key, value, strict=True)))
    return cache, TENSORS["attention_mask"][rows].to(model.device)


def generate(model, tokenizer, questions, rows=None, max_new_tokens=128):
    """Token ids of the answers, greedily, one question per row.

    model: as `with_lora` gives it. In a cache made to restore texts, give the question "" for
    each: the texts are returned.
    """
    if INFO.get("decoder_lora") and not hasattr(model, "peft_config"):
        raise ValueError("the cache is read with a LoRA of the decoder; give with_lora(model)")
    cache, mask = load(model, rows)
    asked = [
        tokenizer(q, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for q in questions
    ]
    prompts = [INFO["before"] + ids + INFO["after"] for ids in asked]
    length = max(map(len, prompts))
    if length >= INFO["room"]:
        raise ValueError(
            f"a prompt takes {length} tokens, and {INFO['room']} of prompt and answer fit behind "
            "the memory"
        )
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=model.device)
    real = torch.tensor(
        [[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    x = model.get_input_embeddings()(ids.clamp(min=0))
    # Negative ids are rows of the memory table.
    x = torch.where(ids[..., None] < 0, TENSORS["special"].to(x)[ids.clamp(max=-1)], x)
    # One row for every entry of the cache: generate drops as many.
    x = torch.nn.functional.pad(x, (0, 0, mask.shape[1], 0))
    out = model.generate(
        inputs_embeds=x,
        attention_mask=torch.cat([mask, real], 1),
        past_key_values=cache,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=min(max_new_tokens, INFO["room"] - length),
        eos_token_id=INFO["stop"],
        pad_token_id=INFO["stop"][0],
    ).tolist()
    ends = [
        next((i for i, token in enumerate(row) if token in INFO["stop"]), len(row)) for row in out
    ]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


if __name__ == "__main__":
    if INFO["objective"] == "ask" and len(sys.argv) < 3:
        sys.exit(__doc__)
    base = sys.argv[1] if len(sys.argv) > 1 else INFO["base"]
    # As tokenizer.json says, whatever the model's type.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, trust_remote_code=False, dtype=getattr(torch, INFO["dtype"])
    )
    model = with_lora(model)
    for question in sys.argv[2:] or [""]:
        answers = generate(model, tokenizer, [question] * len(INFO["ids"]))
        for name, ids in zip(INFO["ids"], answers, strict=True):
            print(name, tokenizer.decode(ids, skip_special_tokens=True), sep="\t")
