"""The KV cache of a base within a budget of bytes."""

from __future__ import annotations

import logging

from lora_runtime.errors import CapacityExceeded
from lora_runtime.kv_blocks import KvBlocks, block_bytes
from lora_runtime.model.base import BaseModel
from lora_runtime.model.kv_cache import KvCache, choose_paged_attention, default_block_tokens

logger = logging.getLogger(__name__)


def kv_cache_for(model: BaseModel, num_bytes: int, block_tokens: int | None, max_sequences: int) -> KvCache | None:
    """As many blocks as fit, and no more than `max_sequences` of the greatest length need; None of a base that does
    not generate. `block_tokens`: of one block, None: what the device reads fastest.

    Raises CapacityExceeded where not one block fits.
    """
    if model.kv is None:
        return None
    device = model.placement.device
    block_tokens = block_tokens or default_block_tokens(device)
    size = block_bytes(model.kv, block_tokens)
    dtype = model.placement.dtype
    is_paged = choose_paged_attention(device, dtype, model.kv.head_dim, block_tokens) is not None
    most = num_bytes // size - is_paged  # the cache keeps one more then
    num_blocks = min(most, max_sequences * -(-model.spec.max_length // block_tokens))
    if num_blocks < 1:
        raise CapacityExceeded(
            f"a KV cache of {num_bytes} bytes holds no block of {block_tokens} tokens, which takes {size} bytes; give "
            "it more",
            budget_bytes=num_bytes,
            needed_bytes=size * (1 + is_paged),
        )
    return KvCache(model.kv, num_blocks, block_tokens, dtype, device)


def kv_blocks_of(cache: KvCache, model: BaseModel) -> KvBlocks:
    """The cache as the engine needs to know it; a sequence is no longer than what the whole cache holds."""
    most, wanted = cache.num_blocks * cache.block_tokens, model.spec.max_length
    if most < wanted:
        logger.warning(
            "base %s: the KV cache holds %d tokens, so texts end there, not at %d", model.spec.name, most, wanted
        )
    return KvBlocks(cache.num_blocks, cache.block_tokens, min(most, wanted))
