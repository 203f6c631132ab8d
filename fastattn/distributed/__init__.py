"""Attention on several devices: how DTensors of it are sharded."""

from fastattn.distributed.sharding import register_sharding

__all__ = ["register_sharding"]
