"""ICAE training in PyTorch (transformers and PEFT), as a baseline: two recipes.

Both train LoRA on q_proj and v_proj and a memory table of k + 3 rows (k memory tokens, [AE], [LM],
[FT]) with AdamW; each objective is one pass and one step. The encoder reads [context | memory
tokens], whose last hidden states are the slots. The frozen decoder reads [slots | target] at
positions 0, 1, 2, … (layout `sequential`). Logits are computed at all positions.

| recipe    | decoder                                                       | rows of a pass |
|-----------|---------------------------------------------------------------|----------------|
| reference | a second copy of the base, recomputed in the backward pass    | 1              |
| stronger  | the encoder's base with the adapters off, nothing recomputed  | a batch        |
"""

import contextlib
import dataclasses

import numpy as np
import peft
import torch
import transformers
from torch.nn import functional
from torch.utils import flop_counter

AE = -3  # a target's id of the [AE] row: negative ids count from the end of the memory table
LM_UNLABELLED = 8  # the first tokens of a continuation carry no loss
IGNORED = -100  # what cross_entropy skips
LEARNING_RATE, CLIP = 1e-4, 2.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the decoder is run.

    Attributes:
      own_decoder: it is a second copy of the base.
      checkpoints: its activations are recomputed in the backward pass.
    """

    own_decoder: bool
    checkpoints: bool


RECIPES = {
    "reference": Recipe(own_decoder=True, checkpoints=True),
    "stronger": Recipe(own_decoder=False, checkpoints=False),
}


class TorchICAE:
    """An ICAE on the base of a hub folder, with k memory tokens.

    `dtype`, "float32" or "bfloat16", is the base's. Trained parameters are float32 and cast where
    they are used (autocast), as transformers' trainer does.
    """

    def __init__(
        self, folder, recipe, k, rank, alpha=32.0, dropout=0.05, dtype="float32", device="cpu"
    ):
        self.recipe, self.k = RECIPES[recipe], k
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        self.encoder = peft.get_peft_model(self._base(folder), lora).train()
        self.table = torch.nn.Embedding(k + 3, self.encoder.config.hidden_size, device=self.device)
        self.decoder = self.encoder
        if self.recipe.own_decoder:
            # In train mode, since transformers recomputes nothing otherwise.
            self.decoder = self._base(folder).requires_grad_(False).train()
        if self.recipe.checkpoints:
            self.decoder.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        lora = [p for p in self.encoder.parameters() if p.requires_grad]
        self.trained = [*lora, self.table.weight]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def _base(self, folder):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=self.dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        ).to(self.device)

    def _embed(self, ids):
        """Embeddings of ids `[B, T]`; negative ids are rows of the memory table."""
        tokens = self.encoder.get_input_embeddings()(ids.clamp(min=0))
        special = self.table((ids % self.table.num_embeddings).where(ids < 0, 0))
        return torch.where((ids < 0)[..., None], special.to(tokens.dtype), tokens)

    def compress(self, context):
        """Slots `[B, k, D]` of contexts `[B, n]`. The whole model runs, its head included."""
        memory = torch.arange(-self.k - 3, -3, device=self.device).expand(len(context), -1)
        out = self.encoder(
            inputs_embeds=self._embed(torch.cat([context, memory], 1)),
            output_hidden_states=True,
            use_cache=False,
        )
        return out.hidden_states[-1][:, -self.k :]

    def loss(self, context, given, answer):
        """Mean nats of `answer [B, a]` behind the slots of `context [B, n]` and `given [B, g]`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            slots = self.compress(context)
            x = torch.cat([slots, self._embed(torch.cat([given, answer], 1)).to(slots.dtype)], 1)
            shared = not self.recipe.own_decoder
            with self.encoder.disable_adapter() if shared else contextlib.nullcontext():
                logits = self.decoder(inputs_embeds=x, use_cache=False).logits
        labels = functional.pad(answer, (self.k + given.shape[1], 0), value=IGNORED)
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )

    def step(self, *rows):
        """One optimizer step on one pass (`loss`'s arguments); returns the loss before it."""
        loss = self.loss(*rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def flops(self, *rows):
        """FLOPs of one pass's matmuls, forward and backward, as PyTorch counts; no update."""
        # The counter does not know the CPU's fused attention, so attention is written out.
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            flop_counter.FlopCounterMode(display=False) as counter,
        ):
            self.loss(*rows).backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def passes(tokens, objective, batch, device="cpu"):
    """The arguments of `TorchICAE.loss` for one objective on all contexts, `batch` rows a pass.

    Every question is a row of its own, with its context in front.

    Args:
      tokens: int arrays `context [C, n]`, `continuation [C, m]`, `prompt [C, Q, P]` and
        `answer [C, Q, A]`, and `eos`, the id that ends a text.
      objective: ae, lm or qa.
      batch: rows of a pass.
      device: where the rows are put.
    """
    context = tokens["context"]
    if objective == "ae":
        given, answer = np.full((len(context), 1), AE), context
    elif objective == "lm":
        given, answer = np.split(tokens["continuation"], [LM_UNLABELLED], 1)
    else:
        context = np.repeat(context, tokens["prompt"].shape[1], 0)
        given, answer = (tokens[name].reshape(len(context), -1) for name in ("prompt", "answer"))
    if objective != "lm":
        answer = np.pad(answer, ((0, 0), (0, 1)), constant_values=tokens["eos"])
    rows = [torch.as_tensor(x, dtype=torch.int64, device=device) for x in (context, given, answer)]
    return list(zip(*(x.split(batch) for x in rows), strict=True))
