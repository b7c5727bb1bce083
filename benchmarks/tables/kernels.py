"""Operators that multiply matrices: attention and linear layers."""

from __future__ import annotations

from benchmarks.results import Record
from benchmarks.tables.cells import by_name, number
from benchmarks.targets import GPU

_WHOLE = "sagesla/{shape}_ms"
_OPERATORS = {
    _WHOLE: "SageSLA, from the projections to the input of O",
    "block_sparse_attention/{shape}_tops": "… its attention kernel alone, on the blocks kept",
    "sla/{shape}_ms": "SLA in 16 bits, after norms and rotation",
    "sla2/{shape}_ms": "SLA2 in 16 bits",
    "sla2_8bit/{shape}_ms": "SLA2 in 8 bits",
    "block_sparse_attention/{shape}_ms": "sparse attention by given lists, 16 bits",
    "block_sparse_attention_backward/{shape}_ms": "… its derivative",
    "sage_attention/{shape}x{tokens}_ms": "`sage_attention`: dense, 8 bits",
    "sage_attention/sageattention/{shape}x{tokens}_ms": "… `sageattention` 1.0.6, P·v in 16 bits",
    "attention_jvp/{shape}x{tokens}_ms": "dense attention and its forward derivative, 16 bits",
    "attention_jvp/{shape}x512_ms": "… to a prompt of 512",
}
"""Records of attention, at the shapes of both models, by what they measure."""
_SHAPES = ((12, 32760), (40, 75600))


def attention() -> str:
    """Operators of attention at both models' shapes, each beside its floor or ceiling."""
    records = by_name("kernels.json")
    sizes = [f"{heads} heads × {tokens:,}" for heads, tokens in _SHAPES]
    lines = [
        f"| | {' | '.join(f'{size} | bound' for size in sizes)} |",
        f"| --- |{' ---: |' * 2 * len(sizes)}",
    ]
    for name, title in _OPERATORS.items():
        cells = [_bounded(records.get(_at(name, *shape))) for shape in _SHAPES]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    cells = [_dense(records.get(_at(_WHOLE, *shape))) for shape in _SHAPES]
    lines.append(f"| PyTorch's dense attention, bf16 | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(name: str, heads: int, tokens: int) -> str:
    """A record's name at one shape."""
    return f"{GPU}/{name.format(shape=f'{heads}x{tokens}', tokens=tokens)}"


def _bounded(record: Record | None) -> str:
    """Two cells: the value, and what bounds it."""
    if record is None:
        return "not recorded |"
    bound = "" if record.ceiling is None else number(record.ceiling.value)
    return f"{number(record.value)} {record.unit} | {bound}"


def _dense(record: Record | None) -> str:
    """Two cells: dense attention in the run of a record, which has no bound."""
    ms = record.baseline.get("sdpa_dense_bf16") if record else None
    return "not recorded |" if ms is None else f"{number(ms)} ms |"


def linear() -> str:
    """The block-scaled products at the models' shapes."""
    lines = [
        "| tokens × in × out | scheme | provider | TFLOP/s or TOPS | bf16 linear, same run |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for record in by_name("kernels.json").values():
        _, kernel, *rest = record.name.split("/")
        if kernel == "block_linear":
            scheme, shape, provider = rest[:3]
            lines.append(
                f"| {shape.replace('x', ' × ')} | {scheme} | {provider} | {record.value:.0f} | "
                f"{record.baseline['bf16_linear']:.0f} |"
            )
    return "\n".join(lines)
