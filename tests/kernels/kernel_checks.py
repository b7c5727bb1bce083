"""What the kernel tests share: running by a provider, and judging the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from turbo_opt.kernels import force_provider, operator

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Rounding a result once, relative step 2⁻⁸, 2⁻¹¹ or 2⁻²⁴, leaves about 55, 73 and 150 dB, and the
# float32 arithmetic before it about 130. Triton's interpreter truncates to bfloat16: 6 dB less.
LEAST_SQNR_DB = {torch.float32: 115.0, torch.float16: 68.0, torch.bfloat16: 44.0}

# Who serves a quantizing kernel of Triton's where there is no CUDA one: (device, scheme, provider).
TRITON_CHOICES = [
    ("sm89", "fp8-block", "triton"),
    ("sm80", "fp8-block", "reference"),
    ("sm80", "int8-block", "triton"),
    ("cpu", "int8-block", "reference"),
]


def provider_cases(*cases: tuple[str, torch.dtype, float]) -> pytest.MarkDecorator:
    """Run a test with `provider`, `dtype` and `largest_error` of each case."""
    names = [f"{provider}-{dtype}" for provider, dtype, _ in cases]
    return pytest.mark.parametrize(("provider", "dtype", "largest_error"), cases, ids=names)


def each_provider(*names: str) -> pytest.MarkDecorator:
    """Run a test with `name` and `provider` of each operator; CUDA's on a GPU."""
    cases = [
        pytest.param(name, provider, marks=[pytest.mark.gpu] if provider == "cuda" else [])
        for name in names
        for provider in operator(name).provider_names()
    ]
    return pytest.mark.parametrize(("name", "provider"), cases)


def modulation(kind: str, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random gain or bias for x of (B, L, C): "shared", "per batch" or "per token"."""
    batch, length, channels = x.shape
    shape = {"shared": (1, 1), "per batch": (batch, 1), "per token": (batch, length)}[kind]
    return torch.randn(*shape, channels, device=x.device, dtype=dtype)


def sqnr_db(exact: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB; NaN if anything is NaN."""
    exact, actual = exact.double(), actual.double()
    noise = (exact - actual).norm()
    return float("inf") if noise == 0 else (20 * torch.log10(exact.norm() / noise)).item()


def relative_error(exact: torch.Tensor, actual: torch.Tensor) -> float:
    exact, actual = exact.double(), actual.double()
    return ((exact - actual).norm() / exact.norm()).item()


def run_by(provider: str, name: str, *args: Any) -> Any:
    """The operator's result by that provider; its layout must be the one the fake announces."""
    op = getattr(torch.ops.turbo_opt, name).default
    with force_provider({name: provider}):
        result = op(*args)
    announced = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for real, fake in zip(_as_tuple(result), _as_tuple(announced), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    return result


def skip_unless_served(name: str, provider: str, *args: Any) -> None:
    """Skip, with the reason, where that provider does not serve the call."""
    reason = operator(name).choose(args[0].device, *args).passed_over.get(provider, "works")
    if not reason.startswith("works"):
        pytest.skip(f"{provider}: {reason}")


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _opcheck_tests(args: tuple[Any, ...]) -> list[str]:
    """All of them, but that torch's schema test cannot compare fp8 inputs with themselves."""
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    fp8 = any(isinstance(a, torch.Tensor) and a.dtype is torch.float8_e4m3fn for a in args)
    return tests if fp8 else ["test_schema", *tests]


def assert_opcheck(name: str, *args: Any) -> None:
    """torch's own checks of schema, fake tensors and tracing, by every provider that can run."""
    op = getattr(torch.ops.turbo_opt, name).default
    for provider in operator(name).provider_names():
        if provider in operator(name).choose(args[0].device, *args).passed_over:
            reason = operator(name).choose(args[0].device, *args).passed_over[provider]
            if not reason.startswith("works"):
                continue
        with force_provider({name: provider}):
            torch.library.opcheck(op, args, test_utils=_opcheck_tests(args))


def in_halves(provider: str, scheme: str) -> bool:
    """Does a norm's result become 16-bit floats before that provider quantizes it?"""
    return provider == "cuda" and scheme == "int8-block"


def assert_quantized_alike(
    expected: tuple[torch.Tensor, torch.Tensor],
    actual: tuple[torch.Tensor, torch.Tensor],
    *,
    halves: bool = False,
) -> None:
    """Scales agree to float32 rounding; values too, but for ties that fall to the other side.

    Args:
        halves: int8 values were 16-bit floats before: three roundings to 11 digits, of terms that
            may cancel, are 3·2⁻¹¹ and more of the scale and up to 0.2 of a step of a value.
    """
    torch.testing.assert_close(actual[1], expected[1], rtol=2.0**-8 if halves else 2e-5, atol=0)
    difference = (actual[0].float() - expected[0].float()).abs()
    if expected[0].dtype is torch.int8:
        assert difference.max() <= 1
        other = (difference > 0).sum().item()
        assert other < (max(1e-2 * difference.numel(), 8) if halves else 1e-3 * difference.numel())
        return
    # A neighbouring e4m3 value is at most 1/8 away, or one subnormal step of 2⁻⁹. Triton's
    # interpreter truncates instead of rounding, and drops a carry into the exponent, which halves
    # the value: there a value may be off by half, and rarely is by more than a neighbour.
    magnitude = expected[0].float().abs()
    far = difference > magnitude / 8 + 2.0**-9
    if expected[0].is_cuda:
        assert not far.any()
        assert (difference > 0).float().mean() < 2e-3
    else:
        assert (difference <= magnitude / 2 + 2.0**-9).all()
        assert far.float().mean() < 0.05
