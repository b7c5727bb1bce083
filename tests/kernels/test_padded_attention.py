"""padded_attention: a prompt's padding is computed once, and counts as often as it stands there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import heads_of_one_product
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import (
    OperatorInputError,
    ProviderError,
    choose,
    force_provider,
    operator,
    padded_attention,
)
from turbo_opt.kernels._cuda.padded_attention import VARIANT, on_whole_chunks

# bfloat16 fails in Triton's interpreter. P is rounded to 16 bits there, nowhere in the reference.
DTYPES = {"reference": torch.float32, "triton": torch.float16}
LARGEST_ERROR = {"reference": 2e-6, "triton": 2e-3}
STARTS = [0, 1, 30, 31, 32, 98]  # of 99 keys; tiles have 32


def problem(dtype, device, *, starts, keys=99, queries=130, heads=2, head_dim=128):
    """q, k and v that repeat one token from `starts` on, and `starts` as the operator takes it."""
    q, _, _ = heads_of_one_product(len(starts), heads, queries, dtype, device, head_dim)
    _, k, v = heads_of_one_product(len(starts), heads, keys, dtype, device, head_dim)
    for batch, start in enumerate(starts):
        for x in (k, v):
            x[batch, :, start:] = x[batch, :, start : start + 1].clone()
    return q, k, v, torch.tensor(starts, dtype=torch.int32, device=device)


def exact(q, k, v, scale=None):
    return scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


@pytest.mark.parametrize("provider", DTYPES)
@pytest.mark.parametrize("start", STARTS)
def test_it_equals_attention_to_every_copy(provider, start, device):
    q, k, v, starts = problem(DTYPES[provider], device, starts=[start])
    result = run_by(provider, "padded_attention", q, k, v, starts, None)
    assert relative_error(exact(q, k, v), result) < LARGEST_ERROR[provider]


@pytest.mark.parametrize("provider", DTYPES)
def test_batch_elements_are_padded_apart_and_the_scale_is_theirs_to_choose(provider, device):
    q, k, v, starts = problem(DTYPES[provider], device, starts=[3, 70], head_dim=64)
    result = run_by(provider, "padded_attention", q, k, v, starts, 0.3)
    assert relative_error(exact(q, k, v, 0.3), result) < LARGEST_ERROR[provider]


@pytest.mark.parametrize("provider", DTYPES)
def test_the_last_token_alone_stands_for_the_padding(provider, device):
    q, k, v, starts = problem(DTYPES[provider], device, starts=[40])
    expected = run_by(provider, "padded_attention", q, k, v, starts, None)
    for x in (k, v):
        x[:, :, 40:-1] = float("nan") if provider == "triton" else 7.0
    assert torch.equal(run_by(provider, "padded_attention", q, k, v, starts, None), expected)


@pytest.mark.parametrize("provider", DTYPES)
def test_one_start_may_be_expanded_to_a_batch(provider, device):
    q, k, v, starts = problem(DTYPES[provider], device, starts=[40, 40, 40])
    expected = run_by(provider, "padded_attention", q, k, v, starts, None)
    one = torch.tensor([[40, 0]], dtype=torch.int32, device=device)[:, 0].expand(3)
    assert torch.equal(run_by(provider, "padded_attention", q, k, v, one, None), expected)


@pytest.mark.parametrize("provider", DTYPES)
def test_one_query_and_one_key(provider, device):
    q, k, v, starts = problem(DTYPES[provider], device, starts=[0], keys=1, queries=1)
    result = run_by(provider, "padded_attention", q, k, v, starts, None)
    torch.testing.assert_close(result, v.expand_as(result))


@settings(max_examples=25, deadline=None)
@given(keys=st.integers(1, 40), data=st.data())
def test_the_reference_counts_the_copies_for_any_number_of_keys(keys, data):
    start = data.draw(st.integers(0, keys - 1))
    q, k, v, starts = problem(
        torch.float32,
        torch.device("cpu"),
        starts=[start],
        keys=keys,
        queries=5,
        heads=1,
        head_dim=8,
    )
    result = run_by("reference", "padded_attention", q, k, v, starts, None)
    assert relative_error(exact(q, k, v), result) < LARGEST_ERROR["reference"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("provider", "dtype"),
    [("triton", torch.float16), ("triton", torch.bfloat16), ("cuda", torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("queries", "start"), [(32760, 120), (777, 511), (777, 447), (777, 448), (300, 0), (64, 63)]
)
def test_16_bits_on_the_gpu(provider, dtype, queries, start):
    shape = {"keys": 512, "queries": queries, "heads": 3}
    q, k, v, starts = problem(dtype, torch.device("cuda"), starts=[start], **shape)
    result = run_by(provider, "padded_attention", q, k, v, starts, None)
    assert relative_error(exact(q, k, v), result) < (0.006 if dtype is torch.bfloat16 else 0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("starts", [[3, 70], [511, 0], [0, 511, 200]], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3, -0.05, 0.0])
def test_cuda_takes_batches_and_any_scale(starts, scale):
    shape = {"keys": 512, "queries": 1000, "heads": 5}
    q, k, v, start = problem(torch.bfloat16, torch.device("cuda"), starts=starts, **shape)
    result = run_by("cuda", "padded_attention", q, k, v, start, scale)
    assert relative_error(exact(q, k, v, scale), result) < 0.006


@pytest.mark.gpu
def test_cuda_reads_the_last_token_alone_and_any_strides():
    q, k, v, start = problem(torch.bfloat16, torch.device("cuda"), starts=[40], keys=99)
    expected = run_by("cuda", "padded_attention", q, k, v, start, None)
    for x in (k, v):
        x[:, :, 40:-1] = float("nan")
    assert torch.equal(run_by("cuda", "padded_attention", q, k, v, start, None), expected)
    apart = [torch.randn(*x.shape[:3], 2 * 128 + 4).bfloat16().cuda() for x in (q, k, v)]
    for wide, x in zip(apart, (q, k, v), strict=True):
        wide[..., 3:131] = x
    found = run_by("cuda", "padded_attention", *(x[..., 3:131] for x in apart), start, None)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e6, 1e15])
def test_cuda_takes_scores_of_any_size(size):
    q, k, v, start = problem(torch.bfloat16, torch.device("cuda"), starts=[98])
    q[:, :, 5, 7], k[:, :, 9, 7] = size, size
    expected = run_by("reference", "padded_attention", q, k, v, start, None)
    result = run_by("cuda", "padded_attention", q, k, v, start, None)
    assert relative_error(expected, result) < 0.006


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "reason"),
    [
        ("sm90", 64, torch.bfloat16, "heads of 128 channels, not 64"),
        ("sm90", 128, torch.float16, "takes bfloat16, not torch.float16"),
        ("sm80", 128, torch.bfloat16, "written for sm90"),
        ("sm100", 128, torch.bfloat16, "written for sm90"),
    ],
)
def test_what_cuda_leaves_to_others(device, head_dim, dtype, reason):
    arguments = problem(
        dtype, torch.device("cpu"), starts=[1], keys=2, queries=2, head_dim=head_dim
    )
    passed_over = operator("padded_attention").choose(device, *arguments, None).passed_over
    with force_provider({"padded_attention": "cuda"}), pytest.raises(ProviderError, match=reason):
        choose("padded_attention", device, *arguments, None)
    assert "cuda" in passed_over


def test_the_tiles_of_a_program_fit_into_hopper():
    assert VARIANT.shared_bytes + 1024 <= 232448  # and what a program takes for itself


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(1, 40, 2, 128).bfloat16().transpose(1, 2), False),
        (torch.zeros(1, 2, 40, 132).bfloat16()[..., :128], True),
        (torch.zeros(1, 2, 40, 136).bfloat16()[..., :128], False),
        (torch.zeros(1, 2, 128, 40).bfloat16().mT, True),
        (torch.zeros(1, 1, 1, 129).bfloat16()[..., 1:], True),
    ],
)
def test_rows_that_do_not_begin_on_16_bytes_are_copied(x, copied):
    whole = on_whole_chunks(x)
    assert torch.equal(whole, x) and (whole.data_ptr() != x.data_ptr()) == copied
    assert whole.stride(-1) == 1 and whole.data_ptr() % 16 == 0


def test_the_operator_is_sound(device):
    assert_opcheck(
        "padded_attention", *problem(torch.float16, device, starts=[3], keys=9, queries=5), None
    )


@pytest.mark.parametrize(
    ("device", "dtype", "provider"),
    [
        ("sm90", torch.bfloat16, "cuda"),
        ("sm90", torch.float16, "triton"),
        ("sm80", torch.float16, "triton"),
        ("sm90", torch.float32, "reference"),
        ("sm75", torch.float16, "reference"),
        ("cpu", torch.bfloat16, "reference"),
    ],
)
def test_who_serves(device, dtype, provider):
    arguments = problem(dtype, torch.device("cpu"), starts=[1], keys=2, queries=2)
    assert choose("padded_attention", device, *arguments, None) == provider


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(1, 2, 9, 64)}, "k and v must be"),
        ({"v": torch.ones(1, 2, 9, 128).half()}, "must share"),
        ({"start": torch.zeros(1)}, r"start must be \(B,\) int32"),
        ({"start": torch.zeros(2, dtype=torch.int32)}, r"start must be \(B,\) int32"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"k": torch.ones(1, 2, 0, 128), "v": torch.ones(1, 2, 0, 128)}, "at least one key"),
    ],
)
def test_what_is_refused(changes, message):
    heads = torch.ones(1, 2, 9, 128)
    arguments = {
        "q": heads, "k": heads, "v": heads, "start": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(OperatorInputError, match=message):
        padded_attention(**{**arguments, **changes})
