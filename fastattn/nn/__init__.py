"""Modules: they hold parameters, and no mathematics."""

from fastattn.nn.attention import CausalSelfAttention, MultiheadAttention
from fastattn.nn.embedding import TokenPositionEmbedding
from fastattn.nn.linear import Linear
from fastattn.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastattn.nn.mlp import MLP
from fastattn.nn.normalization import DropoutAddLayerNorm, LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding

__all__ = [
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "DropoutAddLayerNorm",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MLP",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "TokenPositionEmbedding",
]
