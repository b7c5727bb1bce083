"""norm_rope(x) = rotate(RMSNorm(x) · weight), each pair of channels by its token's angle."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import normalized_and_turned, rotation
from tests.kernels.kernel_checks import DTYPES, LEAST_SQNR_DB, assert_opcheck, run_by, sqnr_db
from turbo_opt.kernels import OperatorInputError, choose, explain, norm_rope

EPS = 1e-6
PROVIDERS = ["reference", "triton"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [None, torch.float32, "x's"], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 7, 384), (1, 5, 1536)])
def test_norm_rope_equals_its_definition(provider, dtype, weighted, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 2 + 1
    weight = None
    if weighted is not None:
        weight = torch.randn(shape[-1], device=device).to(dtype if weighted == "x's" else weighted)
    cos, sin = rotation(shape[1], device)
    y = run_by(provider, "norm_rope", x, weight, cos, sin, EPS)
    assert y.dtype is dtype
    assert sqnr_db(normalized_and_turned(x, weight, cos, sin, EPS), y) > LEAST_SQNR_DB[dtype]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_parts_of_one_product_and_tables_of_different_strides(provider, device):
    x = torch.randn(2, 9, 3 * 256, device=device)[..., 256:512]
    cos, sin = rotation(9, device)
    for tables in ((cos, sin.contiguous()), (cos.contiguous(), sin), (cos.mT.contiguous().mT, sin)):
        y = run_by(provider, "norm_rope", x, None, *tables, EPS)
        assert sqnr_db(normalized_and_turned(x, None, *tables, EPS), y) > 115


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_strided_last_dimension(provider, device):
    x = torch.randn(2, 256, 5, device=device).mT
    tables = rotation(5, device)
    y = run_by(provider, "norm_rope", x, None, *tables, EPS)
    assert sqnr_db(normalized_and_turned(x, None, *tables, EPS), y) > 115


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rotation_keeps_the_length_of_each_head(provider, device):
    x = torch.randn(1, 5, 256, device=device)
    y = run_by(provider, "norm_rope", x, None, *rotation(5, device), EPS)
    heads = torch.nn.functional.rms_norm(x, (256,), eps=EPS).unflatten(-1, (2, 128))
    torch.testing.assert_close(y.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_zero_rows_stay_zero_and_constant_rows_are_the_turned_weight(provider, device):
    x = torch.stack([torch.zeros(256), torch.full((256,), 1000.0)])[None].to(device)
    weight, tables = torch.randn(256, device=device), rotation(2, device)
    y = run_by(provider, "norm_rope", x, weight, *tables, EPS)
    assert (y[0, 0] == 0).all()
    turned = normalized_and_turned(torch.ones_like(x), weight, *tables, 0.0)
    torch.testing.assert_close(y[0, 1].double(), turned[0, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_huge_outlier_leaves_no_nan(provider, device):
    x = torch.randn(1, 2, 256, device=device)
    x[0, 0, 3] = 1e15
    assert run_by(provider, "norm_rope", x, None, *rotation(2, device), EPS).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens_give_no_tokens(provider, device):
    x = torch.randn(2, 0, 256, device=device)
    y = run_by(provider, "norm_rope", x, None, *rotation(0, device), EPS)
    assert y.shape == (2, 0, 2, 128)


def test_opcheck(device):
    x, weight = torch.randn(2, 5, 256, device=device), torch.randn(256, device=device)
    assert_opcheck("norm_rope", x, weight, *rotation(5, device), EPS)


def test_choice_on_described_devices():
    x, tables = torch.empty(1, 9, 256, device="meta"), rotation(9, "meta")
    assert choose("norm_rope", "sm80", x, None, *tables, EPS) == "triton"
    assert choose("norm_rope", "sm90", x.bfloat16(), None, *tables, EPS) == "cuda"
    assert choose("norm_rope", "sm90", x, None, *tables, EPS) == "triton"
    assert choose("norm_rope", "sm75", x, None, *tables, EPS) == "reference"
    assert choose("norm_rope", "cpu", x, None, *tables, EPS) == "reference"
    narrow = explain("norm_rope", "sm90", x, None, *rotation(9, "meta", 64), EPS)
    assert narrow.provider == "reference" and "128 channels, got 64" in narrow.passed_over["triton"]


X, TABLE = torch.ones(1, 4, 256), torch.ones(1, 4, 1, 64)


@pytest.mark.parametrize(
    ("x", "weight", "cos", "sin", "message"),
    [
        (X[0], None, TABLE, TABLE, "x must have 3 dimensions"),
        (X.double(), None, TABLE, TABLE, "x must be bfloat16"),
        (X, torch.ones(255), TABLE, TABLE, r"weight must have shape \(256,\)"),
        (X, torch.ones(256).half(), TABLE, TABLE, "weight must be float32 or torch.float32"),
        (X, None, TABLE[:, :3], TABLE, r"cos must be float32 of shape \(1, 4, 1, D / 2\)"),
        (X, None, TABLE, TABLE.double(), "sin must be float32"),
        (X, None, TABLE, TABLE[..., :32], r"sin must be .* got torch.float32 of shape \(1, 4, 1"),
        (X, None, TABLE[0], TABLE[0], "cos must be float32"),
        (X[..., :192], None, TABLE, TABLE, "192 channels are not whole heads of 128"),
    ],
)
def test_wrong_arguments_are_named(x, weight, cos, sin, message):
    with pytest.raises(OperatorInputError, match=f"^norm_rope: .*{message}"):
        norm_rope(x, weight, cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("weighted", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 256), (2, 77, 1536), (1, 32760, 1536), (1, 75600, 5120)])
def test_bfloat16_on_the_gpu(provider, weighted, shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    weight = None if weighted is None else torch.randn(shape[-1], device=device, dtype=weighted)
    args = (x, weight, *rotation(shape[1], device), EPS)
    expected = run_by("reference", "norm_rope", *args)
    assert sqnr_db(expected, run_by(provider, "norm_rope", *args)) > 50
