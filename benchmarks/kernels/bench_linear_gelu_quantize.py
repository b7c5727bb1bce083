"""linear_gelu_quantize at the models' feed-forward shapes: TFLOP/s of the product in it."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, provider, sqnr_db
from turbo_opt.kernels import SCHEMES, dequantize_activation, quantize_activation, quantize_weight

LAYERS = [(32760, 1536, 8960), (75600, 5120, 13824)]  # (tokens, in_features, out_features)
LEAST_SQNR_DB = 34.0  # a rounding to bfloat16 before that to 8 bits moves some to their neighbours
LEAST_DRY_SQNR_DB = 20.0  # Triton's interpreter truncates to fp8
CHECKED_TOKENS = 4096  # the float32 reference of all tokens would take most of the run


def operands(
    session: Session, tokens: int, in_features: int, out_features: int, scheme: str
) -> InputSet:
    x = torch.randn(tokens, in_features, device=session.device, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, device=session.device) / in_features**0.5
    bias = torch.randn(out_features, device=session.device).bfloat16()
    quantized = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    return (*quantized, bias, scheme, torch.bfloat16)


def bench(session: Session) -> None:
    for shape in session.linears if session.dry else LAYERS:
        for scheme in SCHEMES:
            _bench_one(session, shape, scheme)
        if not session.dry:
            torch.cuda.empty_cache()


def _bench_one(session: Session, shape: tuple[int, int, int], scheme: str) -> None:
    tokens, in_features, out_features = shape
    sets = session.input_sets(lambda: operands(session, *shape, scheme))
    label = f"linear_gelu_quantize/{scheme}/{tokens}x{in_features}x{out_features}"
    choice, names = session.usable("linear_gelu_quantize", sets[0])
    least = LEAST_DRY_SQNR_DB if session.dry else LEAST_SQNR_DB
    timings, qualities = {}, {}
    for each in names:
        with provider("linear_gelu_quantize", each) as call:
            qualities[each] = _quality(call, sets[0], scheme)
            session.check(f"{label}/{each}", qualities[each], least)
            timings[each] = session.time(call, sets)
    for each, timing in timings.items():
        session.record_rate(
            f"{label}/{each}",
            timing,
            2 * tokens * in_features * out_features,
            session.library_matmul[scheme],
            {other: its for other, its in timings.items() if other != each},
            quality={"sqnr_db": qualities[each]},
            config={"provider": each, "default": each == choice.provider, "ms": timing.ms},
        )


def _quality(call: object, args: InputSet, scheme: str) -> float:
    """SQNR of the first tokens' dequantized values against the reference's."""
    q, q_scale, *rest = args
    scales = slice(CHECKED_TOKENS // SCHEMES[scheme].activation_block[0])
    with provider("linear_gelu_quantize", "reference") as reference:
        expected = dequantize_activation(
            *reference(q[:CHECKED_TOKENS], q_scale[scales], *rest), scheme
        )
    values, value_scales = call(*args)  # type: ignore[operator]
    found = dequantize_activation(values[:CHECKED_TOKENS], value_scales[scales], scheme)
    return sqnr_db(expected, found)
