"""As much of vLLM as a KV connector sees: base classes, requests, blocks, layers with paged caches.

Layers keep keys and values as vLLM does: in blocks, which a request has in any order.
"""

import importlib.util
import sys
import types

import torch


class Base:
    """Stands for `KVConnectorBase_V1`."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self.metadata = None

    def _get_connector_metadata(self):
        return self.metadata


def modules(rank=0, ranks=1):
    """The modules that a connector imports, by name."""
    names = (
        "vllm",
        "vllm.distributed",
        "vllm.distributed.kv_transfer",
        "vllm.distributed.kv_transfer.kv_connector",
        "vllm.distributed.kv_transfer.kv_connector.v1",
        "vllm.distributed.kv_transfer.kv_connector.v1.base",
    )
    made = {name: types.ModuleType(name) for name in names}
    made["vllm.distributed"].get_tensor_model_parallel_rank = lambda: rank
    made["vllm.distributed"].get_tensor_model_parallel_world_size = lambda: ranks
    made[names[-1]].KVConnectorBase_V1 = Base
    made[names[-1]].KVConnectorMetadata = type("KVConnectorMetadata", (), {})
    return made


def load_connector(folder, monkeypatch, rank=0, ranks=1):
    """The module that was exported to a folder, imported beside a stand-in of vLLM."""
    for name, module in modules(rank, ranks).items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(
        "memory_connector", folder / "memory_connector.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "memory_connector", module)
    spec.loader.exec_module(module)
    return module


def config(role, sizes, dtype=torch.float32, block_size=4, groups=1, policy="fail", folder=None):
    """(vllm_config, role, kv_cache_config) of a server whose base has (layers, KV heads, head
    size).
    """
    extra = {} if folder is None else {"folder": str(folder)}
    vllm_config = types.SimpleNamespace(
        kv_transfer_config=types.SimpleNamespace(
            get_from_extra_config=extra.get, kv_load_failure_policy=policy
        ),
        model_config=types.SimpleNamespace(
            get_total_num_hidden_layers=lambda: sizes[0],
            get_total_num_kv_heads=lambda: sizes[1],
            get_head_size=lambda: sizes[2],
            dtype=dtype,
        ),
        parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
    )
    spec = types.SimpleNamespace(kv_cache_spec=types.SimpleNamespace(block_size=block_size))
    return vllm_config, role, types.SimpleNamespace(kv_cache_groups=[spec] * groups)


def request(prompt, number="r", skip=False, lora=None):
    """A request of the scheduler."""
    return types.SimpleNamespace(
        request_id=number,
        prompt_token_ids=prompt,
        skip_reading_prefix_cache=skip,
        lora_request=lora,
    )


class Layer:
    """An attention layer with a cache of `[blocks, slots, K, H]`; it writes as vLLM's do."""

    def __init__(self, heads, head_dim, blocks=64, block_size=4):
        self.num_kv_heads = heads
        self.impl = self
        self.kv_cache = torch.full((2, blocks, block_size, heads, head_dim), torch.nan)

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        """Writes tokens `[T, K, H]` to slots."""
        size = cache.shape[2]
        assert key.shape == value.shape == (len(slots), *cache.shape[3:])
        cache[0, slots // size, slots % size] = key
        cache[1, slots // size, slots % size] = value

    def read(self, blocks, count):
        """Keys and values `[2, K, count, H]` of the first tokens in these blocks."""
        return self.kv_cache[:, blocks].flatten(1, 2)[:, :count].transpose(1, 2)


class Blocks:
    """A request's blocks."""

    def __init__(self, ids):
        self.ids = ids

    def get_block_ids(self):
        """The ids, by cache group."""
        return (self.ids,)


def step(connector, worker, requests, layers, computed=0):
    """One step of the engine: {request id: how many tokens the connector has}.

    requests: {request: its blocks}. computed: tokens of each that the prefix cache has.
    """
    matched = {}
    for asked, blocks in requests:
        count, later = connector.get_num_new_matched_tokens(asked, computed)
        assert later is False
        connector.update_state_after_alloc(asked, Blocks(blocks), count)
        matched[asked.request_id] = count
    worker.metadata = connector.build_connector_meta(None)
    names = {f"model.layers.{i}.self_attn.attn": layer for i, layer in enumerate(layers)}
    names["model.layers.0.mlp"] = object()  # no layer of attention
    worker.start_load_kv(types.SimpleNamespace(no_compile_layers=names))
    return matched
