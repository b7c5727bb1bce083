"""Compile full-size models on this machine: time, peak host memory, throughput against the disk.

    python -m benchmarks.compile_large capture               # 1.3B and 14B graphs, no weights
    python -m benchmarks.compile_large optimize --work DIR   # a synthetic 28 GB checkpoint
    python -m benchmarks.compile_large checkpoint --work DIR --model 1.3b [--layers 2]

`optimize` writes a 14B checkpoint of random bf16 weights shard by shard, drops it from the page
cache, and runs `turbo-opt run wan2.1-t2v-14b/h200` on it, once with every match verified and once
without: whole time with its stages, rate of the stage that streams the weights, peak memory. The
ceiling is what the same disk takes to read the checkpoint and to write as many bytes as the
artifact has, past the cache, right before and right after each run. `checkpoint` writes such a
folder and no more, with what sparse-linear attention needs; a few layers are enough for
`turbo-opt bench kernels`.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.disk import disk_seconds
from benchmarks.forward import CASES
from benchmarks.results import Ceiling, Record
from turbo_opt.capture.export import export_denoiser
from turbo_opt.ir.disk import SequentialFile

_SHARD_BYTES = 5 * 10**9
_BLOCK = 16 * 2**20
_ARTIFACT_PERCENT = 51
"""Of a 16-bit checkpoint, what an artifact of 8-bit weights takes, roughly."""
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
        records += _optimize(folder, work / f"artifact-{mode}", mode, size)
        print(results.tabulate(records[-3:]), records[-1].config, flush=True)
    shutil.rmtree(work)
    return records


def _optimize(folder: Path, out: Path, mode: str, size: int) -> list[Record]:
    """One run, with the disk's own time for the same bytes right before and right after it."""
    sources = sorted(folder.rglob("*.safetensors"))
    command = [
        sys.executable, "-m", "turbo_opt", "run", "--json", "wan2.1-t2v-14b/h200",
        "--set", f"model.source={folder}", "--out", str(out), "--no-cache", "--verify", mode,
    ]  # fmt: skip
    before = disk_seconds(sources, _ARTIFACT_PERCENT * size // 100, out.with_name("probe"))
    _drop_from_cache(folder)
    started = time.perf_counter()
    output, peak = _run_for_peak(command)
    seconds = time.perf_counter() - started
    report = json.loads(output)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    after = disk_seconds(sources, written, out.with_name("probe"))
    shutil.rmtree(out)
    stages = report["totals"]["stage_seconds"]
    stages = {"start": seconds - sum(stages.values()), **stages}
    streaming = stages["weights"]
    disk = (before + after) / 2
    moved = (size + written) / 1e9
    what = f"direct input and output of the same {size / 1e9:.1f} and {written / 1e9:.1f} GB"
    facts = {
        "verify": mode, "checkpoint_gb": size / 1e9, "artifact_gb": written / 1e9,
        "peak_host_gib": peak / 2**30,
        "stage_seconds": {name: round(value, 2) for name, value in stages.items()},
        "pass_seconds": {row["name"]: round(row["seconds"], 2) for row in report["passes"]},
        "disk_seconds_before_and_after": [round(before, 2), round(after, 2)],
        "streaming_read_gb_per_s": size / 1e9 / streaming,
        "streaming_write_gb_per_s": written / 1e9 / streaming,
    }  # fmt: skip
    name = f"cpu/wan2.1-t2v-14b-720p/optimize-verify-{mode}"
    whole, rate = Ceiling(disk, "s", what), Ceiling(moved / disk, "GB/s", what)
    return [
        _record(f"{name}_s", seconds, "s", 0.0, 1, facts, whole, disk / seconds),
        _record(
            f"{name}_streaming_gb_per_s", moved / streaming, "GB/s", 0.0, 1, facts, rate,
            disk / streaming,
        ),
        _record(f"{name}_peak_gib", peak / 2**30, "GiB", 0.0, 1, facts),
    ]  # fmt: skip


def write_checkpoint(folder: Path, config: dict[str, Any], *, sparse: bool = True) -> int:
    """A diffusers folder of random bf16 weights; bytes of the weights.

    Args:
        sparse: with the projections of sparse-linear attention.
    """
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
    _write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan"})
    _write_json(
        folder / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel", **config}
    )
    graph = export_denoiser("WanTransformer3DModel", config, torch.bfloat16, False)
    shapes = {
        name: tuple(meta.shape)
        for name, meta in graph.exported.state_dict.items()
        if name not in graph.tables
    }
    for layer in range(config["num_layers"] if sparse else 0):
        stem = f"blocks.{layer}.attn1.proj_l"
        shapes |= {f"{stem}.weight": (128, 128), f"{stem}.bias": (128,)}
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
    with ThreadPoolExecutor(1) as disk, SequentialFile(path, disk) as file:
        file.write(memoryview(struct.pack("<Q", len(text)) + text))
        for index, shape in enumerate(shapes.values()):
            left = torch.Size(shape).numel()
            rolled = noise.roll(index * 7919).view(torch.int16).numpy()
            while left:
                part = rolled[: min(left, _BLOCK)]
                file.write(memoryview(part).cast("B"))
                left -= len(part)
        file.close()
    return offset


def _drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _run_for_peak(command: list[str]) -> tuple[str, int]:
    """Run a command; its output, and the peak resident set of the largest child so far."""
    return _run(command), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


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
    return results.new_record(
        name, value, unit, spread, runs,
        config=config, ceiling=ceiling, share_of_ceiling=share, environment=environment(),
    )  # fmt: skip


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["capture", "optimize", "checkpoint"])
    parser.add_argument("--work", type=Path, default=Path("large-model"), help="45 GB of room")
    parser.add_argument("--model", choices=sorted(CASES), default="14b", help="of `checkpoint`")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args()
    if options.what == "checkpoint":
        layers = {} if options.layers is None else {"num_layers": options.layers}
        write_checkpoint(options.work, {**CASES[options.model].config, **layers})
        return
    if options.what == "capture":
        records = capture_records(options.runs)
    else:
        records = optimize_records(options.work, options.layers)
    results.merge(options.out / "compile_large.json", records)
    print(results.tabulate(records))


if __name__ == "__main__":
    main()
