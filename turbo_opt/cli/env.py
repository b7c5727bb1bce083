"""`turbo-opt env`: versions, machine, and which kernels can run on it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from turbo_opt.cli.session import Session, common_options, pass_session

if TYPE_CHECKING:
    import torch

_EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "tensorrt": ("tensorrt",),
    "modelopt": ("modelopt",),
    "torchao": ("torchao",),
    "sage": ("sageattention", "spas_sage_attn"),
    "train": ("tensorboard", "matplotlib"),
}
_TOKENS, _CHANNELS = 256, 1536


@click.command()
@common_options
@pass_session
def env(session: Session) -> None:
    """Show versions, GPUs, kernel providers and extras."""
    import torch

    from turbo_opt.artifact.environment import environment
    from turbo_opt.targets import detect_target

    target = detect_target()
    device = torch.device("cuda", 0) if target.device_type == "cuda" else torch.device("cpu")
    record = {
        "versions": environment(),
        "target": vars(target),
        "gpus": _gpus(),
        "kernels": _kernels(device),
        "extras": {name: _versions(modules) for name, modules in _EXTRAS.items()},
    }
    _show(session, record)


def _show(session: Session, record: dict[str, Any]) -> None:
    from turbo_opt.cli.tables import NOTHING, pairs, size, table

    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in record["gpus"]]
    target = record["target"]
    head = record["versions"] | {
        "target": f"{target['name']} (in hardware: {', '.join(target['schemes']) or 'no scheme'})",
        "GPUs": "; ".join(gpus) or "none",
    }
    kernels = [
        (
            row["operator"],
            row["scheme"] or NOTHING,
            row["provider"] or NOTHING,
            "; ".join(f"{name}: {reason}" for name, reason in row["passed_over"].items()),
        )
        for row in record["kernels"]
    ]
    extras = [
        (f"turbo-opt[{extra}]", module, version or "not installed")
        for extra, found in record["extras"].items()
        for module, version in found.items()
    ]
    session.report(
        record,
        pairs(head),
        table(("operator", "scheme", "runs on", "passed over"), kernels),
        table(("extra", "package", "version"), extras),
    )


def _gpus() -> list[dict[str, Any]]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
        }
        for gpu in found
    ]


def _kernels(device: torch.device) -> list[dict[str, Any]]:
    """One row for every operator and scheme: which provider serves a typical call, why no other."""
    from turbo_opt.kernels import explain, operators

    rows: list[dict[str, Any]] = []
    for name, operator in sorted(operators().items()):
        examples = example_calls(name)
        for scheme, arguments in examples:
            choice = explain(name, device, *arguments)
            rows.append(
                {
                    "operator": name,
                    "scheme": scheme,
                    "provider": choice.provider,
                    "passed_over": dict(choice.passed_over),
                }
            )
        if not examples:
            missing = {item.name: item.missing() for item in operator.providers}
            absent = {key: reason for key, reason in missing.items() if reason}
            row = {"operator": name, "scheme": None, "provider": None, "passed_over": absent}
            rows.append(row)
    return rows


def example_calls(name: str) -> list[tuple[str | None, tuple[Any, ...]]]:
    """(scheme, arguments on meta) of typical calls of an operator; none for one not known here."""
    import torch

    from turbo_opt.kernels import SCHEMES

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(1, _TOKENS, _CHANNELS, dtype=torch.bfloat16)
    row, modulation = meta(_CHANNELS), meta(1, 1, _CHANNELS)
    plain: dict[str, tuple[Any, ...]] = {
        "adaln": (x, modulation, modulation, 1e-6),
        "layer_norm": (x, row, row, 1e-6),
        "rms_norm": (x, row, 1e-6),
    }
    quantizing: dict[str, tuple[Any, ...]] = {
        "adaln_quantize": plain["adaln"],
        "layer_norm_quantize": plain["layer_norm"],
        "quantize_activation": (x,),
    }
    if name in plain:
        return [(None, plain[name])]
    if name in quantizing:
        return [(scheme, (*quantizing[name], scheme)) for scheme in SCHEMES]
    if name != "block_linear":
        return []
    calls: list[tuple[str | None, tuple[Any, ...]]] = []
    blocks = _CHANNELS // 128
    for scheme, rules in SCHEMES.items():
        q, weight = (meta(side, _CHANNELS, dtype=rules.dtype) for side in (_TOKENS, _CHANNELS))
        q_scale = meta(_TOKENS // rules.activation_block[0], blocks)
        arguments = (q, q_scale, weight, meta(blocks, blocks), None, scheme, torch.bfloat16)
        calls.append((scheme, arguments))
    return calls


def _versions(modules: tuple[str, ...]) -> dict[str, str | None]:
    """Module → version, None where it is not installed; nothing is imported."""
    by_module = metadata.packages_distributions()
    found: dict[str, str | None] = {}
    for module in modules:
        there = importlib.util.find_spec(module) is not None
        distribution = by_module.get(module, [module])[0]
        try:
            found[module] = metadata.version(distribution) if there else None
        except metadata.PackageNotFoundError:
            found[module] = "unknown"
    return found
