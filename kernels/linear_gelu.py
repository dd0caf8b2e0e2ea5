"""`gelu(linear(x))` as one product: the activation runs in the epilogue of the GEMM.

    y = linear(x, weight, bias)            # [..., N], written to memory and read again
    z = gelu(y, approximate="tanh")

becomes

    z = ras_compile::linear_gelu(x, weight, bias)

because the feed-forward's hidden values are the largest of a transformer, and cuBLASLt can apply this activation to a
tile of the product before it leaves the chip. The sum is rounded once, after the activation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._torch import linear_gelu_tanh

# cuBLASLt's epilogue; in float32 the product would be another one than the separate linear's (TF32 rules differ).
FUSED_DTYPES = (torch.bfloat16, torch.float16)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The eager twin: `gelu(x @ weight.T + bias)`, the tanh form. Shapes and dtypes as for `linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@torch.library.custom_op("ras_compile::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x @ weight.T + bias, approximate="tanh")`.

    Args:
        x: [..., K], any strides.
        weight: [N, K].
        bias: [N].

    All three share one floating-point dtype and device. Returns [..., N], contiguous. On CUDA in 16 bits it is one cuBLASLt
    product with the activation in its epilogue; elsewhere the eager twin runs.

    Raises:
        ValueError: other shapes, or different dtypes or devices.
    """
    _check(x, weight, bias)
    if not x.is_cuda or torch.version.cuda is None or x.dtype not in FUSED_DTYPES or x.numel() == 0:
        return linear_gelu_reference(x, weight, bias).contiguous()
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    fused = linear_gelu_tanh(rows, weight, bias)  # [M, N]
    return fused.view(*x.shape[:-1], weight.shape[0])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    fits = x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    if not fits:
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"linear_gelu: x must be [..., K], weight [N, K] and bias [N]; given: {shapes}")
    if not x.dtype == weight.dtype == bias.dtype or not x.device == weight.device == bias.device:
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (x, weight, bias))
        raise ValueError(f"linear_gelu: x, weight and bias must share one dtype and device; given: {kinds}")


@register_flop_formula(torch.ops.ras_compile.linear_gelu)
def _linear_gelu_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """As for the linear alone."""
    return 2 * math.prod(x_shape) * weight_shape[0]
