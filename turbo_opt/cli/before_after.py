"""The network before and after its passes, run alike, and what their clips have in common."""

from __future__ import annotations

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
        options = clip_options(model)
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
