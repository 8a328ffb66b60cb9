"""An adapter on the model hub: its model card, and the upload of its folder."""

import pathlib

from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.hub import fetching, locations


def check(repository: str) -> None:
    """UserError where nothing can be pushed to a repository: no hub id, no network, nobody logged in."""
    import huggingface_hub

    if not locations.is_hub_id(repository) or "@" in repository:
        raise UserError(f"--push {repository!r} is no repository of the hub; give ORG/NAME")
    if fetching.is_offline():
        raise UserError(f"--push {repository}: HF_HUB_OFFLINE is set; take it away to push")
    if not huggingface_hub.get_token():
        raise UserError(
            f"--push {repository}: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN to a token that may write"
        )


def hub_base(*candidates: str) -> str:
    """The first that is a hub id (`org/name` or `org/name@revision`), and no folder here or URL; "" where none is."""
    return next((c for c in candidates if c and "://" not in c and locations.is_remote(c)), "")


def card(
    adapter: adapters.Adapter,
    base_config,
    repository: str,
    in_peft_form: bool,
    figures: list[str],
    license: str | None,
) -> str:
    """README.md of an adapter on the hub: metadata, figures, and how it is loaded with this package and without.

    figures: lines of what was measured. license: its SPDX name, None where it is not said.
    """
    import huggingface_hub

    c = adapter.compression
    method = peft_folder.METHODS[c.method]
    metadata = huggingface_hub.ModelCardData(
        base_model=adapter.base_path.partition("@")[0],
        library_name="peft" if in_peft_form else "icae_jax",
        license=license,
        tags=["context-compression", method.lower(), "lora", "icae_jax"],
        base_model_relation="adapter",
    )
    try:
        without = (
            peft_folder.readme(adapter, base_config, "." if in_peft_form else "encoder")
            .partition("\n")[2]
            .strip()
        )
    except UserError as error:
        without = f"peft and transformers alone do not compute this adapter's memory: {error}."
    rows = {
        "base": adapter.base_path,
        "method": method,
        "ratio": f"{c.rate:g} text tokens for a memory token",
        "memory tokens": f"{', '.join(map(str, c.choices))} for each segment of up to {c.segment_tokens} text tokens",
        "position layout": c.layout,
        "LoRA": f"rank {adapter.lora.rank} on {', '.join(adapter.lora.targets)}",
    }
    values = {
        "@METADATA@": metadata.to_yaml(),
        "@TITLE@": f"{repository.partition('/')[2]}: {method} for {adapter.base_path}",
        "@ROWS@": "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "@FIGURES@": "\n".join(f"- {line}" for line in figures) or "Nothing was measured.",
        "@REPOSITORY@": repository,
        "@WITHOUT@": without,
    }
    text = CARD
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def push(folder: pathlib.Path, repository: str, private: bool) -> str:
    """Uploads an adapter folder to a repository, made where there is none; returns the commit's address.

    Of an adapter that was there, what the new one has not goes. UserError where the hub says no, ConnectionError where it is not reached.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()

    def upload():
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise UserError(
                f"--push {repository} is there already, and public; make it private first, or leave --private out"
            )
        return hub.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message="Adapter, by icae convert adapter",
            allow_patterns=list(fetching.ADAPTER.files),
            delete_patterns=["encoder/*", "adapter_config.json", "adapter_model.*"],
        )

    remedy = "; give a repository that you may write to, with a token that may write (`hf auth login`, or HF_TOKEN)"
    return str(
        fetching.asking(
            upload, f"pushing to {repository}", f"--push {repository}", fetching.HUB, remedy
        ).commit_url
    )


CARD = """---
@METADATA@
---

# @TITLE@

Compresses a text into a few memory tokens, which the same base model reads in the text's place.

| | |
|---|---|
@ROWS@

## What was measured

@FIGURES@

## With icae_jax

```python
import icae_jax

compressor = icae_jax.load("@REPOSITORY@")
memory = compressor.compress("A long text …")
print(compressor.restore(memory)[0], compressor.ask(memory, "What does it say?")[0])
```

or `icae compress --adapter @REPOSITORY@ --input texts.jsonl --output memory.safetensors`.

## Without

Download it first: `hf download @REPOSITORY@ --local-dir adapter`, then `cd adapter`.

@WITHOUT@
"""
