"""Attention biases of classes derived from xformers', and dtypes of results."""

import pytest
import torch

from fastattn.integrations import xformers as xops
from fastattn.integrations.xformers import attn_bias as biases


class Named(biases.LowerTriangularMask):
    """The same under another name."""


class WithTensor(biases.LowerTriangularMaskWithTensorBias):
    """The same under another name."""


class Other(biases.LowerTriangularMask):
    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.zeros(shape, dtype=dtype, device=device)


def qkv():
    return torch.randn(3, 1, 7, 2, 8)


def test_a_class_derived_from_one_is_that_one():
    tensors, bias = qkv(), torch.randn(1, 2, 7, 7)
    for derived, plain in (
        (Named(), biases.LowerTriangularMask()),
        (WithTensor(bias), biases.LowerTriangularMaskWithTensorBias(bias)),
    ):
        found = xops.memory_efficient_attention(*tensors, derived)
        assert torch.equal(found, xops.memory_efficient_attention(*tensors, plain))


def test_a_class_of_another_tensor_is_refused_by_its_name():
    with pytest.raises(NotImplementedError, match="got Other"):
        xops.memory_efficient_attention(*qkv(), Other())


def test_a_class_that_xformers_derives_is_refused_by_its_name():
    unknown = type("NewMask", (biases.LowerTriangularMask,), {"__module__": "xformers.ops.fmha.attn_bias"})
    with pytest.raises(NotImplementedError, match="got NewMask"):
        xops.memory_efficient_attention(*qkv(), unknown())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_results_are_of_a_floating_dtype(dtype):
    q, k, v = qkv()
    with pytest.raises(TypeError, match="output_dtype: expected a floating dtype"):
        xops.memory_efficient_attention(q, k, v, output_dtype=dtype)
    out, lse = xops.memory_efficient_attention_partial(q, k, v)
    with pytest.raises(TypeError, match="output_dtype: expected a floating dtype"):
        xops.merge_attentions([out, out], [lse, lse], output_dtype=dtype)
