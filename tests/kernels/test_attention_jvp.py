"""attention_jvp(q, k, v, tq, tk, tv): dense attention and its derivative along a direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import heads_of_one_product
from tests.kernels.kernel_checks import assert_opcheck, provider_cases, relative_error, run_by
from turbo_opt.kernels import KernelError, OperatorInputError, attention_jvp, choose, explain

NAME = "attention_jvp"
# Triton's interpreter multiplies bfloat16 wrongly, so float16 stands for 16 bits on a CPU.
each_case = provider_cases(
    ("reference", torch.float64, 1e-13),
    ("reference", torch.float32, 1e-5),
    ("triton", torch.float32, 1e-5),
    ("triton", torch.float16, 3e-3),
)


def problem(batch, heads, queries, keys, head_dim, dtype, device, keys_move=True):
    """q, k, v and their directions; queries and keys of other tokens."""
    q, tq, _ = heads_of_one_product(batch, heads, queries, dtype, device, head_dim)
    k, v, tk = heads_of_one_product(batch, heads, keys, dtype, device, head_dim)
    tv, _, _ = heads_of_one_product(batch, heads, keys, dtype, device, head_dim)
    return (q, k, v, tq, tk, tv) if keys_move else (q, k, v, tq, None, None)


def by_forward_mode(q, k, v, tq, tk, tv):
    """o and to in float64, by torch's own forward-mode derivatives."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        heads = [
            x.double() if t is None else forward_ad.make_dual(x.double(), t.double())
            for x, t in ((q, tq), (k, tk), (v, tv))
        ]
        return tuple(forward_ad.unpack_dual(scaled_dot_product_attention(*heads)))


def assert_moves(provider, args, largest_error):
    expected = by_forward_mode(*args)
    for mine, theirs in zip(run_by(provider, NAME, *args), expected, strict=True):
        assert mine.dtype is args[0].dtype and mine.isfinite().all()
        error = relative_error(theirs, mine)
        assert error < largest_error, f"relative error {error:.2g}"


