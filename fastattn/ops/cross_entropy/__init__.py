"""The cross entropy of next-token prediction and its kin, from logits or without ever holding them."""

from fastattn.ops.cross_entropy.api import cross_entropy, linear_cross_entropy, linear_kl_div

__all__ = ["cross_entropy", "linear_cross_entropy", "linear_kl_div"]
