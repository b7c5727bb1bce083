"""sagesla: as sla, but q·kᵀ in int8 and P·v in e4m3."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import (
    BLOCKS,
    assert_attends,
    heads_of_one_product,
    heads_on_meta,
    highest_blocks,
    linear_branch,
    masked_attention,
    projection,
    sparsity_on_meta,
    with_8_bit_operands,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by, skip_unless_served
from turbo_opt.kernels import OperatorInputError, choose, explain, sagesla

# Of the sparse branch, relative to the same blocks in float32: int8 alone, and with P and v in fp8.
LARGEST_ERROR = {"16bit": 0.02, "fp8": 0.05}
TRUNCATED = 2  # times as much where Triton's interpreter truncates to fp8 instead of rounding
LARGEST_LINEAR_ERROR = 0.01
# Triton against the reference: P is rounded relative to the maximum so far, not the final one.
LARGEST_DIFFERENCE = {"16bit": 0.002, "fp8": 0.03}
DTYPES = {"reference": torch.float32, "triton": torch.float16}  # bfloat16 fails in the interpreter
PROVIDERS = list(DTYPES)
PV = list(LARGEST_ERROR)
SHAPES = [  # batch, heads, length, (block_q, block_k), topk
    (1, 1, 1, (64, 128), 0.5),
    (1, 2, 129, (64, 128), 0.5),  # the last key block holds one token
    (2, 1, 200, (128, 64), 0.6),
    (1, 1, 257, (64, 64), 1.0),  # the last blocks of both hold one token
]
COMPARED = [(1, 2, 65, (64, 64), 0.5), (2, 1, 200, (128, 128), 0.5)]


def truncates(pv, device):
    return pv == "fp8" and device.type == "cpu"


def largest_error(provider, pv, device):
    truncated = provider == "triton" and truncates(pv, device)
    return LARGEST_ERROR[pv] * (TRUNCATED if truncated else 1)


def largest_difference(pv, device):
    return LARGEST_DIFFERENCE[pv] + (LARGEST_ERROR[pv] if truncates(pv, device) else 0)


def problem(shape, provider, device):
    batch, heads, length, blocks, topk = shape
    q, k, v = heads_of_one_product(batch, heads, length, DTYPES[provider], device)
    return q, k, v, topk, blocks


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sparse_branch_is_close_to_the_same_blocks_in_float(provider, pv, shape, device):
    q, k, v, topk, blocks = problem(shape, provider, device)
    expected = masked_attention(q, k, v, highest_blocks(q, k, topk, *blocks), *blocks)
    args = (q, k, v, None, None, topk, *blocks, "softmax", pv)
    assert_attends(expected, provider, "sagesla", args, largest_error(provider, pv, device))


@pytest.mark.parametrize(("length", "blocks"), [(1, (64, 128)), (150, (64, 128)), (200, (128, 64))])
def test_the_reference_rounds_q_k_p_and_v_as_documented(length, blocks, device):
    q, k, v = heads_of_one_product(1, 1, length, torch.float32, device)
    kept = highest_blocks(q, k, 0.6, *blocks)
    expected = with_8_bit_operands(q[0, 0], k[0, 0], v[0, 0], kept[0, 0], *blocks)
    args = (q, k, v, None, None, 0.6, *blocks, "softmax", "fp8")
    # Values beside the middle of two codes fall to either side in float32.
    assert_attends(expected[None, None], "reference", "sagesla", args, 2e-3)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize(
    "shape", [(1, 2, 65, (64, 64), 0.5), (2, 1, 200, (128, 128), 0.5)], ids=str
)
def test_triton_equals_the_reference_with_the_linear_branch(pv, shape, device):
    q, k, v, topk, blocks = problem(shape, "triton", device)
    args = (q, k, v, *projection(device), topk, *blocks, "softmax", pv)
    expected = run_by("reference", "sagesla", *args)
    assert_attends(expected, "triton", "sagesla", args, largest_difference(pv, device))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_the_linear_branch_is_what_the_projection_adds(provider, feature_map, device):
    q, k, v = heads_of_one_product(1, 1, 70, DTYPES[provider], device)
    v = v + 2  # else it is much smaller than the sum that it is read from
    weight, _ = projection(device)
    with_branch, without = (
        run_by(provider, "sagesla", q, k, v, each, None, 0.5, 64, 128, feature_map, "fp8").double()
        for each in (weight, None)
    )
    expected = linear_branch(q, k, v, feature_map) @ weight.double().T
    assert relative_error(expected, with_branch - without) < LARGEST_LINEAR_ERROR


@pytest.mark.parametrize("provider", PROVIDERS)
def test_with_every_block_kept_it_is_dense_attention(provider, device):
    q, k, v = heads_of_one_product(1, 1, 130, DTYPES[provider], device)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    args = (q, k, v, None, None, 1.0, 64, 128, "softmax", "fp8")
    assert_attends(expected, provider, "sagesla", args, largest_error(provider, "fp8", device))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_all_keys_share_costs_no_accuracy(provider, device):
    """Softmax does not see it, and smoothing takes it away before rounding to int8."""
    q, k, v = heads_of_one_product(1, 1, 130, DTYPES[provider], device)
    k = k + 20 * torch.randn(128, device=device, dtype=k.dtype)
    kept = highest_blocks(q, k, 0.5, 64, 128)
    args = (q, k, v, None, None, 0.5, 64, 128, "softmax", "16bit")
    expected = masked_attention(q, k, v, kept, 64, 128)
    assert_attends(expected, provider, "sagesla", args, LARGEST_ERROR["16bit"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
def test_equal_tokens_and_zeros_give_their_value(provider, pv, device):
    for value in (0.0, 1.5):
        q = torch.full((1, 1, 70, 128), value, device=device, dtype=DTYPES[provider])
        weight = torch.zeros(128, 128, device=device)
        o = run_by(provider, "sagesla", q, q, q, weight, None, 0.5, 64, 128, "softmax", pv)
        torch.testing.assert_close(o, q, rtol=1e-3, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
def test_huge_outliers_leave_no_nan(provider, pv, device):
    q, k, v = heads_of_one_product(1, 1, 140, DTYPES[provider], device)
    huge = 6e4 if provider == "triton" else 1e15
    for token, x in enumerate((q, k, v)):
        x[0, 0, token, 5] = huge
    k[0, 0, 66] = -huge / 2
    weight = torch.eye(128, device=device) / 8
    args = (q, k, v, weight, None, 1.0, 64, 128, "softmax", pv)
    assert run_by(provider, "sagesla", *args).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", [(0, 2, 70, 128), (1, 2, 0, 128)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q = torch.randn(shape, device=device, dtype=torch.float16)
    args = (q, q, q, *projection(device), 0.5, 64, 128, "softmax", "fp8")
    assert run_by(provider, "sagesla", *args).shape == shape


def test_opcheck(device):
    q, k, v = torch.randn(3, 1, 2, 70, 128, device=device, dtype=torch.float16)
    assert_opcheck("sagesla", q, k, v, *projection(device), 0.5, 64, 128, "softmax", "fp8")


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    named = {**heads_on_meta(dtype, head_dim), **sparsity_on_meta(head_dim, 64, 128)}
    return tuple({**named, "pv": "fp8", **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "changes", "provider"),
    [
        ("sm90", {}, "cuda"),
        ("sm90", {"dtype": torch.float16}, "triton"),
        ("sm90", {"pv": "16bit"}, "triton"),
        ("sm90", {"block_q": 128, "block_k": 64}, "triton"),
        ("sm90", {"dtype": torch.float32}, "reference"),
        ("sm90", {"head_dim": 64}, "reference"),
        ("sm89", {}, "triton"),
        ("sm100", {}, "triton"),
        ("sm120", {}, "triton"),
        ("sm80", {}, "reference"),
        ("sm80", {"pv": "16bit"}, "triton"),
        ("sm75", {"pv": "16bit"}, "reference"),
        ("cpu", {}, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, provider):
    assert choose("sagesla", device_name, *arguments(**changes)) == provider


def test_what_is_not_served_is_explained():
    reasons = explain("sagesla", "sm80", *arguments()).passed_over
    assert reasons["triton"] == "pv='fp8' needs sm89 or newer"
    assert "sm90's tensor cores" in reasons["cuda"]
    wide = explain("sagesla", "sm90", *arguments(block_q=128, block_k=64)).passed_over
    assert "64 queries by 128 keys" in wide["cuda"]
    half = explain("sagesla", "sm90", *arguments(dtype=torch.float16)).passed_over
    assert "takes bfloat16" in half["cuda"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(1, 2, 300, 128)}, "q, k and v must share"),
        ({"v": torch.ones(1, 3, 300, 128).bfloat16()}, r"must be \(B, H, L, D\) alike"),
        ({"proj_weight": None}, "proj_bias is given without proj_weight"),
        ({"topk": -0.1}, "topk must be above 0 and at most 1, got -0.1"),
        ({"block_q": 16}, "block_q must be 64 or 128, got 16"),
        ({"feature_map": "gelu"}, "unknown feature map 'gelu'"),
        ({"pv": "fp16"}, "pv must be 'fp8' or '16bit', got 'fp16'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^sagesla: .*{message}"):
        sagesla(*arguments(**changes))


GPU_SHAPES = [(1, 2000, 2, 0.2), (2, 777, 3, 0.4), (1, 1, 2, 0.5), (1, 129, 1, 1.0)]


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("batch", "length", "heads", "topk"), GPU_SHAPES)
def test_bfloat16_on_the_gpu(provider, projected, blocks, batch, length, heads, topk, device):
    q, k, v = heads_of_one_product(batch, heads, length, torch.bfloat16, device)
    weight, bias = projection(device) if projected else (None, None)
    args = (q, k, v, weight, bias, topk, *blocks, "softmax", "fp8")
    skip_unless_served("sagesla", provider, *args)
    expected = run_by("reference", "sagesla", *args)
    assert_attends(expected, provider, "sagesla", args, 0.02 if projected else 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
def test_sums_over_many_keys_do_not_drift(provider, device):
    """The tensor cores add e4m3 products with few bits: a mean of v shows what is lost."""
    q, k, v = heads_of_one_product(1, 1, 16384, torch.bfloat16, device)
    args = (q, k, v + 2, None, None, 0.5, 64, 128, "softmax", "fp8")
    skip_unless_served("sagesla", provider, *args)
    expected = run_by("reference", "sagesla", *args)
    assert_attends(expected, provider, "sagesla", args, 0.005)