@each_case
@pytest.mark.parametrize("keys_move", [True, False])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "head_dim"),
    [
        (1, 1, 1, 2, 16),
        (2, 1, 33, 65, 32),  # the last tile of keys holds one token
        (1, 3, 129, 40, 64),  # so does that of queries
        (1, 1, 70, 130, 128),
    ],
)
def test_it_is_the_derivative_of_attention(
    provider, dtype, largest_error, batch, heads, queries, keys, head_dim, keys_move, device
):
    args = problem(batch, heads, queries, keys, head_dim, dtype, device, keys_move)
    assert_moves(provider, args, largest_error)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 600),
    keys=st.integers(1, 90),
    head_dim=st.sampled_from([1, 16, 80]),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    keys_move=st.booleans(),
)
def test_the_reference_at_any_size(queries, keys, head_dim, spread, keys_move):
    torch.manual_seed(queries * 1000 + keys)
    q, *rest = problem(1, 2, queries, keys, head_dim, torch.float64, "cpu", keys_move)
    args = (q * spread, *rest)
    for mine, theirs in zip(run_by("reference", NAME, *args), by_forward_mode(*args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@each_case
def test_one_key_moves_only_with_its_value(provider, dtype, largest_error, device):
    args = problem(1, 2, 40, 1, 16, dtype, device)
    _, to = run_by(provider, NAME, *args)
    assert relative_error(args[5].expand_as(to), to) < largest_error


@each_case
def test_scores_that_all_move_alike_move_nothing(provider, dtype, largest_error, device):
    q, k, v, *_ = problem(1, 1, 50, 90, 32, dtype, device)
    away = torch.randn(1, 1, 1, 32, dtype=dtype, device=device).expand_as(k)
    zero = torch.zeros_like(q)
    o, to = run_by(provider, NAME, q, k, v, zero, away, torch.zeros_like(k))
    assert to.norm() < largest_error * o.norm()


@each_case
def test_what_all_keys_have_in_common_costs_no_precision(provider, dtype, largest_error, device):
    q, k, v, tq, tk, tv = problem(1, 2, 64, 200, 64, dtype, device)
    offset = 20 * torch.randn(64, dtype=dtype, device=device)
    args = (q, k + offset, v, tq, tk + offset.flip(0), tv)
    # Taken with the offset, the products of 16 bits would be off by 0.005.
    assert_moves(provider, args, 1e-3 if dtype is torch.float16 else 10 * largest_error)


@each_case
def test_large_scores_leave_no_nan(provider, dtype, largest_error, device):
    q, k, v, *directions = problem(1, 1, 40, 70, 16, dtype, device)
    assert_moves(provider, (q * 40, k, v, *directions), 5 * largest_error)


@each_case
@pytest.mark.parametrize("shape", [(0, 2, 9, 16), (1, 2, 0, 16)])
def test_no_queries_give_nothing(provider, dtype, largest_error, shape, device):
    q = torch.zeros(shape, dtype=dtype, device=device)
    k = torch.zeros(shape[0], 2, 5, 16, dtype=dtype, device=device)
    assert all(x.shape == shape for x in run_by(provider, NAME, q, k, k, q, k, k))


def test_opcheck(device):
    args = problem(1, 2, 33, 20, 32, torch.float32, device)
    assert_opcheck(NAME, *args)
    assert_opcheck(NAME, *args[:4], None, None)


def test_it_has_no_gradient():
    q, k, v, tq, tk, tv = problem(1, 1, 5, 6, 16, torch.float32, "cpu")
    _, to = attention_jvp(q.clone().requires_grad_(), k, v, tq, tk, tv)
    with pytest.raises(KernelError, match="attention_jvp: it has no gradient"):
        to.sum().backward()


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    q = torch.empty(1, 2, 300, head_dim, dtype=dtype, device="meta")
    k = torch.empty(1, 2, 40, head_dim, dtype=dtype, device="meta")
    named = {"q": q, "k": k, "v": k, "tq": q, "tk": k, "tv": k}
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "provider"),
    [("sm80", "triton"), ("sm90", "triton"), ("sm75", "reference"), ("cpu", "reference")],
)
def test_choice_on_described_devices(device_name, provider):
    assert choose(NAME, device_name, *arguments()) == provider
    assert choose(NAME, device_name, *arguments(tk=None, tv=None)) == provider


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float64}, "sums are kept in float32"), ({"head_dim": 96}, "got 96")],
)
def test_what_triton_does_not_serve_is_explained(changes, reason):
    choice = explain(NAME, "sm90", *arguments(**changes))
    assert choice.provider == "reference" and reason in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tk": None}, "tk and tv must both be given, or both be None"),
        ({"tq": torch.ones(1, 2, 300, 128)}, "must share .* tq torch.float32"),
        ({"dtype": torch.int8}, "must share bfloat16, .* q torch.int8"),
        ({"tq": torch.ones(1, 2, 40, 128).bfloat16()}, r"tq must be \(B, H, L, D\) as q, .* tq"),
        ({"tv": torch.ones(1, 2, 300, 128).bfloat16()}, r"tv \(1, 2, 300, 128\)"),
        ({"k": torch.ones(2, 40, 128).bfloat16()}, r"k \(2, 40, 128\)"),
        ({"q": torch.ones(1, 3, 300, 128).bfloat16()}, r"q \(1, 3, 300, 128\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^attention_jvp: .*{message}"):
        attention_jvp(*arguments(**changes))


def test_no_keys_are_refused():
    q, k = torch.ones(1, 1, 3, 16), torch.ones(1, 1, 0, 16)
    with pytest.raises(OperatorInputError, match=r"at least one key, got k \(1, 1, 0, 16\)"):
        attention_jvp(q, k, k, q)


@pytest.mark.gpu
@pytest.mark.parametrize("keys_move", [True, False])
@pytest.mark.parametrize(
    ("dtype", "largest_error"),
    [(torch.bfloat16, 0.02), (torch.float16, 3e-3), (torch.float32, 1e-4)],
)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "head_dim"),
    [(1, 2, 2000, 2000, 128), (2, 3, 777, 512, 128), (1, 2, 1, 300, 64), (1, 1, 300, 1, 128)],
)
def test_16_bits_on_the_gpu(
    dtype, largest_error, batch, heads, queries, keys, head_dim, keys_move, device
):
    args = problem(batch, heads, queries, keys, head_dim, dtype, device, keys_move)
    if keys == 1 and not keys_move:
        o, to = run_by("triton", NAME, *args)
        assert to.norm() < largest_error * o.norm()
    else:
        assert_moves("triton", args, largest_error)
