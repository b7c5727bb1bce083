"""sla2(q, k, v) = α·attention over routed blocks + (1 − α)·linear attention over the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import (
    assert_attends,
    heads_of_one_product,
    masked_attention,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import OperatorInputError, choose, explain, sagesla, sla, sla2

FEATURE_MAPS = ["softmax", "elu", "relu"]
CASES = [("reference", torch.float32, 1e-5), ("triton", torch.float32, 1e-5)]
CASES += [("triton", torch.float16, 2e-3)]  # its interpreter multiplies bfloat16 wrongly
each_case = pytest.mark.parametrize(
    ("provider", "dtype", "largest_error"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)


def learned(heads, device, head_dim=128):
    """A router unlike the identity, and ratios that differ from block to block."""
    proj_q, proj_k = torch.randn(2, head_dim, head_dim, device=device) / head_dim**0.5
    alpha_weight = torch.randn(heads, head_dim, device=device)
    return proj_q, proj_k, alpha_weight, torch.randn(heads, device=device)


def means(x, block):
    return torch.stack([part.double().mean(2) for part in x.split(block, 2)], 2)


def kept_blocks_of(q, k, proj_q, proj_k, topk, block_q, block_k):
    """Whether each query block keeps each key block, (B, H, NQ, NK), in float64."""
    projected_q = means(q, block_q) @ proj_q.double().T
    projected_k = means(k, block_k) @ proj_k.double().T
    scores = projected_q @ projected_k.mT
    keep = max(1, int(topk * scores.shape[-1]))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(keep).indices, True)


def token_mask(blocks, block_q, block_k, length):
    return blocks.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[
        :, :, :length, :length
    ]


def phi(x, feature_map):
    x = x.double()
    if feature_map == "softmax":
        return x.softmax(-1)
    return torch.where(x > 0, x + 1, x.exp()) if feature_map == "elu" else x.clamp_min(0)


def definition(q, k, v, proj_q, proj_k, weight, bias, topk, block_q, block_k, feature_map):
    """Token by token in float64: every pair of a query and a key has its weight."""
    length = q.shape[2]
    kept = kept_blocks_of(q, k, proj_q, proj_k, topk, block_q, block_k)
    sparse = masked_attention(q, k, v, kept, block_q, block_k)
    if kept.all():
        return sparse
    pairs = phi(q, feature_map) @ phi(k, feature_map).mT
    pairs = pairs.masked_fill(token_mask(kept, block_q, block_k, length), 0.0)
    linear = pairs @ v.double() / (1e-5 + pairs.sum(-1, keepdim=True))
    logits = (means(q, block_q) * weight.double()[:, None]).sum(-1) + bias.double()[:, None]
    alpha = logits.sigmoid().repeat_interleave(block_q, 2)[:, :, :length, None]
    return alpha * sparse + (1 - alpha) * linear


@each_case
@pytest.mark.parametrize(
    ("batch", "heads", "length", "blocks", "topk", "feature_map", "head_dim"),
    [
        (1, 1, 1, (64, 128), 0.5, "softmax", 16),
        (1, 2, 129, (64, 128), 0.5, "elu", 32),  # the last key block holds one token
        (2, 1, 200, (64, 64), 0.6, "relu", 64),
        (1, 2, 257, (128, 64), 0.3, "softmax", 128),  # the last blocks of both hold one token
        (1, 1, 150, (128, 128), 1.0, "softmax", 16),
    ],
)
def test_sla2_equals_its_definition(
    provider,
    dtype,
    largest_error,
    batch,
    heads,
    length,
    blocks,
    topk,
    feature_map,
    head_dim,
    device,
):
    q, k, v = heads_of_one_product(batch, heads, length, dtype, device, head_dim)
    args = (q, k, v, *learned(heads, device, head_dim), topk, *blocks, feature_map)
    expected = definition(*args)
    assert_attends(expected, provider, "sla2", (*args, "16bit", "16bit"), largest_error)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 300),
    block_q=st.sampled_from([64, 128]),
    block_k=st.sampled_from([64, 128]),
    topk=st.floats(0.01, 1),
    feature_map=st.sampled_from(FEATURE_MAPS),
    seed=st.integers(0, 2**31),
)
def test_the_reference_equals_the_definition_at_any_size(
    length, block_q, block_k, topk, feature_map, seed
):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, length, 16)
    args = (q, k, v, *learned(2, "cpu", 16), topk, block_q, block_k, feature_map)
    expected = definition(*args)
    assert_attends(expected, "reference", "sla2", (*args, "16bit", "16bit"), 2e-5)


@each_case
def test_with_every_block_kept_it_is_dense_attention(provider, dtype, largest_error, device):
    q, k, v = heads_of_one_product(1, 2, 130, dtype, device, 64)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double())
    args = (q, k, v, *learned(2, device, 64), 1.0, 128, 64, "softmax", "16bit", "16bit")
    assert_attends(expected, provider, "sla2", args, largest_error)


@pytest.mark.parametrize("provider", ["reference", "triton"])
def test_router_of_identities_and_ratio_one_is_the_sparse_branch_of_sla(provider, device):
    q, k, v = heads_of_one_product(1, 2, 300, torch.float16, device)
    eye, weight = torch.eye(128, device=device), torch.zeros(2, 128, device=device)
    everything = (eye, eye, weight, torch.full((2,), 60.0, device=device))
    expected = sla(q, k, v, None, None, 0.4, 64, 64)
    args = (q, k, v, *everything, 0.4, 64, 64, "softmax", "16bit", "16bit")
    assert_attends(expected, provider, "sla2", args, 2e-3)


@pytest.mark.parametrize("pv", ["fp8", "16bit"])
def test_in_8_bits_the_sparse_branch_is_that_of_sagesla(pv):
    q, k, v = heads_of_one_product(1, 2, 300, torch.float32, "cpu")
    eye, weight = torch.eye(128), torch.zeros(2, 128)
    args = (eye, eye, weight, torch.full((2,), 60.0), 0.4, 64, 64, "softmax")
    expected = sagesla(q, k, v, None, None, 0.4, 64, 64, "softmax", pv)
    torch.testing.assert_close(sla2(q, k, v, *args, "int8", pv), expected)
    assert relative_error(expected, sla2(q, k, v, *args)) > 1e-3


def test_in_8_bits_triton_equals_the_reference(device):
    q, k, v = heads_of_one_product(1, 2, 200, torch.float16, device)
    args = (q, k, v, *learned(2, device), 0.5, 64, 64, "softmax", "int8", "16bit")
    assert_attends(run_by("reference", "sla2", *args), "triton", "sla2", args, 3e-3)


@each_case
def test_the_states_of_huge_kept_blocks_leave_no_trace(provider, dtype, largest_error, device):
    """Subtracting them from the sum over all keys would leave rounding errors of their size."""
    q, k, v = heads_of_one_product(1, 1, 256, dtype, device, 16)
    proj = torch.zeros(16, 16, device=device)
    proj[0, 0] = 1.0
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, :64, 0] = 8.0  # every query block keeps the first key block alone
    v[:, :, :64] = 3e4
    alpha = (torch.zeros(1, 16, device=device), torch.full((1,), -60.0, device=device))
    args = (q, k, v, proj, proj, *alpha, 0.25, 64, 64, "softmax")
    expected = definition(*args)
    assert expected.abs().max() < 10
    assert_attends(expected, provider, "sla2", (*args, "16bit", "16bit"), largest_error)


def test_many_keys_of_one_feature_do_not_overflow_float16(device):
    """400 tokens of value 300 stand for 75,600 tokens of value 1.6: φ(k) is 1 in one channel."""
    q, k, v = heads_of_one_product(1, 1, 400, torch.float16, device)
    k = k.clone()
    k[..., 0] = 50
    args = (q, k, v + 300, *learned(1, device), 0.2, 64, 64, "softmax")
    expected = definition(*args)
    assert_attends(expected, "triton", "sla2", (*args, "16bit", "16bit"), 2e-3)


@each_case
def test_dense_strides_and_a_strided_head_dim(provider, dtype, largest_error, device):
    q, k, v = torch.randn(3, 1, 2, 130, 32, device=device, dtype=dtype)
    k = k.mT.contiguous().mT  # tokens lie together, not channels
    args = (q, k, v, *learned(2, device, 32), 0.5, 64, 64, "softmax")
    expected = definition(*args)
    assert_attends(expected, provider, "sla2", (*args, "16bit", "16bit"), largest_error)


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 128), (1, 2, 0, 128)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q = torch.randn(shape, device=device, dtype=torch.float16)
    args = (q, q, q, *learned(2, device), 0.5, 64, 64, "softmax", "16bit", "16bit")
    assert run_by(provider, "sla2", *args).shape == shape


def test_opcheck(device):
    q, k, v = torch.randn(3, 1, 1, 70, 16, device=device, dtype=torch.float16)
    args = (q, k, v, *learned(1, device, 16), 0.5, 64, 64, "softmax", "16bit", "16bit")
    assert_opcheck("sla2", *args)


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    q = torch.empty(1, 2, 300, head_dim, dtype=dtype, device="meta")
    named = {"q": q, "k": q, "v": q}
    square = torch.empty(head_dim, head_dim, device="meta")
    named |= {"proj_q": square, "proj_k": square}
    named |= {"alpha_weight": torch.empty(2, head_dim), "alpha_bias": torch.empty(2)}
    named |= {"topk": 0.1, "block_q": 64, "block_k": 128, "feature_map": "softmax"}
    return tuple({**named, "qk": "int8", "pv": "fp8", **changes}.values())


IN_16_BITS = {"qk": "16bit", "pv": "16bit"}


@pytest.mark.parametrize(
    ("device_name", "changes", "provider"),
    [
        ("sm90", {}, "triton"),
        ("sm80", {}, "reference"),
        ("sm80", IN_16_BITS, "triton"),
        ("sm80", {"pv": "16bit"}, "triton"),
        ("sm75", IN_16_BITS, "reference"),
        ("cpu", {}, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, provider):
    assert choose("sla2", device_name, *arguments(**changes)) == provider


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "16-bit operands"),
        ({"head_dim": 64}, "head dimension of 64"),
        ({"head_dim": 96, **IN_16_BITS}, "16, 32, 64 or 128 channels wide, got 96"),
    ],
)
def test_what_triton_does_not_serve_is_explained(changes, reason):
    choice = explain("sla2", "sm90", *arguments(**changes))
    assert choice.provider == "reference" and reason in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 2, 300, 128).double()}, "must share bfloat16, float16 or float32"),
        ({"v": torch.ones(1, 2, 299, 128).bfloat16()}, r"\(1, 2, 299, 128\)"),
        ({"proj_k": torch.ones(128, 64)}, r"proj_k must be \(128, 128\), got \(128, 64\)"),
        ({"alpha_weight": torch.ones(3, 128)}, r"alpha_weight must be \(2, 128\), got \(3, 128\)"),
        ({"alpha_bias": torch.ones(1)}, r"alpha_bias must be \(2,\), got \(1,\)"),
        ({"topk": 0.0}, "topk must be above 0 and at most 1, got 0.0"),
        ({"block_q": 32}, "block_q must be 64 or 128, got 32"),
        ({"feature_map": "softmaks"}, "'softmaks': did you mean 'softmax'"),
        ({"qk": "int4"}, "qk must be 'int8' or '16bit', got 'int4'"),
        ({"pv": "int8"}, "pv must be 'fp8' or '16bit', got 'int8'"),
        ({"qk": "16bit"}, "pv 'fp8' goes with qk 'int8', got '16bit'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^sla2: .*{message}"):
        sla2(*arguments(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize(("qk", "pv"), [("16bit", "16bit"), ("int8", "16bit"), ("int8", "fp8")])
@pytest.mark.parametrize("blocks", [(64, 128), (128, 64)])
@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 2000, 2), (2, 777, 3), (1, 129, 1)])
def test_bfloat16_on_the_gpu(batch, length, heads, blocks, qk, pv, device):
    q, k, v = heads_of_one_product(batch, heads, length, torch.bfloat16, device)
    args = (q, k, v, *learned(heads, device), 0.3, *blocks, "softmax", qk, pv)
    expected = run_by("reference", "sla2", *args)
    assert_attends(expected, "triton", "sla2", args, 0.01 if qk == "16bit" else 0.03)
