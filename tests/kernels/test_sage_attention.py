"""sage_attention: dense attention to any number of keys, q·kᵀ in int8 and P·v in e4m3."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import (
    assert_attends,
    heads_of_one_product,
    with_8_bit_operands,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by, skip_unless_served
from turbo_opt.kernels import OperatorInputError, choose, explain, sage_attention

# Relative to attention in float64: int8 alone, and with P and v in e4m3.
LARGEST_ERROR = {"16bit": 0.02, "fp8": 0.05}
SDPA_ERROR = 0.005  # of attention in 16 bits
TRUNCATED = 2  # times as much where Triton's interpreter truncates to fp8 instead of rounding
# Triton against the reference: P is rounded relative to the maximum so far, not the final one.
LARGEST_DIFFERENCE = {"16bit": 0.002, "fp8": 0.03}
# bfloat16 fails in the interpreter
DTYPES = {"reference": torch.float32, "triton": torch.float16, "sdpa": torch.float16}
PROVIDERS = list(DTYPES)
QUANTIZED = ["reference", "triton"]
PV = list(LARGEST_ERROR)
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.json"
SHAPES = [  # batch, heads, queries, keys, head dimension
    (1, 1, 1, 1, 128),
    (1, 2, 1, 150, 128),
    (1, 2, 129, 1, 64),
    (2, 1, 40, 129, 128),  # the last key block holds one token
    (1, 1, 130, 77, 64),  # the last query block holds two
]


def problem(shape, dtype, device):
    """q, and k and v of other tokens, as a model's projections give them."""
    batch, heads, queries, keys, head_dim = shape
    q, _, _ = heads_of_one_product(batch, heads, queries, dtype, device, head_dim)
    _, k, v = heads_of_one_product(batch, heads, keys, dtype, device, head_dim)
    return q, k, v


def exact(q, k, v, scale=None):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


def truncates(pv, device):
    return pv == "fp8" and device.type == "cpu"


def largest_error(provider, pv, device):
    if provider == "sdpa":
        return SDPA_ERROR
    truncated = provider == "triton" and truncates(pv, device)
    return LARGEST_ERROR[pv] * (TRUNCATED if truncated else 1)


def largest_difference(pv, device):
    return LARGEST_ERROR[pv] * TRUNCATED if truncates(pv, device) else LARGEST_DIFFERENCE[pv]


@pytest.fixture
def launch():
    from turbo_opt.kernels._triton.attention import launch  # imports Triton

    return launch


