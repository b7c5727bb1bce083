"""The tables of README.md, written from benchmarks/results/ and from the pass registry.

python -m benchmarks.tables          # rewrites what stands between the markers
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import RESULTS, ROOT, Record, read
from turbo_opt.compiler.base import registered_passes

README = ROOT / "README.md"
_MODELS = {
    "wan2.1-t2v-1.3b-480p": "1.3B, 480p, 81 frames",
    "wan2.1-t2v-14b-720p": "14B, 720p, 81 frames",
}
_CONFIGURATIONS = {
    "diffusers-eager": "diffusers, bf16",
    "diffusers-compiled": "diffusers, bf16, torch.compile",
    "captured": "captured, no pass",
    "fuse-norms": "`canonicalize`, `fuse-norms`",
    "fp8-block": "… `quantize-linear{scheme=fp8-block}`, `fuse-norm-quantize`",
    "int8-block": "… `quantize-linear{scheme=int8-block}`, `fuse-norm-quantize`",
    "fused-fp8": "fp8, all fusions, invariants hoisted, one CUDA graph; dense attention",
    "sla-bf16": "`sparse-attention{mode=sla topk=0.1}`, 16 bits, nothing else fused",
    "sagesla-fp8": "**SageSLA topk 0.1, fp8 linear layers, all passes**",
    "sagesla-int8": "SageSLA topk 0.1, int8 linear layers, all passes",
}
_BASELINES = ("eager", "compiled")
_REFERENCES = ("eager_bf16", "sla_bf16")


def passes() -> str:
    """Name, tier, what it does."""
    lines = ["| pass | tier | what it does |", "| --- | --- | --- |"]
    for name, item in registered_passes().items():
        lines.append(f"| `{name}` | {item.numerics.value} | {item.summary().rstrip('.')} |")
    return "\n".join(lines)


def forward() -> str:
    """One forward of each full-size model, configuration by configuration."""
    records = {record.name: record for record in read(RESULTS / "forward.json")}
    lines = []
    for model, title in _MODELS.items():
        rows = {
            key: records[f"h200/{model}/{key}/forward_ms"]
            for key in _CONFIGURATIONS
            if f"h200/{model}/{key}/forward_ms" in records
        }
        lines += [
            f"**{title}**, one H200, random weights:",
            "",
            "| | ms | against eager | SQNR of the output | weights | peak memory |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *(_forward_row(key, record) for key, record in rows.items()),
            "",
        ]
    return "\n".join(lines).strip()


def _forward_row(key: str, record: Record) -> str:
    eager = record.baseline.get("diffusers-eager", record.value)  # of the same run
    dense, sparse = (record.quality.get(f"sqnr_db_vs_{name}") for name in _REFERENCES)
    sqnr = sparse if dense is None else dense
    quality = "" if sqnr is None else "bitwise" if sqnr >= 200 else f"{sqnr:.1f} dB"
    if sparse is not None:
        quality = "reference of the sparse rows" if sparse >= 200 else f"{quality} of sparse bf16"
    weights = record.config["weight_gib"]
    return (
        f"| {_CONFIGURATIONS[key]} | {record.value:.0f} ± {record.spread:.0f} | "
        f"{eager / record.value:.2f}× | {quality} | "
        f"{f'{weights:.1f} GiB' if weights else ''} | {record.config['peak_gib']:.1f} GiB |"
    )


def clips() -> str:
    """The denoising of one clip: 100 evaluations of the original against four steps."""
    lines = [
        "| model | diffusers, 50 guided steps | compiled | this, 4 steps | times faster | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in read(RESULTS / "forward.json"):
        _, model, key, metric = record.name.split("/")
        if metric == "four_steps_ms" and key.startswith("sagesla"):
            eager, compiled = (record.baseline[f"diffusers-{kind}"] for kind in _BASELINES)
            lines.append(
                f"| {_MODELS[model]}, {key} | {eager / 1e3:.1f} s | {compiled / 1e3:.1f} s | "
                f"{record.value / 1e3:.2f} s | {eager / record.value:.0f}× | "
                f"{record.config['peak_gib']:.1f} GiB |"
            )
    return "\n".join(lines)


def linear() -> str:
    """The block-scaled products at the models' shapes."""
    lines = [
        "| tokens × in × out | scheme | provider | TFLOP/s or TOPS | bf16 linear, same run |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for record in read(RESULTS / "kernels.json"):
        _, kernel, *rest = record.name.split("/")
        if kernel == "block_linear":
            scheme, shape, provider = rest[:3]
            lines.append(
                f"| {shape.replace('x', ' × ')} | {scheme} | {provider} | {record.value:.0f} | "
                f"{record.baseline['bf16_linear']:.0f} |"
            )
    return "\n".join(lines)


def compilation() -> str:
    """What compiling costs on a small machine."""
    lines = ["| | | |", "| --- | ---: | --- |"]
    for record in read(RESULTS / "compile_large.json"):
        model, what = record.name.removeprefix("cpu/").split("/")
        name = f"{model}, {_measure(what)}"
        ceiling = record.ceiling
        digits = 0 if record.unit == "s" else 1
        against = f"{ceiling.value:.{digits}f} {ceiling.unit}: {ceiling.what}" if ceiling else ""
        lines.append(f"| {name} | {record.value:.1f} {record.unit} | {against} |")
    return "\n".join(lines)


def _measure(name: str) -> str:
    """A record's last part in words, without its unit."""
    for unit in ("_gb_per_s", "_gib", "_s"):
        name = name.removesuffix(unit)
    return name.replace("_", " ")


TABLES: dict[str, Callable[[], str]] = {
    "passes": passes,
    "forward": forward,
    "clips": clips,
    "linear": linear,
    "compilation": compilation,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
    return text


def main() -> None:
    """Rewrite README.md."""
    path = Path(README)
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
