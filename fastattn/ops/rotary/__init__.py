"""Rotary position embedding: `rotary`."""

from fastattn.ops.rotary.api import rotary

__all__ = ["rotary"]
