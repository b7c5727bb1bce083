"""No operator gives NaN for inputs at the edge, and what it gives is right.

Operators whose own tests have the edge cases (`adaln`, `sla`, `sagesla`, `sage_attention`, …) are
not repeated here.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import heads_of_one_product
from tests.kernels.block_sparse_checks import some_lists
from tests.kernels.edge_cases import EDGE_HEADS, EDGE_ROWS, OUTLYING_CHANNEL, with_an_outlier
from tests.kernels.kernel_checks import (
    assert_quantized_alike,
    each_provider,
    in_halves,
    relative_error,
    run_by,
    skip_unless_served,
)
from tests.kernels.test_attention_jvp import by_forward_mode
from tests.kernels.test_attention_jvp import problem as jvp_problem
from tests.kernels.test_block_sparse_attention_backward import gradients
from tests.kernels.test_gelu_quantize import gelu_tanh
from tests.kernels.test_layer_norm import definition as exact_layer_norm
from tests.kernels.test_norm_rope_sagesla import parts_of_one_product
from tests.kernels.test_rms_norm import definition as exact_rms_norm
from tests.kernels.test_sla2 import learned
from turbo_opt.kernels import (
    SCHEMES,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)

each_edge = pytest.mark.parametrize("edge", EDGE_ROWS.values(), ids=EDGE_ROWS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_edge_of_heads = pytest.mark.parametrize("edge", EDGE_HEADS.values(), ids=EDGE_HEADS)
# By how much an average may be off, relative to the largest value of its channel.
SHARE_OF_VALUES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 16e-3}
# How sla2 multiplies q and k, and P and v.
each_precision = pytest.mark.parametrize(
    ("qk", "pv"), [("16bit", "16bit"), ("int8", "16bit"), ("int8", "fp8")]
)

# Of a product in the result's dtype. Hopper's fp8 units keep 14 bits within a block of K.
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 2.0**-8}


def dtype_of(provider):
    """The CUDA kernels, and PyTorch's products on a GPU, have bfloat16 only."""
    return torch.bfloat16 if provider in ("cuda", "torch") else torch.float32


def sixteen_bits_of(provider):
    """What attention is tested in: bfloat16 fails in Triton's interpreter."""
    return {"cuda": torch.bfloat16, "triton": torch.float16}.get(provider, torch.float32)


def served(name, provider, *args):
    skip_unless_served(name, provider, *args)
    return run_by(provider, name, *args)


def truncates(provider, device):
    """Triton's interpreter truncates to e4m3 instead of rounding, and may halve a value."""
    return provider == "triton" and device.type == "cpu"


def edge_rows(edge, dtype, device, channels=256):
    return edge(torch.randn(1, 132, channels, device=device, dtype=dtype) * 2 + 1)


def assert_close_by_element(exact, actual, bound):
    """`bound` has the shape of both, or is expanded to it."""
    assert actual.isfinite().all()
    excess = ((actual.double() - exact).abs() - bound).max().item()
    assert excess <= 0, f"off by {excess:.3g} more than is allowed"


def rounding_to(scheme, exact, q, scale):
    """By how much the exact values may be off, rounded to q by steps of `scale`."""
    step = dequantize_activation(torch.ones_like(q, dtype=torch.float32).to(q.dtype), scale, scheme)
    if scheme == "int8-block":  # half a step, and what is above 127 steps
        return step / 2 + (exact - 127 * step).clamp_min(0)
    return exact.abs() / 16 + step * 2.0**-10  # half a step, or half a subnormal one of 2⁻⁹


