"""From a diffusers folder to a Program, without reading a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.weights import dtype_from_name


def capture(
    source: str,
    *,
    dtype: str = "bfloat16",
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    guidance_scale_2: float | None = None,
    flow_shift: float | None = None,
    base: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Program:
    """Capture every denoiser of a Wan pipeline as a weight-free graph.

    Args:
        source: `tiny-wan`, a diffusers folder, or a hub id.
        dtype: `bfloat16`, `float16` or `float32`: what the networks compute in. Modules that
            diffusers keeps in float32 stay so.
        num_inference_steps, guidance_scale, guidance_scale_2, flow_shift: the sampling loop to
            write down as the program's schedule.
        base: folder that a relative `source` is tried against.
        progress: told the name of each denoiser before it is traced.

    Raises:
        BadInput: the folder is no Wan pipeline, or its weights do not fit its config.
    """
    from turbo_opt.capture.checkpoint import open_checkpoint
    from turbo_opt.capture.export import export_denoiser
    from turbo_opt.capture.folder import open_pipeline
    from turbo_opt.capture.sampling import pipeline_schedule

    folder = open_pipeline(source, base)
    schedule = pipeline_schedule(
        folder.path,
        folder.components,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        flow_shift=flow_shift,
    )
    denoisers: dict[str, Denoiser] = {}
    for name, (class_name, config) in folder.denoisers.items():
        progress(name)
        graph = export_denoiser(
            class_name, config, dtype_from_name(dtype), schedule.expand_timesteps
        )
        checkpoint = open_checkpoint(folder.path / name, graph.exported.state_dict, graph.tables)
        denoisers[name] = Denoiser(
            name, graph.exported, checkpoint.weights, class_name, config, unread=checkpoint.unread
        )
    return Program(denoisers, schedule, folder.components)
