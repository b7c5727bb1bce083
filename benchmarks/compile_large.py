"""Compile full-size models on this machine: time, peak host memory, throughput against the disk.

    python -m benchmarks.compile_large capture               # 1.3B and 14B graphs, no weights
    python -m benchmarks.compile_large optimize --work DIR   # a synthetic 28 GB checkpoint

`optimize` writes a 14B checkpoint of random bf16 weights shard by shard, drops it from the page
cache, and runs `turbo-opt run wan2.1-t2v-14b/h200` on it, once with every match verified and once
without. The ceiling is the time the same disk takes to read the checkpoint and to write as many
bytes as the artifact has, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.forward import CASES
from benchmarks.results import Ceiling, Record
from turbo_opt.capture.export import export_denoiser

_SHARD_BYTES = 5 * 10**9
_BLOCK = 16 * 2**20
_CAPTURE = """
import json, resource, sys, time
import torch
started = time.perf_counter()
from turbo_opt.capture.export import export_denoiser
graph = export_denoiser("WanTransformer3DModel", json.loads(sys.argv[1]), torch.bfloat16, False)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "nodes": len(graph.exported.graph.nodes)}))
"""


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def capture_records(runs: int) -> list[Record]:
    """Capture time (imports included) and peak memory, each run in a process of its own."""
    records = []
    for key in ("1.3b", "14b"):
        case = CASES[key]
        found = [
            json.loads(
                _run([sys.executable, "-c", _CAPTURE, json.dumps(case.config)]).splitlines()[-1]
            )
            for _ in range(runs)
        ]
        seconds = sorted(item["seconds"] for item in found)
        spread = (seconds[-1] - seconds[0]) / 2 if len(seconds) > 1 else 0.0
        peak = max(item["peak"] for item in found)
        config = {"nodes": found[0]["nodes"], "peak_host_gib": peak / 2**30}
        records.append(
            _record(
                f"cpu/{case.name}/capture_s", statistics.median(seconds), "s", spread, runs, config
            )
        )
        records.append(
            _record(f"cpu/{case.name}/capture_peak_gib", peak / 2**30, "GiB", 0.0, runs, config)
        )
        print(records[-2].name, records[-2].value, records[-1].value, flush=True)
    return records


def optimize_records(work: Path, layers: int | None) -> list[Record]:
    """Write the synthetic checkpoint, optimize it twice, and compare with the disk."""
    config = dict(CASES["14b"].config)
    if layers is not None:
        config["num_layers"] = layers
    folder = work / "checkpoint"
    shutil.rmtree(work, ignore_errors=True)
    folder.mkdir(parents=True)
    size = write_checkpoint(folder, config)
    records = []
    for mode in ("off", "all"):
        _drop_from_cache(folder)
        out = work / f"artifact-{mode}"
        command = [
            sys.executable, "-m", "turbo_opt", "--quiet", "run", "wan2.1-t2v-14b/h200",
            "--set", f"model.source={folder}", "--out", str(out), "--no-cache", "--verify", mode,
        ]  # fmt: skip
        started = time.perf_counter()
        peak = _peak_of(command)
        seconds = time.perf_counter() - started
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        disk = _disk_seconds(folder, work / "probe", written)
        report = json.loads((out / "manifest.json").read_text())["history"]
        passes = {item["name"]: round(item["seconds"], 1) for item in report}
        ceiling = Ceiling(
            disk, "s", f"reading {size / 1e9:.1f} GB and writing {written / 1e9:.1f} GB"
        )
        facts = {
            "verify": mode, "checkpoint_gb": size / 1e9, "artifact_gb": written / 1e9,
            "peak_host_gib": peak / 2**30, "pass_seconds": passes, "layers": config["num_layers"],
        }  # fmt: skip
        name = f"cpu/wan2.1-t2v-14b-720p/optimize-verify-{mode}"
        records.append(_record(f"{name}_s", seconds, "s", 0.0, 1, facts, ceiling, disk / seconds))
        records.append(_record(f"{name}_peak_gib", peak / 2**30, "GiB", 0.0, 1, facts))
        print(
            f"{mode}: {seconds:.0f} s, disk {disk:.0f} s, peak {peak / 2**30:.2f} GiB",
            passes,
            flush=True,
        )
        shutil.rmtree(out)
    shutil.rmtree(work)
    return records


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """A diffusers folder with random bf16 transformer weights; bytes of the weights."""
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        },
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 5.0,
            "num_train_timesteps": 1000,
        },
    )
    _write_json(
        folder / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel", **config}
    )
    graph = export_denoiser("WanTransformer3DModel", config, torch.bfloat16, False)
    shapes = {
        name: tuple(meta.shape)
        for name, meta in graph.exported.state_dict.items()
        if name not in graph.tables
    }
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(_BLOCK, generator=generator) * 0.02).bfloat16()
    weight_map, total = {}, 0
    for number, names in enumerate(_shards(shapes), 1):
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        total += _write_shard(folder / "transformer" / file, {n: shapes[n] for n in names}, noise)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(
        folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if names and size + nbytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: torch.Tensor) -> int:
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for index, shape in enumerate(shapes.values()):
            left = torch.Size(shape).numel()
            rolled = noise.roll(index * 7919).view(torch.int16).numpy()
            while left:
                part = rolled[: min(left, _BLOCK)]
                handle.write(memoryview(part).cast("B"))
                left -= len(part)
        handle.flush()
        os.fsync(handle.fileno())
    return offset


def _disk_seconds(source: Path, probe: Path, written: int) -> float:
    """Read every byte of `source`, uncached, and write `written` bytes, synced."""
    _drop_from_cache(source)
    started = time.perf_counter()
    buffer = bytearray(_BLOCK)
    for path in sorted(source.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    with probe.open("wb", buffering=0) as handle:
        left = written
        while left:
            left -= handle.write(memoryview(buffer)[: min(left, _BLOCK)])
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    probe.unlink()
    return seconds


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _peak_of(command: list[str]) -> int:
    """Run a command; the peak resident set of the largest child so far, in bytes."""
    _run(command)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _record(
    name: str,
    value: float,
    unit: str,
    spread: float,
    runs: int,
    config: dict[str, Any],
    ceiling: Ceiling | None = None,
    share: float | None = None,
) -> Record:
    return Record(
        name=name,
        value=value,
        unit=unit,
        spread=spread,
        runs=runs,
        ceiling=ceiling,
        share_of_ceiling=share,
        config=config,
        environment=environment(),
        commit=results.current_commit(),
        date=results.today(),
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["capture", "optimize"])
    parser.add_argument("--work", type=Path, default=Path("large-model"), help="45 GB of room")
    parser.add_argument("--layers", type=int, help="fewer layers than 40, to try the script")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args()
    if options.what == "capture":
        records = capture_records(options.runs)
    else:
        records = optimize_records(options.work, options.layers)
    results.merge(options.out / "compile_large.json", records)
    print(results.tabulate(records))


if __name__ == "__main__":
    main()
