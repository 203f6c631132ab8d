"""Attention of new queries to the keys and values of the tokens before them, which are kept."""

from fastattn.ops.attention.kv_cache.api import attention_with_kv_cache, explain_with_kv_cache
from fastattn.ops.attention.kv_cache.cache import KVCache, Rotary

__all__ = ["KVCache", "Rotary", "attention_with_kv_cache", "explain_with_kv_cache"]
