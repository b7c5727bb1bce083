"""What an artifact is made and run with: versions for people, a fingerprint for bitwise replay."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

import torch

import turbo_opt
from turbo_opt.kernels.capability import CPU
from turbo_opt.kernels.provider_table import choices_digest

_PACKAGES = ("diffusers", "transformers", "safetensors", "triton", "numpy")


def environment() -> dict[str, str]:
    """Versions of what can change a result, by name; GPUs only if CUDA is in use already."""
    found = {
        "turbo_opt": turbo_opt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_initialized():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def fingerprint() -> str:
    """Digest of all that decides the bits of a CPU result: torch, processor, threads, and the
    providers that were measured to be fastest, if any were."""
    parts = [
        str(torch.__version__),
        platform.machine(),
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
    ]
    measured = choices_digest(CPU)
    if measured is not None:
        parts.append(measured)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    first = lines[: lines.index("")] if "" in lines else lines
    return "\n".join(line for line in first if line.split("\t")[0].strip() in wanted)
