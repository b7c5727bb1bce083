"""How two artifacts differ: recipe, passes, operators, weights, schedule, size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbo_opt.artifact.inspect import inspect_artifact
from turbo_opt.artifact.manifest import Manifest, inside, read_manifest
from turbo_opt.ir.files import SafetensorsFile
from turbo_opt.ir.printer import op_count_diff


def diff_artifacts(first: Path | str, second: Path | str) -> dict[str, Any]:
    """The differences, as JSON values; `same` says that there are none that matter to a result.

    Weights are compared by content, one at a time.

    Raises:
        BadInput: one of the two is no artifact.
    """
    roots = [Path(path).expanduser() for path in (first, second)]
    one, two = (inspect_artifact(root) for root in roots)
    manifests = [read_manifest(root) for root in roots]
    networks = {
        name: _denoiser(roots, manifests, name, one["denoisers"], two["denoisers"])
        for name in sorted(one["denoisers"].keys() & two["denoisers"].keys())
    }
    sets = [set(one["denoisers"]), set(two["denoisers"])]
    result: dict[str, Any] = {
        "first": str(roots[0]),
        "second": str(roots[1]),
        "bytes": [one["bytes"], two["bytes"]],
        "target": [one["target"], two["target"]],
        "recipe": _changes(one["recipe"], two["recipe"]),
        "passes": _changes(_passes(one), _passes(two)),
        "schedule": _changes(*(item.schedule.model_dump(mode="json") for item in manifests)),
        "denoisers_removed": sorted(sets[0] - sets[1]),
        "denoisers_added": sorted(sets[1] - sets[0]),
        "denoisers": networks,
    }
    result["same"] = not (
        result["schedule"]
        or result["denoisers_removed"]
        or result["denoisers_added"]
        or any(item["operators"] or any(item["weights"].values()) for item in networks.values())
    )
    return result


def _passes(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{index:02d} {row['name']}": {"options": row["options"], "matches": row["matches"]}
        for index, row in enumerate(summary["passes"], 1)
    }


def _denoiser(
    roots: list[Path],
    manifests: list[Manifest],
    name: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> dict[str, Any]:
    tensors = [manifest.denoisers[name].tensors for manifest in manifests]
    common = sorted(tensors[0].keys() & tensors[1].keys())
    changed = [
        weight
        for weight in common
        if not _same_weight(roots, [side[weight].file for side in tensors], weight)
    ]
    return {
        "weight_bytes": [first[name]["weight_bytes"], second[name]["weight_bytes"]],
        "bytes_by_dtype": _changes(first[name]["bytes_by_dtype"], second[name]["bytes_by_dtype"]),
        "operators": op_count_diff(first[name]["operators"], second[name]["operators"]),
        "weights": {
            "removed": sorted(tensors[0].keys() - tensors[1].keys()),
            "added": sorted(tensors[1].keys() - tensors[0].keys()),
            "changed": changed,
        },
    }


def _same_weight(roots: list[Path], files: list[str], weight: str) -> bool:
    one, two = (
        SafetensorsFile.open(str(inside(root, file)))
        for root, file in zip(roots, files, strict=True)
    )
    if one.describe(weight) != two.describe(weight):
        return False
    import torch

    left, right = (file.read(weight).flatten().view(torch.uint8) for file in (one, two))
    return torch.equal(left, right)


def _changes(first: Any, second: Any) -> dict[str, list[Any]]:
    """Dotted path → [first, second] for every leaf that differs; None where one has none."""
    left, right = dict(_leaves(first, "")), dict(_leaves(second, ""))
    return {
        key: [left.get(key), right.get(key)]
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
