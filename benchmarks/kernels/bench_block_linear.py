"""block_linear at the models' shapes: TFLOP/s, beside bf16 linear and the library's product."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.kernels._harness import InputSet, Session, Timing, provider, sqnr_db
from turbo_opt.kernels import SCHEMES, quantize_activation, quantize_weight

LEAST_SQNR_DB = 42.0  # against the float32 product of the same operands, after bfloat16 rounding
CHECKED_TOKENS = 4096  # the float32 reference of all tokens would take most of the run
QUICK_SHAPES = 4


def operands(
    session: Session, tokens: int, in_features: int, out_features: int, scheme: str
) -> InputSet:
    x = torch.randn(tokens, in_features, device=session.device, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, device=session.device) / in_features**0.5
    bias = torch.randn(out_features, device=session.device)
    quantized = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    return (*quantized, bias, scheme, torch.bfloat16)


def bench(session: Session) -> None:
    shapes = session.linears[:QUICK_SHAPES] if session.quick else session.linears
    for shape in shapes:
        baseline = {"bf16_linear": _time_bf16(session, *shape)}
        for scheme in SCHEMES:
            _bench_one(session, shape, scheme, baseline)
        if not session.dry:
            torch.cuda.empty_cache()


def _time_bf16(session: Session, tokens: int, in_features: int, out_features: int) -> Timing:
    def make() -> InputSet:
        x = torch.randn(tokens, in_features, device=session.device, dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, device=session.device, dtype=x.dtype)
        return x, weight, torch.randn(out_features, device=session.device, dtype=x.dtype)

    return session.time(linear, session.input_sets(make))


def _bench_one(
    session: Session, shape: tuple[int, int, int], scheme: str, baseline: dict[str, Timing]
) -> None:
    tokens, in_features, out_features = shape
    sets = session.input_sets(lambda: operands(session, *shape, scheme))
    label = f"block_linear/{scheme}/{tokens}x{in_features}x{out_features}"
    choice, names = session.usable("block_linear", sets[0])
    for each in names:
        with provider("block_linear", each) as call:
            sqnr = _quality(call, sets[0], scheme)
            session.check(f"{label}/{each}", sqnr, LEAST_SQNR_DB)
            timing = session.time(call, sets)
        session.record_rate(
            f"{label}/{each}",
            timing,
            2 * tokens * in_features * out_features,
            session.library_matmul[scheme],
            baseline,
            quality={"sqnr_db": sqnr},
            config={
                "provider": each,
                "default": each == choice.provider,
                "ms": timing.ms,
                **_configuration(each),
            },
        )


def _quality(call: object, args: InputSet, scheme: str) -> float:
    """SQNR of the first and the last tokens, whose float32 products are formed apart."""
    q, q_scale, *rest = args
    y = call(*args)  # type: ignore[operator]
    rows_per_scale = SCHEMES[scheme].activation_block[0]
    ends = {0, max(0, (q.shape[0] - 1) // CHECKED_TOKENS * CHECKED_TOKENS)}
    qualities = []
    for start in ends:
        part = slice(start, start + CHECKED_TOKENS)
        scales = slice(start // rows_per_scale, (start + CHECKED_TOKENS) // rows_per_scale)
        with provider("block_linear", "reference") as reference:
            expected = reference(q[part], q_scale[scales], *rest)
        qualities.append(sqnr_db(expected, y[part]))
    return min(qualities)


def _configuration(name: str) -> dict[str, object]:
    """The tile configuration that was measured to be fastest last."""
    if name != "triton":
        return {}
    from turbo_opt.kernels._triton.tuning import measured_configurations

    measured = list(measured_configurations().values())
    return {"tile": str(measured[-1])} if measured else {}
