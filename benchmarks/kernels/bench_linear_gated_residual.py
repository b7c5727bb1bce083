"""linear_gated_residual at the models' shapes, and with the norm that reads the stream behind it.

The records of the operator are rates of the product in it. Those named `chain` are milliseconds
from the quantized activation to the next one: `linear_gated_residual`, then `adaln_quantize`,
beside the layer alone, then `residual_adaln_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels._harness import InputSet, Session, provider, sqnr_db
from turbo_opt.kernels import (
    SCHEMES,
    adaln_quantize,
    block_linear,
    quantize_activation,
    quantize_weight,
    residual_adaln_quantize,
)

LAYERS = [  # (tokens, in_features, out_features)
    (32760, 1536, 1536),
    (32760, 8960, 1536),
    (75600, 5120, 5120),
    (75600, 13824, 5120),
]
LEAST_SQNR_DB = 42.0  # a provider may round the layer's result to bfloat16 before the sum's
CHECKED_TOKENS = 4096  # the float32 reference of all tokens would take most of the run
EPS = 1e-6


def operands(
    session: Session, tokens: int, in_features: int, out_features: int, scheme: str
) -> InputSet:
    activation = torch.randn(1, tokens, in_features, device=session.device, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, device=session.device) / in_features**0.5
    bias = torch.randn(out_features, device=session.device).bfloat16()
    x = torch.randn(1, tokens, out_features, device=session.device, dtype=torch.bfloat16)
    gate = torch.randn(1, 1, out_features, device=session.device)
    quantized = *quantize_activation(activation, scheme), *quantize_weight(weight, scheme)
    return (*quantized, bias, x, gate, scheme)


def bench(session: Session) -> None:
    for shape in session.linears if session.dry else LAYERS:
        for scheme in SCHEMES:
            _bench_one(session, shape, scheme)
        if not session.dry:
            torch.cuda.empty_cache()


def _bench_one(session: Session, shape: tuple[int, int, int], scheme: str) -> None:
    tokens, in_features, out_features = shape
    sets = session.input_sets(lambda: operands(session, *shape, scheme))
    label = f"linear_gated_residual/{scheme}/{tokens}x{in_features}x{out_features}"
    scale, shift = torch.randn(2, 1, 1, out_features, device=session.device)
    choice, names = session.usable("linear_gated_residual", sets[0])
    timings, chains, qualities = {}, {}, {}
    for each in names:
        with provider("linear_gated_residual", each) as call:
            qualities[each] = _quality(call, sets[0], scheme)
            session.check(f"{label}/{each}", qualities[each], LEAST_SQNR_DB)
            timings[each] = session.time(call, sets)
            chains[each] = session.time(_then_norm(call, scale, shift, scheme), sets)
    separate = session.time(_layer_then_sum_and_norm(scale, shift), sets)
    for each in names:
        facts = {
            "quality": {"sqnr_db": qualities[each]},
            "config": {"provider": each, "default": each == choice.provider},
        }
        session.record_rate(
            f"{label}/{each}",
            timings[each],
            2 * tokens * in_features * out_features,
            session.library_matmul[scheme],
            {other: its for other, its in timings.items() if other != each},
            **facts,
        )
        baseline = {"block_linear, residual_adaln_quantize": separate}
        session.record_time(f"{label}/{each}/chain", chains[each], baseline, **facts)


def _then_norm(
    call: Callable[..., torch.Tensor], scale: torch.Tensor, shift: torch.Tensor, scheme: str
) -> Callable[..., object]:
    """The operator, and the norm of the stream that it gives."""
    return lambda *args: adaln_quantize(call(*args), scale, shift, EPS, scheme)


def _layer_then_sum_and_norm(scale: torch.Tensor, shift: torch.Tensor) -> Callable[..., object]:
    """The layer, then the sum and its norm in one pass."""

    def run(*args: object) -> object:
        *layer, x, gate, scheme = args
        y = block_linear(*layer, scheme, x.dtype)
        return residual_adaln_quantize(x, y, gate, scale, shift, EPS, scheme)

    return run


def _quality(call: Callable[..., torch.Tensor], args: InputSet, scheme: str) -> float:
    """SQNR of the first tokens' sums against the reference's."""
    q, q_scale, weight, weight_scale, bias, x, gate, _ = args
    part = slice(CHECKED_TOKENS)
    scales = slice(CHECKED_TOKENS // SCHEMES[scheme].activation_block[0])
    layer = (q[:, part], q_scale[scales], weight, weight_scale, bias)
    with provider("linear_gated_residual", "reference") as reference:
        expected = reference(*layer, x[:, part], gate, scheme)
    return sqnr_db(expected, call(*args)[:, part])
