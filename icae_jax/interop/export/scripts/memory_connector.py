"""A KV connector for vLLM: prompts that begin with a memory's ids get its keys and values.

vLLM loads it, where the folder of memories.json is on its PYTHONPATH, by

    --kv-transfer-config '{"kv_connector": "MemoryConnector", "kv_role": "kv_both",
                           "kv_connector_module_path": "memory_connector"}'

A memory is found by its ids, which stand for it in prompts and mean nothing else. The scheduler is
told that these are computed, and before the pass that reads them each layer writes the memory's
keys and values into its own cache as it writes its own, whatever the backend and the block size. So
a memory need not fill its last block, and vLLM's prefix cache keeps it as it keeps text.

"kv_connector_extra_config": {"folder": DIR} reads another folder's memories. A reply to a prompt
whose memory was read says so: its kv_transfer_params are {"memory": NAME}.
"""

import dataclasses
import json
import logging
import pathlib
import re
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

logger = logging.getLogger("vllm.memory_connector")
FORMAT_VERSION = 1


class Memories:
    """What memories.json says."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        index = json.loads((self.folder / "memories.json").read_text(encoding="utf-8"))
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: memories.json has format {index['format_version']}, and this connector "
                f"reads {FORMAT_VERSION}; take the connector that was exported with it"
            )
        self.sizes = index["layers"], index["kv_heads"], index["head_dim"]
        self.lora = index["decoder_lora"]
        self.by_name = {memory["name"]: tuple(memory["ids"]) for memory in index["memories"]}
        self.shortest = min(map(len, self.by_name.values()))
        # Runs of ids by their beginning, which all prompts are long enough to have.
        self.by_beginning: dict[tuple, list[str]] = {}
        for name, ids in self.by_name.items():
            self.by_beginning.setdefault(ids[: self.shortest], []).append(name)

    def find(self, prompt: list[int] | None) -> str | None:
        """The name of the memory that a prompt begins with, if it has a token behind it."""
        if prompt is None or len(prompt) <= self.shortest:
            return None
        names = [
            name
            for name in self.by_beginning.get(tuple(prompt[: self.shortest]), ())
            if len(prompt) > len(self.by_name[name])
            and tuple(prompt[: len(self.by_name[name])]) == self.by_name[name]
        ]
        return max(names, key=lambda name: len(self.by_name[name]), default=None)

    def open(self, name: str):
        """The file of a memory: key and value `[L, P, K, H]`, the keys rotated to 0 … P-1."""
        return safe_open(self.folder / f"{name}.safetensors", "pt")


@dataclasses.dataclass
class Load:
    """A memory to write: its tokens from `first` on go to these slots of the cache."""

    name: str
    first: int
    slots: list[int]
    blocks: list[int]


@dataclasses.dataclass
class Loads(KVConnectorMetadata):
    """What a step's pass needs."""

    loads: list[Load] = dataclasses.field(default_factory=list)


class MemoryConnector(KVConnectorBase_V1):
    """See the module. One is made for the scheduler and one for every worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
        folder = transfer.get_from_extra_config("folder", str(pathlib.Path(__file__).parent))
        self.memories = Memories(folder)
        parallel = vllm_config.parallel_config
        sizes = (
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            model.get_head_size(),
        )
        if sizes != self.memories.sizes:
            raise ValueError(
                f"{folder}: the memories are of a base of (layers, KV heads, head size) "
                f"{self.memories.sizes}, and the server's has {sizes}; serve the base that they "
                "were written for"
            )
        if getattr(transfer, "kv_load_failure_policy", "fail") != "fail":
            raise ValueError("a memory's ids cannot be recomputed: kv_load_failure_policy is fail")
        if (
            len(kv_cache_config.kv_cache_groups) != 1
            or getattr(parallel, "decode_context_parallel_size", 1) != 1
        ):
            raise ValueError(
                "the memory connector fills one group of layers' blocks; serve with "
                "--disable-hybrid-kv-cache-manager and without context parallelism"
            )
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.dtype = model.dtype
        self.found: dict[str, str] = {}  # request -> memory
        self.waiting: dict[str, Load] = {}  # request -> what the next pass needs
        self.failed: set[int] = set()

    # ----------------------------------------------------------------------------- scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens a memory adds to those that the prefix cache has."""
        name = self.memories.find(request.prompt_token_ids)
        self.found.pop(request.request_id, None)
        if name is None:
            return 0, False
        if request.skip_reading_prefix_cache:
            logger.warning("prompt log probabilities need the tokens that a memory has not")
            return 0, False
        if self.memories.lora and request.lora_request is None:
            logger.warning("the memory is read with the decoder's LoRA; name it as the model")
            return 0, False
        self.found[request.request_id] = name
        return max(len(self.memories.by_name[name]) - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes which slots the memory's tokens have."""
        if num_external_tokens == 0:
            return
        name = self.found[request.request_id]
        end = len(self.memories.by_name[name])
        first, size = end - num_external_tokens, self.block_size
        block_ids = blocks.get_block_ids()[0]
        slots = [block_ids[i // size] * size + i % size for i in range(first, end)]
        used = block_ids[first // size : -(-end // size)]
        self.waiting[request.request_id] = Load(name, first, slots, used)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What the workers write before the next pass."""
        loads = Loads(list(self.waiting.values()))
        self.waiting = {}
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict | None]:
        """Says in the reply which memory was read."""
        name = self.found.pop(request.request_id, None)
        return False, None if name is None else {"memory": name}

    # --------------------------------------------------------------------------------- worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes the memories of this step into every layer's cache."""
        for load in self._get_connector_metadata().loads:
            try:
                self._write(load, forward_context.no_compile_layers)
            except (OSError, SafetensorError) as error:  # this request fails, no other
                logger.error("memory %s cannot be read: %s", load.name, error)
                self.failed.update(load.blocks)

    def _write(self, load: Load, layers: dict[str, Any]) -> None:
        with self.memories.open(load.name) as file:
            keys, values = (file.get_tensor(name)[:, load.first :] for name in ("key", "value"))
        slots = None
        for name, layer in layers.items():
            number = re.search(r"\.layers\.(\d+)\.", name)
            cache = getattr(layer, "kv_cache", None)
            if number is None or cache is None:
                continue
            if slots is None:
                slots = torch.tensor(load.slots, dtype=torch.int64, device=cache.device)
            heads = own_heads(keys.shape[2], layer.num_kv_heads)
            key, value = (
                x[int(number[1])][:, heads].to(cache.device, self.dtype).contiguous()
                for x in (keys, values)
            )
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks whose memory could not be read."""
        failed, self.failed = self.failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is written when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def own_heads(total: int, here: int) -> slice:
    """This worker's heads of all, which tensor parallelism splits, or repeats if they are few."""
    if here == total:
        return slice(None)
    ranks = get_tensor_model_parallel_world_size()
    start = get_tensor_model_parallel_rank() * total // ranks
    return slice(start, start + here)