@pytest.fixture
def tiles_of_128_keys(launch, device):
    if launch._dense_key_block(device) != 128:
        pytest.skip("on this GPU 64 keys share a scale, in the reference 128")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_query_attends_to_every_key(provider, pv, shape, device):
    q, k, v = problem(shape, DTYPES[provider], device)
    args = (q, k, v, None, pv)
    assert_attends(
        exact(q, k, v), provider, "sage_attention", args, largest_error(provider, pv, device)
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 700),
    keys=st.integers(1, 400),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    pv=st.sampled_from(PV),
)
def test_the_reference_is_close_at_any_number_of_tokens(queries, keys, head_dim, spread, pv):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    q, k, v = (
        torch.randn(1, 2, tokens, head_dim, generator=generator) for tokens in (queries, keys, keys)
    )
    o = run_by("reference", "sage_attention", q * spread, k, v, None, pv)
    # A single query's e4m3 errors do not average out.
    assert relative_error(exact(q * spread, k, v), o) < LARGEST_ERROR[pv] * 1.25


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize(("queries", "keys"), [(1, 150), (70, 1), (40, 257)])
def test_the_reference_rounds_q_k_p_and_v_as_documented(queries, keys, scale, device):
    q, k, v = problem((1, 1, queries, keys, 128), torch.float32, device)
    every = torch.ones(1, -(-keys // 128), dtype=torch.bool, device=device)
    expected = with_8_bit_operands(q[0, 0], k[0, 0], v[0, 0], every, queries, 128, scale)
    args = (q, k, v, scale, "fp8")
    # Values beside the middle of two codes fall to either side in float32.
    assert_attends(expected[None, None], "reference", "sage_attention", args, 2e-3)


@pytest.mark.parametrize("provider", QUANTIZED)
@pytest.mark.parametrize("pv", PV)
@pytest.mark.usefixtures("tiles_of_128_keys")
def test_it_is_sagesla_with_every_block_kept(provider, pv, device):
    q, k, v = heads_of_one_product(1, 1, 200, DTYPES[provider], device)
    sparse = run_by(provider, "sagesla", q, k, v, None, None, 1.0, 64, 128, "softmax", pv)
    dense = run_by(provider, "sage_attention", q, k, v, None, pv)
    # The same formats and blocks; the reference sums padded blocks, a GPU other tiles of queries.
    assert relative_error(sparse, dense) < (1e-5 if provider == "reference" else 2e-3)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", [(2, 1, 70, 129, 128), (1, 1, 130, 257, 64)], ids=str)
@pytest.mark.usefixtures("tiles_of_128_keys")
def test_triton_equals_the_reference(pv, shape, device):
    q, k, v = problem(shape, torch.float16, device)
    args = (q, k, v, 0.1, pv)
    expected = run_by("reference", "sage_attention", *args)
    assert_attends(expected, "triton", "sage_attention", args, largest_difference(pv, device))


@pytest.mark.parametrize("pv", PV)
def test_every_way_to_launch_gives_the_same(pv, launch, device, monkeypatch):
    q, k, v = problem((1, 1, 130, 150, 128), torch.float16, device)
    o = torch.empty_like(q)
    results = {}

    def take_each(problem, configs, start):
        for config in configs:
            start(config)
            results[config] = o.clone()
        return configs[0]

    monkeypatch.setattr(launch, "fastest", take_each)
    launch.dense_attention(q, k, v, o, fp8=pv == "fp8")
    assert {config.queries for config in results} == {64, 128}
    assert {config.tma for config in results} == ({True, False} if pv == "fp8" else {False})
    for result in results.values():
        torch.testing.assert_close(result, o, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("pv", PV)
def test_keys_in_tiles_of_64_are_as_close(pv, launch, device, monkeypatch):
    monkeypatch.setattr(launch, "_dense_key_block", lambda device: 64)
    q, k, v = problem((1, 1, 70, 150, 128), torch.float16, device)
    args = (q, k, v, None, pv)
    assert_attends(
        exact(q, k, v), "triton", "sage_attention", args, largest_error("triton", pv, device)
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_all_keys_share_costs_no_accuracy(provider, device):
    """Softmax does not see it, and smoothing takes it away before rounding to int8."""
    q, k, v = problem((1, 1, 40, 130, 128), DTYPES[provider], device)
    k = k + 20 * torch.randn(128, device=device, dtype=k.dtype)
    args = (q, k, v, None, "16bit")
    assert_attends(exact(q, k, v), provider, "sage_attention", args, LARGEST_ERROR["16bit"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
def test_outlying_channels_and_tokens_cost_little(provider, pv, device):
    q, k, v = problem((1, 2, 60, 140, 128), DTYPES[provider], device)
    q[:, :, 3] *= 8  # a scale for each token, but its scores' errors are 8 times as large
    v[..., 7] *= 50  # a scale for each channel
    largest = max(LARGEST_ERROR["fp8"], largest_error(provider, pv, device))
    args = (q, k, v, None, pv)
    assert_attends(exact(q, k, v), provider, "sage_attention", args, largest)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pv", PV)
def test_equal_tokens_and_zeros_give_their_value(provider, pv, device):
    for value in (0.0, 1.5):
        q = torch.full((1, 1, 70, 128), value, device=device, dtype=DTYPES[provider])
        o = run_by(provider, "sage_attention", q, q[:, :, :65], q[:, :, :65], None, pv)
        torch.testing.assert_close(o, q, rtol=1e-3, atol=0)


@pytest.mark.parametrize("provider", QUANTIZED)
@pytest.mark.parametrize("pv", PV)
def test_huge_outliers_leave_no_nan(provider, pv, device):
    q, k, v = problem((1, 1, 70, 140, 128), DTYPES[provider], device)
    huge = 6e4 if provider == "triton" else 1e15
    for token, x in enumerate((q, k, v)):
        x[0, 0, token, 5] = huge
    k[0, 0, 66] = -huge / 2
    assert run_by(provider, "sage_attention", q, k, v, None, pv).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_any_strides_are_served(provider, device):
    shape = (1, 128, 2, 70)  # channels before heads and tokens
    q, k, v = (torch.randn(shape, device=device, dtype=DTYPES[provider]) for _ in range(3))
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    args = (q, k, v, None, "16bit")
    assert_attends(exact(q, k, v), provider, "sage_attention", args, LARGEST_ERROR["16bit"])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", [(0, 2, 70, 128), (1, 2, 0, 128)])
def test_no_queries_give_no_result(provider, shape, device):
    q = torch.randn(shape, device=device, dtype=torch.float16)
    k = torch.randn(shape[0], 2, 70, 128, device=device, dtype=torch.float16)
    assert run_by(provider, "sage_attention", q, k, k, None, "fp8").shape == shape


def test_opcheck(device):
    q, k, v = problem((1, 1, 20, 33, 64), torch.float16, device)
    assert_opcheck("sage_attention", q, k, v, None, "fp8")


def arguments(queries=32760, keys=32760, dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    k = torch.empty(1, 2, keys, head_dim, dtype=dtype, device="meta")
    named = {
        "q": torch.empty(1, 2, queries, head_dim, dtype=dtype, device="meta"),
        "k": k,
        "v": k,
        "scale": None,
        "pv": "fp8",
    }
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "changes", "provider"),
    [
        ("sm90", {}, "triton"),
        ("sm90", {"head_dim": 64}, "triton"),
        ("sm90", {"pv": "16bit"}, "triton"),
        ("sm90", {"keys": 512}, "sdpa"),  # the prompt
        ("sm90", {"keys": 2047}, "sdpa"),
        ("sm90", {"keys": 2048}, "triton"),
        ("sm90", {"queries": 100}, "sdpa"),
        ("sm90", {"dtype": torch.float32}, "sdpa"),
        ("sm90", {"head_dim": 80}, "sdpa"),
        ("sm89", {"keys": 512}, "triton"),
        ("sm89", {"keys": 257}, "sdpa"),
        ("sm120", {}, "triton"),
        ("sm100", {}, "sdpa"),
        ("sm80", {"pv": "16bit"}, "triton"),
        ("sm80", {}, "sageattention"),
        ("sm75", {"pv": "16bit"}, "sdpa"),
        ("cpu", {}, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, provider):
    assert choose("sage_attention", device_name, *arguments(**changes)) == provider


def test_on_an_h200_the_choice_is_what_was_measured_to_be_faster():
    milliseconds: dict[tuple[int, int], dict[str, float]] = {}
    for record in json.loads(RECORDS.read_text()):
        shape = re.fullmatch(r"h200/sage_attention/(?:\w+/)?\d+x(\d+)x(\d+)_ms", record["name"])
        if shape is not None:
            times = milliseconds.setdefault((int(shape[1]), int(shape[2])), {})
            times[record["config"]["provider"]] = record["value"]
    assert {512, 32760} <= {keys for _, keys in milliseconds}
    for (queries, keys), times in milliseconds.items():
        assert {"triton", "sdpa"} <= times.keys()
        chosen = choose("sage_attention", "sm90", *arguments(queries, keys))
        assert chosen == min(times, key=times.__getitem__)


def test_what_is_not_served_is_explained():
    reasons = explain("sage_attention", "sm80", *arguments()).passed_over
    assert reasons["triton"] == "pv='fp8' needs sm89 or newer"
    odd = explain("sage_attention", "sm90", *arguments(head_dim=80)).passed_over
    assert "64 or 128 channels wide, got a head dimension of 80" in odd["triton"]
    assert "heads of 64 or 128 channels, got 80" in odd["sageattention"]
    whole = explain("sage_attention", "sm90", *arguments(pv="16bit")).passed_over
    assert "pv='16bit' asks for 16 bits" in whole["sageattention"]
    few = explain("sage_attention", "sm90", *arguments(keys=8191)).passed_over
    assert "63 keys of zero beyond the last, too many for fewer than 8192" in few["sageattention"]
    assert "63 keys" not in str(explain("sage_attention", "sm90", *arguments(keys=8192)))
    other = explain("sage_attention", "sm100", *arguments()).passed_over
    assert other["sageattention"] == "its kernels are for sm80, sm86, sm89, sm90, sm120"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(1, 2, 300, 128)}, "q, k and v must share"),
        ({"v": torch.ones(1, 2, 9, 128).bfloat16()}, r"k and v must be \(B, H, Lk, D\) alike"),
        ({"head_dim": 64, "q": torch.ones(1, 2, 9, 128).bfloat16()}, r"k \(1, 2, 32760, 64\)"),
        ({"q": torch.ones(2, 9, 128).bfloat16()}, r"got q \(2, 9, 128\)"),
        ({"keys": 0}, r"at least one key, got k \(1, 2, 0, 128\)"),
        ({"scale": float("nan")}, "scale must be finite, or None for 1/√D, got nan"),
        ({"pv": "fp16"}, "pv must be 'fp8' or '16bit', got 'fp16'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^sage_attention: .*{message}"):
        sage_attention(*arguments(**changes))


@pytest.fixture
def third_party(monkeypatch):
    """The provider's module, with a stand-in for the package that behaves as its release 1.0.6."""

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        assert (tensor_layout, is_causal) == ("NHD", False)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        k -= k.mean(1, keepdim=True)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        o = scaled_dot_product_attention(*heads, scale=sm_scale)
        return o.transpose(1, 2).contiguous()

    package = ModuleType("sageattention")
    package.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", package)
    name = "turbo_opt.kernels.sage_attention.third_party"
    known = sys.modules.pop(name, None)
    yield importlib.import_module(name)
    del sys.modules[name]
    if known is not None:
        sys.modules[name] = known


@pytest.mark.parametrize("layout", ["heads together", "channels apart"])
def test_the_package_sageattention_gets_what_it_takes_and_spoils_nothing(layout, third_party):
    q, k, v = problem((2, 2, 40, 30, 64), torch.float32, torch.device("cpu"))
    if layout == "channels apart":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    before = k.clone()
    o = third_party.sage_attention(q, k, v, 0.3, "fp8")
    assert torch.equal(k, before)
    assert relative_error(exact(q, k, v, 0.3), o) < 1e-5
    assert o.stride() == sage_attention(*(x.to("meta") for x in (q, k, v))).stride()
    assert third_party.sage_attention(q[:, :, :0], k, v, None, "fp8").shape == (2, 2, 0, 64)


GPU_SHAPES = [
    (2, 3, 777, 777, 128),
    (1, 2, 2000, 512, 128),
    (1, 2, 5000, 257, 64),
    (1, 2, 1, 4000, 128),
    (1, 1, 129, 1, 128),
    (1, 2, 300, 8200, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["triton", "sageattention", "sdpa"])
@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_bfloat16_on_the_gpu(provider, pv, shape, device):
    q, k, v = problem(shape, torch.bfloat16, device)
    args = (q, k, v, None, pv)
    skip_unless_served("sage_attention", provider, *args)
    assert_attends(
        exact(q, k, v), provider, "sage_attention", args, largest_error(provider, pv, device)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pv", PV)
def test_eight_bits_add_no_more_than_their_rounding_to_that_of_sixteen(pv, device):
    q, k, v = problem((1, 2, 4096, 4096, 128), torch.bfloat16, device)
    k = k + 3 * torch.randn(128, device=device, dtype=k.dtype)
    args = (q, k, v, None, pv)
    skip_unless_served("sage_attention", "triton", *args)
    expected = exact(q, k, v)
    sixteen, eight = (
        relative_error(expected, run_by(provider, "sage_attention", *args))
        for provider in ("sdpa", "triton")
    )
    assert eight < sixteen + LARGEST_ERROR[pv]
