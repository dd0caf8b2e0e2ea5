"""`linear_gelu` against its definition, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from ras_compile.kernels import linear_gelu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# one rounding of a sum in fp32 (16 bits: of a value of about 4 at most), against float64
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5, torch.float64: 1e-12}


def operands(lead, k, n, dtype, device):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*lead, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    return [value.to(device, dtype) for value in (x, weight, bias)]


def wanted(x, weight, bias):
    return F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("lead", "k", "n"), [((2, 37), 48, 65), ((1,), 16, 8), ((3, 5, 7), 33, 31), ((2, 128), 256, 512)]
)
def test_definition(device, dtype, lead, k, n):
    given = operands(lead, k, n, dtype, device)
    found = linear_gelu(*given)
    assert found.shape == (*lead, n) and found.dtype == dtype and found.is_contiguous()
    assert (found.double() - wanted(*given)).abs().max() <= TOLERANCE[dtype] * wanted(*given).abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    x, weight, bias = operands((2, 40), 64, 96, torch.bfloat16, device)
    views = x.transpose(0, 1), weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]
    assert (linear_gelu(*views) - linear_gelu(views[0].contiguous(), weight, bias)).abs().max() <= 2**-6 * 4
    assert linear_gelu(x[:, :0], weight, bias).shape == (2, 0, 96)


def test_what_it_takes():
    x, weight, bias = operands((2, 3), 4, 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"x must be \[..., K\]"):
        linear_gelu(x, weight.t(), bias)
    with pytest.raises(ValueError, match=r"bias \[N\]"):
        linear_gelu(x, weight, bias[:4])
    with pytest.raises(ValueError, match="share one dtype"):
        linear_gelu(x.double(), weight, bias)


def test_as_an_operator():
    given = operands((2, 3), 4, 5, torch.float32, "cpu")
    torch.library.opcheck(torch.ops.ras_compile.linear_gelu.default, given)
