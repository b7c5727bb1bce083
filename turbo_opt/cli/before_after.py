"""The network before and after its passes, run alike, and what their clips have in common."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from turbo_opt.artifact.load import LoadedArtifact
    from turbo_opt.cli.compile import Compiled


def unoptimized(compiled: Compiled, after: LoadedArtifact) -> LoadedArtifact:
    """The program as captured, runnable like the artifact: same components, its own schedule."""
    from turbo_opt.artifact.load import LoadedArtifact
    from turbo_opt.runtime.module import CompiledTransformer

    captured = compiled.built.captured
    networks = {
        item.name: CompiledTransformer.build(
            item.exported, dict(item.weights.items_by_producer()), item.config, after.device
        )
        for item in captured
    }
    before = LoadedArtifact(after.path, after.manifest, networks, after.limits, after.components)
    before.schedule = captured.schedule
    return before


def warm_up(models: list[LoadedArtifact]) -> None:
    """One evaluation of each network and one decoding, so that no clip pays for first use."""
    import torch

    from turbo_opt.artifact.replay import run_replay
    from turbo_opt.runtime.components import load_components
    from turbo_opt.runtime.generate import clip_options, decode

    for model in models:
        options = clip_options(model.manifest)
        pipeline = load_components(model)
        pipeline.vae.to(model.device)
        for network in model.transformers.values():
            text_dim = int(network.config.get("text_dim", 4096))
            frames, spatial = (options.num_frames - 1) // 4 + 1, pipeline.vae_scale_factor_spatial
            latents = torch.zeros(
                1, network.config["in_channels"], frames,
                options.height // spatial, options.width // spatial,
            )  # fmt: skip
            inputs = {
                "hidden_states": latents.to(network.dtype),
                "timestep": torch.full((1,), 500.0),
                "encoder_hidden_states": torch.zeros(
                    1, options.max_sequence_length, text_dim, dtype=network.dtype
                ),
            }
            run_replay(network, inputs)
        decode(pipeline, latents.to(model.device))


def compare(clips: dict[str, np.ndarray], seconds: dict[str, float], prompt: str) -> dict[str, Any]:
    """Speed, agreement of the clips, and what the detectors see in each, as JSON values."""
    from turbo_opt.artifact.manifest import jsonable

    before, after = clips["before"], clips["after"]
    metrics = {
        "seconds_per_clip_before": seconds["before"],
        "seconds_per_clip_after": seconds["after"],
        "speed_up": seconds["before"] / seconds["after"],
        "psnr_db": psnr(before, after),
        "detected": {name: verdict(clip, prompt) for name, clip in clips.items()},
    }
    return jsonable(metrics)  # type: ignore[no-any-return]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 clips, 10·log10(255² / MSE), in dB."""
    import numpy as np

    error = float(np.square(one.astype(np.float64) - other.astype(np.float64)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def report_entries(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a demo's record adds to the report of its artifact, see `artifact.report`."""
    from turbo_opt.cli.tables import decibels, seconds, size

    metrics, totals = record["metrics"], record["totals"]
    before, after = metrics["seconds_per_clip_before"], metrics["seconds_per_clip_after"]
    bytes_before, bytes_after = totals["weight_bytes_before"], totals["weight_bytes_after"]
    speed = f"{metrics['speed_up']:.2f}×"
    evaluations = metrics["evaluations"]
    fewer = evaluations["before"] / evaluations["after"]
    rows = [
        (
            "network evaluations",
            str(evaluations["before"]),
            str(evaluations["after"]),
            f"{fewer:.3g}× fewer" if fewer > 1 else "",
        ),
        ("time per clip", seconds(before), seconds(after), f"{speed} as fast"),
        (
            "weights",
            size(bytes_before),
            size(bytes_after),
            f"{bytes_after / bytes_before:.0%} of the bytes",
        ),
    ]
    detected = metrics["detected"]
    if detected["before"] is not None:
        asked = f"shows what the prompt asks ({', '.join(detected['before'])})"
        rows.append((asked, _kept(detected["before"]), _kept(detected["after"]), ""))
    steps = "; fewer steps draw another clip" if fewer > 1 else " and sampling steps"
    notes = [f"Both clips have the same prompt and first noise{steps}."]
    if record["device"] == "cpu":
        notes.append(
            "Measured on a CPU, where operators without a CPU kernel run as their reference "
            "implementation: the speed-up says nothing about a GPU."
        )
    return {
        "context": {
            "measured on": record["machine"],
            "prompt": f"{record['prompt']} (seed {record['seed']})",
            "clip": record["clip"],
        },
        "metrics": {
            f"speed-up, {seconds(before)} → {seconds(after)} per clip": speed,
            "PSNR between the clips": psnr_text(metrics["psnr_db"]),
            **{
                f"SQNR of one evaluation, {name}": decibels(value)
                for name, value in totals["end_to_end_sqnr_db"].items()
            },
        },
        "comparison": [
            dict(zip(("measure", "before", "after", "change"), row, strict=True)) for row in rows
        ],
        "notes": notes,
    }


def _kept(found: Mapping[str, bool]) -> str:
    missing = [name for name, right in found.items() if not right]
    kept = f"{len(found) - len(missing)} of {len(found)}"
    return f"{kept}, not {', '.join(missing)}" if missing else kept


def machine(device: str) -> str:
    """The GPU, or the processor and the threads that torch uses, for people to read."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def clip_text(clip: np.ndarray) -> str:
    """`17 frames of 96×96`."""
    count, height, width, _ = clip.shape
    return f"{count} frames of {width}×{height}"


def psnr_text(value: float | str) -> str:
    """A PSNR as people read it; infinity, or its name in JSON, is `identical`."""
    return "identical" if value == "Infinity" else f"{float(value):.1f} dB"


def verdict(clip: np.ndarray, prompt: str) -> dict[str, bool] | None:
    """Which attributes of the caption a clip shows; None for a prompt that tiny-wan was not
    taught."""
    import torch

    from turbo_opt.calibration.tiny_wan.clips import parse_caption
    from turbo_opt.calibration.tiny_wan.detectors import score

    try:
        wanted = parse_caption(prompt)
    except ValueError:
        return None
    video = torch.from_numpy(clip).movedim(-1, 0).float() / 127.5 - 1
    return score(video, wanted)