def of_the_mean(x, weight):
    """In constant rows nothing is left of x but the rounding of its mean, divided by √eps."""
    spread = (x.double().var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return 2.0**-20 * x.double().abs().amax(-1, keepdim=True) / spread * weight.abs()


@each_edge
@each_provider("layer_norm", "rms_norm")
def test_norms(name, provider, edge, device):
    dtype = dtype_of(provider)
    x = edge_rows(edge, dtype, device)
    weight, bias = torch.randn(2, 256, device=device)
    if name == "layer_norm":
        exact = exact_layer_norm(x, weight, bias, 1e-6)
        y = served(name, provider, x, weight, bias, 1e-6)
    else:
        exact = exact_rms_norm(x, weight, 1e-6)
        y = served(name, provider, x, weight, 1e-6)
    bound = ROUNDING[dtype] * exact.abs() + of_the_mean(x, weight) + 1e-5
    assert_close_by_element(exact, y, bound)


@each_edge
@each_scheme
@each_provider("layer_norm_quantize")
def test_a_quantized_norm(name, provider, edge, scheme, device):
    x = edge_rows(edge, dtype_of(provider), device)
    weight, bias = torch.randn(2, 256, device=device)
    q, scale = served(name, provider, x, weight, bias, 1e-6, scheme)
    assert (scale > 0).all()
    if scheme == "fp8-block" and truncates(provider, device):
        return
    exact = exact_layer_norm(x, weight, bias, 1e-6)
    bound = 1.01 * rounding_to(scheme, exact, q, scale) + of_the_mean(x, weight) + 1e-5
    if in_halves(provider, scheme):  # the normalized row, weight and bias, and their sum
        bound = bound + 3 * 2.0**-11 * (exact.abs() + bias.abs())
    assert_close_by_element(exact, dequantize_activation(q, scale, scheme), bound)


@each_edge
@each_scheme
@each_provider("gelu_quantize")
def test_gelu(name, provider, edge, scheme, device):
    x = edge_rows(edge, dtype_of(provider), device)
    q, scale = served(name, provider, x, scheme)
    assert q.float().isfinite().all() and (scale > 0).all()
    assert_quantized_alike(quantize_activation(gelu_tanh(x).float(), scheme), (q, scale))


def layer_of(x, scheme):
    """Quantized operands of a layer with x (1, L, 256) as input, and a bias."""
    weight = torch.randn(128, x.shape[-1], device=x.device)
    weight[:, :128] *= 1e-3
    bias = torch.randn(128, device=x.device)
    return (*quantize_activation(x, scheme), *quantize_weight(weight, scheme), bias)


def exact_layer(q, q_scale, weight, weight_scale, bias, scheme):
    """The layer in float64, and the same with magnitudes in place of values."""
    x = dequantize_activation(q, q_scale, scheme).double()
    weight = dequantize_weight(weight, weight_scale).double()
    return x @ weight.T + bias.double(), x.abs() @ weight.abs().T + bias.abs().double()


@each_edge
@each_scheme
@each_provider("block_linear")
def test_a_linear_layer(name, provider, edge, scheme, device):
    dtype = dtype_of(provider)
    operands = layer_of(edge_rows(edge, dtype, device), scheme)
    y = served(name, provider, *operands, scheme, dtype)
    exact, magnitude = exact_layer(*operands, scheme)
    assert_close_by_element(exact, y, ROUNDING[dtype] * magnitude)
    if edge is torch.zeros_like:
        assert torch.equal(y, operands[-1].to(dtype).expand_as(y))


@each_edge
@each_scheme
@each_provider("linear_gated_residual")
def test_a_linear_layer_into_the_stream(name, provider, edge, scheme, device):
    dtype = dtype_of(provider)
    operands = layer_of(edge_rows(edge, dtype, device), scheme)
    x = edge_rows(edge, dtype, device, channels=128)
    gate = torch.randn(1, 1, 128, device=device)
    result = served(name, provider, *operands, x, gate, scheme)
    exact, magnitude = exact_layer(*operands, scheme)
    bound = ROUNDING[dtype] * (magnitude * gate.abs() + x.abs())
    assert_close_by_element(x.double() + exact * gate.double(), result, bound)


@each_edge
@each_scheme
@each_provider("linear_gelu_quantize")
def test_a_linear_layer_with_gelu(name, provider, edge, scheme, device):
    dtype = dtype_of(provider)
    operands = layer_of(edge_rows(edge, dtype, device), scheme)
    q, scale = served(name, provider, *operands, scheme, dtype)
    assert (scale > 0).all()
    exact, magnitude = exact_layer(*operands, scheme)
    exact = gelu_tanh(exact)
    own = rounding_to(scheme, exact, q, scale)
    if scheme == "fp8-block" and truncates(provider, device):
        own = own + exact.abs() / 2
    bound = 1.01 * own + 1.13 * ROUNDING[dtype] * magnitude  # GELU is at most that steep
    assert_close_by_element(exact, dequantize_activation(q, scale, scheme), bound)


def heads_at_the_edge(provider, length, device, spoiled=None):
    """q, k and positive v of one head, with an outlier in the one that is named, if any."""
    q, k, _ = heads_of_one_product(1, 1, length, sixteen_bits_of(provider), device)
    named = {"q": q, "k": k, "v": torch.rand_like(q) + 0.5}
    return [with_an_outlier(x) if name == spoiled else x for name, x in named.items()]


def attend(name, provider, q, k, v, pv="16bit", proj_weight=None):
    """The result (1, 1, L, D) of one of the operators of attention; dequantized.

    `proj_weight` is that of the linear branch, where there is one.
    """
    heads, length = q.shape[1:3]
    scheme = ("fp8-block",) if name.endswith("quantize") else ()
    if name == "attention_jvp":
        o, _ = served(name, provider, q, k, v, torch.randn_like(q), None, None)
    elif name == "block_sparse_attention":
        o, _ = served(name, provider, q, k, v, every_block(q), 64, 128)
    elif name == "sage_sparse_attention":
        o = served(name, provider, q, k, v, every_block(q), 64, 128, pv)
    elif name.startswith("padded_attention"):
        start = torch.tensor([length - 1], dtype=torch.int32, device=q.device)
        o = served(name, provider, q, k, v, start, None, *scheme)
    else:
        *_, cos, sin, eps = parts_of_one_product(1, heads, length, q.dtype, q.device)
        flat = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        norms = (None, None, cos, sin, eps)
        branch = (proj_weight, None, 0.5, 64, 128, "softmax")
        o = served(name, provider, *flat, *norms, *branch, pv, *scheme)
    if scheme:
        o = dequantize_activation(*o, *scheme)
    return o if o.ndim == 4 else o.unflatten(-1, (heads, -1)).transpose(1, 2)


def every_block(q):
    """Lists of all key blocks, of 128, for each query block of 64."""
    heads, length = q.shape[1:3]
    return some_lists(1, heads, length, 64, 128, length, q.device)


@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@each_provider(
    "block_sparse_attention", "sage_sparse_attention", "padded_attention",
    "padded_attention_quantize", "norm_rope_sagesla", "norm_rope_sagesla_quantize", "attention_jvp",
)  # fmt: skip
def test_attention_with_outliers_gives_averages_of_values(name, provider, spoiled, device):
    q, k, v = heads_at_the_edge(provider, 129, device, spoiled)
    pv = "16bit" if truncates(provider, device) else "fp8"
    o = attend(name, provider, q, k, v, pv).double()
    quantized = name.endswith("quantize")
    if quantized and truncates(provider, device):
        least = 0.4
    else:
        least = 0.85 if quantized or "sage" in name else 0.99
    assert (o <= (2 - least) * v.double().amax(2, keepdim=True)).all()
    if spoiled == "v":  # what shares a scale with it is lost: the head, or the channel
        o[..., slice(None) if quantized else OUTLYING_CHANNEL] = math.inf
    assert (o >= least * v.double().amin(2, keepdim=True)).all()


@each_edge_of_heads
@each_provider(
    "block_sparse_attention", "sage_sparse_attention", "padded_attention",
    "padded_attention_quantize",
)  # fmt: skip
def test_attention_at_the_edge_is_that_in_float64(name, provider, edge, device):
    q, k, v = edge(*heads_at_the_edge(provider, 130, device))
    o = attend(name, provider, q, k, v, "16bit" if truncates(provider, device) else "fp8")
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    if name.endswith("quantize"):
        share = 0.5 if truncates(provider, device) else 1 / 15
    elif "sage" in name:
        share = 0.05
    else:
        share = SHARE_OF_VALUES[q.dtype]
    assert_close_by_element(exact, o, share * v.double().amax(2, keepdim=True))


def routed(provider, q, k, v, qk, pv, topk=0.5, feature_map="softmax"):
    """The result of sla2: attention to that share of blocks of 64, linear to the others."""
    settings = (topk, 64, 64, feature_map, qk, pv)
    return served("sla2", provider, q, k, v, *learned(q.shape[1], q.device), *settings)


def skip_where_values_are_truncated(provider, pv, device):
    if pv == "fp8" and truncates(provider, device):
        pytest.skip("Triton's interpreter truncates to e4m3, and may halve a value")


@each_edge_of_heads
@each_precision
@each_provider("sla2")
def test_routed_attention_at_the_edge_gives_averages_of_values(
    name, provider, qk, pv, edge, device
):
    """Where all blocks score alike, which of them are kept is left open."""
    skip_where_values_are_truncated(provider, pv, device)
    q, k, v = edge(*heads_at_the_edge(provider, 130, device))
    o = routed(provider, q, k, v, qk, pv)
    low, high = v.double().aminmax(dim=2, keepdim=True)
    # The linear branch divides by 1e-5 + φ(q)·φ(k), and φ(q)·φ(k) is about 1/128 for each key.
    share = 0.05 if pv == "fp8" else 0.01
    assert_close_by_element(o.double().clamp(low, high), o, share * high)


@each_edge_of_heads
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
@each_provider("sla2")
def test_routed_attention_whose_features_may_all_be_zero(name, provider, feature_map, edge, device):
    """0 / (1e-5 + 0): the linear branch gives nothing then, and what is left is less."""
    q, k, v = edge(*heads_at_the_edge(provider, 130, device))
    o = routed(provider, q, k, v, "16bit", "16bit", feature_map=feature_map)
    assert o.isfinite().all() and (o >= 0).all()
    assert (o.double() <= 1.01 * v.double().amax(2, keepdim=True)).all()


@each_edge_of_heads
@each_precision
@each_provider("sla2")
def test_routed_attention_to_all_blocks_at_the_edge(name, provider, qk, pv, edge, device):
    skip_where_values_are_truncated(provider, pv, device)
    q, k, v = edge(*heads_at_the_edge(provider, 130, device))
    o = routed(provider, q, k, v, qk, pv, topk=1.0)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    share = 0.05 if pv == "fp8" else 0.01 if qk == "int8" else SHARE_OF_VALUES[q.dtype]
    assert_close_by_element(exact, o, share * v.double().amax(2, keepdim=True))


@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@each_precision
@each_provider("sla2")
def test_routed_attention_with_outliers_gives_averages_of_values(
    name, provider, qk, pv, spoiled, device
):
    skip_where_values_are_truncated(provider, pv, device)
    q, k, v = heads_at_the_edge(provider, 129, device, spoiled)
    o = routed(provider, q, k, v, qk, pv).double()
    assert o.isfinite().all()
    # Of an outlying query φ is 1 in one channel, where that of a single key may be 1e-4.
    least = 0.9
    assert (o <= (2 - least) * v.double().amax(2, keepdim=True)).all()
    if spoiled == "v":  # what shares its channel is lost in it
        o[..., OUTLYING_CHANNEL] = math.inf
    assert (o >= least * v.double().amin(2, keepdim=True)).all()


@pytest.mark.parametrize("pv", ["16bit", "fp8"])
@pytest.mark.parametrize("projected", [False, True])
@each_provider("norm_rope_sagesla", "norm_rope_sagesla_quantize")
def test_one_token_attends_to_itself_in_both_branches(name, provider, projected, pv, device):
    q, k, v = heads_at_the_edge(provider, 1, device)
    weight = torch.eye(128, device=device) if projected else None
    o = attend(name, provider, q, k, v, pv, weight)
    # The linear branch divides by 1e-5 + φ(q)·φ(k), and φ(q)·φ(k) is about 1/128.
    rounding = 2e-3 if v.dtype is not torch.bfloat16 else 1e-2
    if name.endswith("quantize"):
        rounding = 0.5 if truncates(provider, device) else 1 / 14
    expected = v.double() * (2 if projected else 1)
    torch.testing.assert_close(o.double(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "tq", "tk", "tv"])
@each_provider("attention_jvp")
def test_a_derivative_along_a_direction_with_outliers(name, provider, spoiled, device):
    names = ["q", "k", "v", "tq", "tk", "tv"]
    named = dict(zip(names, jvp_problem(1, 1, 70, 65, 32, torch.float32, device), strict=True))
    named[spoiled] = with_an_outlier(named[spoiled])
    _, moved = served(name, provider, *named.values())
    assert moved.isfinite().all()
    # An outlier of q or k moves the scores by 1e15, and nothing of it is left in the result.
    if spoiled not in ("q", "k"):
        assert relative_error(by_forward_mode(*named.values())[1], moved) < 1e-5


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "grad_o"])
@each_provider("block_sparse_attention_backward")
def test_gradients_with_outliers(name, provider, spoiled, device):
    """A query's weights sum to one, so the gradients of v sum to those of the result."""
    named = dict(zip(("q", "k", "v", "grad_o"), torch.rand(4, 1, 1, 129, 32, device=device) + 0.5))
    named[spoiled] = with_an_outlier(named[spoiled])
    *inputs, grad_o = named.values()
    grads = gradients(provider, inputs, every_block(grad_o), (64, 128), grad_o)
    assert all(x.isfinite().all() for x in grads)
    share = grads[2].sum(2) / grad_o.sum(2)
    assert (share <= 1.0001).all()
    # Scores of 1e15 are known to 1e8: a weight may then be 0 where it was 1.
    assert (share >= (0 if spoiled in ("q", "k") else 0.9999)).all()
