"""The other side of `icae bench ask`: transformers' `generate`, in PyTorch, on the same base."""

import importlib.util
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from icae_jax.errors import UserError
from icae_jax.interop.hub import locations

DTYPES = ("float32", "bfloat16")


def why_not(base_format: str, platform: str) -> str:
    """Why it cannot be measured here beside us, "" if it can.

    base_format: of our base. platform: of our devices.
    """
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'icae_jax[bench]'"
    if base_format not in DTYPES:
        return f"our base is in {base_format}, which it does not read"
    if platform == "cpu":
        return ""
    import torch

    if platform == "gpu" and torch.cuda.is_available():
        return ""
    return f"this PyTorch has no devices like ours ({platform})"


class Transformers:
    """A base in transformers.

    base: a folder, a GGUF file or a hub id, with @revision or not. platform: "cpu" or "gpu".
    """

    def __init__(self, base: str, dtype: str, platform: str = "cpu"):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        if platform == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = "cuda" if platform == "gpu" else "cpu"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **_place(base), dtype=getattr(torch, dtype), trust_remote_code=False
        )
        self.model = model.to(self._device).eval()
        # Nothing of the base's own, such as stop tokens or a penalty: the best token, every time.
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.facts = {"torch": torch.__version__, "transformers": transformers.__version__}

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, margins: bool = False
    ) -> dict[str, Any]:
        """As `bench_ask_ways.Ways.run`, of prompts of one length.

        margins: also by how much the best logit exceeded the second at each token, `[R, n]`.
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        clock, gaps, times = time.perf_counter, [], []

        def came(ids, scores, **_):
            if self._device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - began)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def gap(ids, scores):
            best = scores.float().topk(2).values
            gaps.append((best[:, 0] - best[:, 1]).tolist())
            return scores

        how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            began = clock()
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=how,
                stopping_criteria=StoppingCriteriaList([came]),
                logits_processor=LogitsProcessorList([gap] if margins else []),
            )
        new = out[:, ids.shape[1] :].tolist()
        if any(len(row) != new_tokens for row in new):
            raise UserError(
                f"transformers stopped after {len(new[0])} of {new_tokens} tokens; "
                "leave it out with --against none"
            )
        result = {"times": [times] * len(prompts), "ids": new}
        if margins:
            result["margins"] = [list(row) for row in zip(*gaps, strict=True)]
        return result


def _place(base):
    """`from_pretrained`'s arguments that say where a base is."""
    if locations.is_gguf(base) and pathlib.Path(base).is_file():
        path = pathlib.Path(base)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if pathlib.Path(base).is_dir():
        return {"pretrained_model_name_or_path": base}
    name, _, revision = base.partition("@")
    return {"pretrained_model_name_or_path": name, **({"revision": revision} if revision else {})}
