"""norm_rope_sagesla(q, k, v) = sagesla(norm_rope(q), norm_rope(k), v)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import (
    BLOCKS,
    assert_attends,
    highest_blocks,
    linear_branch,
    masked_attention,
    normalized_and_turned,
    projection,
    rotation,
    sparse_linear,
    sparsity_on_meta,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by, skip_unless_served
from tests.kernels.test_sagesla import (
    COMPARED,
    DTYPES,
    GPU_SHAPES,
    LARGEST_LINEAR_ERROR,
    PROVIDERS,
    PV,
    SHAPES,
    largest_difference,
    largest_error,
)
from turbo_opt.kernels import OperatorInputError, choose, explain, norm_rope_sagesla

EPS = 1e-6


def parts_of_one_product(batch, heads, length, dtype, device):
    """q, k and v (B, L, H·D), and the norms' weights and the tables."""
    channels = heads * 128
    qkv = torch.randn(batch, length, 3 * channels, device=device, dtype=dtype)
    weights = 1 + torch.randn(2, channels, device=device) / 4
    return *qkv.split(channels, dim=-1), *weights, *rotation(length, device), EPS


def normalized_heads(q, k, v, q_weight, k_weight, cos, sin, eps):
    """What sagesla would be given, (B, H, L, D) float64."""
    q = normalized_and_turned(q, q_weight, cos, sin, eps).transpose(1, 2)
    k = normalized_and_turned(k, k_weight, cos, sin, eps).transpose(1, 2)
    return q, k, v.double().unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)


def flat(o_BHLD):
    return o_BHLD.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_sparse_branch_is_close_to_the_same_blocks_in_float(provider, pv, shape, device):
    *sizes, blocks, topk = shape
    projections = parts_of_one_product(*sizes, DTYPES[provider], device)
    q, k, v = normalized_heads(*projections)
    expected = flat(masked_attention(q, k, v, highest_blocks(q, k, topk, *blocks), *blocks))
    args = (*projections, None, None, topk, *blocks, "softmax", pv)
    bound = largest_error(provider, pv, device)
    assert_attends(expected, provider, "norm_rope_sagesla", args, bound)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_with_the_linear_branch_it_is_close_to_the_definition(provider, device):
    projections = parts_of_one_product(2, 1, 129, DTYPES[provider], device)
    rest = (*projection(device), 0.5, 64, 128, "softmax")
    expected = flat(sparse_linear(*normalized_heads(*projections), *rest))
    bound = largest_error(provider, "fp8", device)
    assert_attends(expected, provider, "norm_rope_sagesla", (*projections, *rest, "fp8"), bound)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", COMPARED, ids=str)
def test_triton_equals_the_reference(pv, shape, device):
    *sizes, blocks, topk = shape
    projections = parts_of_one_product(*sizes, torch.float16, device)
    args = (*projections, *projection(device), topk, *blocks, "softmax", pv)
    expected = run_by("reference", "norm_rope_sagesla", *args)
    assert_attends(expected, "triton", "norm_rope_sagesla", args, largest_difference(pv, device))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_the_linear_branch_is_what_the_projection_adds(provider, feature_map, device):
    q, k, v, *rest = parts_of_one_product(1, 1, 70, DTYPES[provider], device)
    v = v + 2  # else it is much smaller than the sum that it is read from
    weight, _ = projection(device)
    with_branch, without = (
        run_by(
            provider, "norm_rope_sagesla", q, k, v, *rest, each, None, 0.5, 64, 128, feature_map,
            "fp8",
        ).double()
        for each in (weight, None)
    )  # fmt: skip
    branch = linear_branch(*normalized_heads(q, k, v, *rest), feature_map)
    expected = flat(branch @ weight.double().T)
    assert relative_error(expected, with_branch - without) < LARGEST_LINEAR_ERROR


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_is_sagesla_of_norm_rope_without_weights_too(provider, device):
    """In float32 nothing is rounded in between; in 16 bits the composition rounds once more."""
    q, k, v, _, _, cos, sin, _ = parts_of_one_product(1, 2, 130, DTYPES[provider], device)
    turned = (run_by("reference", "norm_rope", x, None, cos, sin, EPS) for x in (q, k))
    heads = [x.transpose(1, 2) for x in (*turned, v.unflatten(-1, (2, 128)))]
    rest = (None, None, 0.5, 64, 128, "softmax", "16bit")
    expected = flat(run_by("reference", "sagesla", *heads, *rest))
    args = (q, k, v, None, None, cos, sin, EPS, *rest)
    bound = 1e-5 if provider == "reference" else 0.01
    assert_attends(expected, provider, "norm_rope_sagesla", args, bound)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dense_inputs_a_strided_one_and_contiguous_tables(provider, device):
    projections = list(parts_of_one_product(1, 2, 70, DTYPES[provider], device))
    rest = (None, None, 1.0, 64, 128, "softmax", "16bit")
    expected = run_by(provider, "norm_rope_sagesla", *projections, *rest)
    projections[0] = projections[0].contiguous()
    projections[1] = projections[1].mT.contiguous().mT  # tokens lie together, not channels
    projections[5] = projections[5].contiguous()  # cos; sin keeps its strides
    o = run_by(provider, "norm_rope_sagesla", *projections, *rest)
    torch.testing.assert_close(o, expected, rtol=0, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
def test_zeros_and_huge_outliers_leave_no_nan(provider, pv, device):
    q, k, v, *rest = (
        x.clone() if isinstance(x, torch.Tensor) else x
        for x in parts_of_one_product(1, 1, 100, DTYPES[provider], device)
    )
    huge = 6e4 if provider == "triton" else 1e15
    for token, x in enumerate((q, k, v)):
        x[0, token, 5] = huge
        x[0, 64:] = 0
    args = (q, k, v, *rest, *projection(device), 1.0, 64, 128, "softmax", pv)
    assert run_by(provider, "norm_rope_sagesla", *args).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("batch", "length"), [(0, 70), (1, 0)])
