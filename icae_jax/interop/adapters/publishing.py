"""An adapter on the model hub: its model card, and the upload of its folder."""

import pathlib

from icae_jax.errors import UserError
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.hub import fetching, locations
from icae_jax.interop.templates import fill_in
from icae_jax.models.llama import ModelConfig

CARD = pathlib.Path(__file__).with_name("model_card.md")


def check(repository: str) -> None:
    """Raises UserError if nothing can be pushed: no hub id, offline, or not logged in."""
    import huggingface_hub

    if not locations.is_hub_id(repository) or "@" in repository:
        raise UserError(f"--push {repository!r} is no repository of the hub; give ORG/NAME")
    if fetching.is_offline():
        raise UserError(f"--push {repository}: HF_HUB_OFFLINE is set; take it away to push")
    if not huggingface_hub.get_token():
        raise UserError(
            f"--push {repository}: nobody is logged in to the hub; run `hf auth login`, or set "
            "HF_TOKEN to a token that may write"
        )


def hub_base(*candidates: str) -> str:
    """The first candidate that is a hub id and neither a local folder nor a URL; "" if none is."""
    return next((c for c in candidates if c and "://" not in c and locations.is_remote(c)), "")


def card(
    adapter: adapters.Adapter,
    base_config: ModelConfig,
    repository: str,
    in_peft_form: bool,
    figures: list[str],
    license: str | None,
) -> str:
    """README.md of an adapter on the hub: metadata, figures, and code that loads it.

    figures: measurements, one line each. license: its SPDX name, if known.
    """
    import huggingface_hub

    compression = adapter.compression
    method = compression.spec.title
    metadata = huggingface_hub.ModelCardData(
        base_model=locations.hub_repository(adapter.base_path),
        library_name="peft" if in_peft_form else "icae_jax",
        license=license,
        tags=["context-compression", method.lower(), "lora", "icae_jax"],
        base_model_relation="adapter",
    )
    try:
        readme = peft_folder.readme(adapter, base_config, "." if in_peft_form else "encoder")
        without = readme.partition("\n")[2].strip()  # its title is not the card's
    except UserError as error:
        without = f"peft and transformers alone do not compute this adapter's memory: {error}."
    rows = {
        "base": adapter.base_path,
        "method": method,
        "ratio": f"{compression.rate:g} text tokens for a memory token",
        "memory tokens": f"{', '.join(map(str, compression.choices))} for each segment of up to "
        f"{compression.segment_tokens} text tokens" + ("; any number" * compression.any_k),
        "position layout": compression.layout,
        "encoder": f"mask {compression.encoder_mask}"
        + (f", layers read: {layers}" if (layers := compression.encoder_layers) else ""),
        "LoRA": f"rank {adapter.lora.rank} on {', '.join(adapter.lora.targets)}",
    }
    if adapter.has_decoder_lora:
        rows["decoder LoRA"] = (
            "the memory is read by the base with the LoRA in `decoder/`, so serve it with that"
        )
    values = {
        "METADATA": metadata.to_yaml(),
        "TITLE": f"{repository.partition('/')[2]}: {method} for {adapter.base_path}",
        "ROWS": "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "FIGURES": "\n".join(f"- {line}" for line in figures) or "Nothing was measured.",
        "REPOSITORY": repository,
        "WITHOUT": without,
    }
    return fill_in(CARD.read_text(encoding="utf-8"), values)


def push(folder: pathlib.Path, repository: str, private: bool) -> str:
    """Uploads an adapter folder to a repository, creating it if needed; returns the commit's URL.

    Files of an earlier adapter that the new one lacks are deleted. UserError if the hub refuses,
    ConnectionError if it cannot be reached.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()

    def upload():
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if private and not hub.model_info(repository).private:
            raise UserError(
                f"--push {repository} is there already, and public; make it private first, or "
                "leave --private out"
            )
        return hub.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message="Adapter, by icae convert adapter",
            allow_patterns=list(fetching.ADAPTER.files),
            delete_patterns=["encoder/*", "decoder/*", "adapter_config.json", "adapter_model.*"],
        )

    remedy = (
        "; give a repository that you may write to, with a token that may write (`hf auth login`, "
        "or HF_TOKEN)"
    )
    commit = fetching.asking(
        upload, f"pushing to {repository}", f"--push {repository}", fetching.HUB, remedy
    )
    return str(commit.commit_url)
