"""Layer norm and RMS norm, alone and behind a residual connection with dropout."""

from fastattn.ops.layer_norm.api import dropout_add_layer_norm, dropout_add_rms_norm, layer_norm, rms_norm

__all__ = ["dropout_add_layer_norm", "dropout_add_rms_norm", "layer_norm", "rms_norm"]
