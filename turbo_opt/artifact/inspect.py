"""What is in an artifact, as plain data: for `inspect`, for reports and for comparison."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from turbo_opt.artifact.graph_file import read_graph
from turbo_opt.artifact.manifest import (
    DenoiserRecord,
    Manifest,
    ScheduleRecord,
    inside,
    read_manifest,
)
from turbo_opt.compiler.records import pass_row
from turbo_opt.ir.printer import op_counts
from turbo_opt.ir.weights import dtype_from_name


def inspect_artifact(path: Path | str, *, graphs: bool = True) -> dict[str, Any]:
    """Sizes, operators, dtypes, passes and schedule of an artifact, as JSON values.

    Args:
        graphs: also read the graphs and count their operators.

    Raises:
        BadInput: it is no artifact.
    """
    root = Path(path).expanduser()
    manifest = read_manifest(root)
    summary = summarize(manifest)
    if graphs:
        for name, record in manifest.denoisers.items():
            exported = read_graph(inside(root, record.graph))
            counts = dict(op_counts(exported).most_common())
            summary["denoisers"][name]["operators"] = counts
    return {"path": str(root), **summary}


def summarize(manifest: Manifest) -> dict[str, Any]:
    """What the manifest alone tells."""
    return {
        "format_version": manifest.format_version,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "files": len(manifest.files),
        "target": manifest.target,
        "components": manifest.components.model_dump(mode="json"),
        "facts": list(manifest.facts),
        "denoisers": {name: _denoiser(record) for name, record in manifest.denoisers.items()},
        "schedule": _schedule(manifest.schedule),
        "passes": [pass_row(entry) for entry in manifest.history],
        "kernels": manifest.kernels,
        "environment": manifest.environment,
        "recipe": manifest.recipe,
    }


def _denoiser(record: DenoiserRecord) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for tensor in record.tensors.values():
        by_dtype[tensor.dtype] += math.prod(tensor.shape) * dtype_from_name(tensor.dtype).itemsize
    return {
        "model_class": record.model_class,
        "dtype": record.dtype,
        "weights": len(record.tensors),
        "weight_bytes": by_dtype.total(),
        "bytes_by_dtype": dict(by_dtype.most_common()),
        "shards": len(record.shards),
        "replay": record.replay.file is not None,
        "stages": {stage: list(names) for stage, names in record.stages.items()},
    }


def _schedule(schedule: ScheduleRecord) -> dict[str, Any]:
    guidance = [step.guidance_scale for step in schedule.steps]
    return {
        "steps": len(schedule.steps),
        "evaluations": sum(1 if scale is None else 2 for scale in guidance),
        "rules": sorted({step.rule for step in schedule.steps}),
        "steps_by_denoiser": dict(Counter(step.denoiser for step in schedule.steps)),
        "guidance_scales": sorted({scale for scale in guidance if scale is not None}),
        "times": [step.time for step in schedule.steps],
    }
