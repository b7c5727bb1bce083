"""Whole models: one forward, and the denoising of a clip."""

from __future__ import annotations

from benchmarks.cold_start import PARTS
from benchmarks.results import Record
from benchmarks.tables.cells import MODELS, by_name
from benchmarks.targets import GPU

_CONFIGURATIONS = {
    "diffusers-eager": "diffusers, bf16",
    "diffusers-compiled": "diffusers, bf16, torch.compile",
    "torchao-fp8": "… linear layers in fp8 by torchao",
    "torchao-fp8-sageattention": "… and attention by `sageattention` 1.0.6",
    "captured": "captured, no pass",
    "fuse-norms": "`canonicalize`, `fuse-norms`",
    "fp8-block": "… `quantize-linear{scheme=fp8-block}`, `fuse-norm-quantize`",
    "int8-block": "… `quantize-linear{scheme=int8-block}`, `fuse-norm-quantize`",
    "fused-fp8": "fp8, all fusions, invariants hoisted, one CUDA graph; dense attention",
    "sage-fp8": "the same with dense attention in 8 bits",
    "sla-bf16": "`sparse-attention{mode=sla topk=0.1}`, 16 bits, nothing else fused",
    "sagesla-fp8": "**SageSLA topk 0.1, fp8 linear layers, all passes**",
    "sagesla-int8": "SageSLA topk 0.1, int8 linear layers, all passes",
}
_REFERENCES = ("eager_bf16", "sla_bf16")


def forward() -> str:
    """One forward of each full-size model, configuration by configuration."""
    records = by_name("forward.json")
    lines = []
    for model, title in MODELS.items():
        rows = {
            key: records[f"{GPU}/{model}/{key}/forward_ms"]
            for key in _CONFIGURATIONS
            if f"{GPU}/{model}/{key}/forward_ms" in records
        }
        if not rows:
            continue
        lines += [
            f"**{title}**, one H200, random weights:",
            "",
            "| | ms | floor | against eager | SQNR of the output | weights | peak memory |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
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
    weights, floor = record.config["weight_gib"], record.ceiling
    return (
        f"| {_CONFIGURATIONS[key]} | {record.value:.0f} ± {record.spread:.0f} | "
        f"{f'{floor.value:.0f}' if floor else ''} | {eager / record.value:.2f}× | {quality} | "
        f"{f'{weights:.1f} GiB' if weights else ''} | {record.config['peak_gib']:.1f} GiB |"
    )


def cold_start() -> str:
    """From a process's start to the frames of its first clip, or to its first denoised step."""
    lines = [
        "| model | compiled kernels | imports | load | text | first step | others | frames "
        "| in all |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in by_name("cold_start.json").values():
        _, model, metric = record.name.split("/")
        caches = "none yet" if "empty" in metric else "of an earlier process"
        seconds = (record.config.get(part) for part in PARTS)
        parts = ["" if value is None else f"{value:.1f} s" for value in seconds]
        lines.append(
            f"| {MODELS.get(model, model)} | {caches} | {' | '.join(parts)} | "
            f"{record.value:.1f} ± {record.spread:.1f} s |"
        )
    return "\n".join(lines)


def clips() -> str:
    """The denoising of one clip: 100 evaluations of the original against four steps."""
    lines = [
        "| model | diffusers, 50 guided steps | compiled | this, 4 steps | times faster | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in by_name("forward.json").values():
        _, model, key, metric = record.name.split("/")
        if metric == "four_steps_ms" and key.startswith("sagesla"):
            eager = record.baseline["diffusers-eager"]
            compiled = record.baseline.get("diffusers-compiled")  # not of every run
            lines.append(
                f"| {MODELS.get(model, model)}, {key} | {eager / 1e3:.1f} s | "
                f"{f'{compiled / 1e3:.1f} s' if compiled else ''} | "
                f"{record.value / 1e3:.2f} s | {eager / record.value:.0f}× | "
                f"{record.config['peak_gib']:.1f} GiB |"
            )
    return "\n".join(lines)