def test_no_tokens_give_no_tokens(provider, batch, length, device):
    projections = parts_of_one_product(batch, 2, length, torch.float16, device)
    args = (*projections, *projection(device), 0.5, 64, 128, "softmax", "fp8")
    assert run_by(provider, "norm_rope_sagesla", *args).shape == (batch, length, 256)


def test_opcheck(device):
    projections = parts_of_one_product(1, 1, 70, torch.float16, device)
    args = (*projections, *projection(device), 0.5, 64, 128, "softmax", "fp8")
    assert_opcheck("norm_rope_sagesla", *args)


def arguments(dtype=torch.bfloat16, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    q = torch.empty(1, 300, 256, dtype=dtype, device="meta")
    table = torch.empty(1, 300, 1, 64, device="meta")
    named = {
        "q": q,
        "k": q,
        "v": q,
        "q_weight": torch.empty(256, device="meta"),
        "k_weight": None,
        "cos": table,
        "sin": table,
        "eps": EPS,
        **sparsity_on_meta(128, 64, 128),
        "pv": "fp8",
    }
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "changes", "provider"),
    [
        ("sm90", {}, "cuda"),
        ("sm90", {"proj_weight": None, "proj_bias": None}, "cuda"),
        ("sm90", {"dtype": torch.float16}, "triton"),
        ("sm90", {"pv": "16bit"}, "triton"),
        ("sm90", {"block_k": 64}, "triton"),
        ("sm90", {"dtype": torch.float32}, "reference"),
        ("sm89", {}, "triton"),
        ("sm120", {}, "triton"),
        ("sm80", {}, "reference"),
        ("sm80", {"pv": "16bit"}, "triton"),
        ("cpu", {}, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, provider):
    assert choose("norm_rope_sagesla", device_name, *arguments(**changes)) == provider


def test_a_gpu_without_fp8_is_refused_with_the_reason():
    choice = explain("norm_rope_sagesla", "sm80", *arguments())
    assert choice.passed_over["triton"] == "pv='fp8' needs sm89 or newer"
    assert "sm90's tensor cores" in choice.passed_over["cuda"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(300, 256).bfloat16()}, "x must have 3 dimensions"),
        ({"v": torch.ones(1, 300, 256).double()}, "x must be bfloat16, float16 or float32"),
        ({"k": torch.ones(1, 300, 256)}, "q, k and v must share"),
        ({"v": torch.ones(1, 300, 128).bfloat16()}, r"must be \(B, H, L, D\) alike"),
        ({"q_weight": torch.ones(128)}, r"weight must have shape \(256,\)"),
        ({"k_weight": torch.ones(256).half()}, "weight must be float32 or torch.bfloat16"),
        ({"cos": torch.ones(1, 299, 1, 64)}, r"cos must be float32 of shape \(1, 300, 1"),
        ({"sin": torch.ones(1, 300, 1, 32)}, "sin must be float32 of shape"),
        ({"proj_weight": None}, "proj_bias is given without proj_weight"),
        ({"proj_bias": torch.ones(256)}, r"proj_bias must be \(128,\)"),
        ({"topk": 2.0}, "topk must be above 0 and at most 1, got 2.0"),
        ({"block_k": 1}, "block_k must be 64 or 128, got 1"),
        ({"feature_map": "reluu"}, "'reluu': did you mean 'relu'"),
        ({"pv": "bf16"}, "pv must be 'fp8' or '16bit', got 'bf16'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^norm_rope_sagesla: .*{message}"):
        norm_rope_sagesla(*arguments(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("batch", "length", "heads", "topk"), GPU_SHAPES)
def test_bfloat16_on_the_gpu(provider, projected, blocks, batch, length, heads, topk, device):
    projections = parts_of_one_product(batch, heads, length, torch.bfloat16, device)
    weight, bias = projection(device) if projected else (None, None)
    args = (*projections, weight, bias, topk, *blocks, "softmax", "fp8")
    skip_unless_served("norm_rope_sagesla", provider, *args)
    expected = run_by("reference", "norm_rope_sagesla", *args)
    bound = 0.02 if projected else 0.03
    assert_attends(expected, provider, "norm_rope_sagesla", args, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
def test_a_captured_graph_replays_to_the_same_bits(provider, device):
    projections = parts_of_one_product(2, 2, 777, torch.bfloat16, device)
    args = (*projections, *projection(device), 0.4, 64, 128, "softmax", "fp8")
    skip_unless_served("norm_rope_sagesla", provider, *args)

    def step():
        return run_by(provider, "norm_rope_sagesla", *args)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for _ in range(2):
        args[0].normal_()
        graph.replay()
        assert torch.equal(o, step())
