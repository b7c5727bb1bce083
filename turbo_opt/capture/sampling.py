"""The sampling loop that a diffusers pipeline would run, written down as a Schedule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Components
from turbo_opt.ir.rcm import RCM_SCHEDULER, SIGMA_MAX, rcm_schedule
from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.json_files import read_json


def pipeline_schedule(
    folder: Path,
    components: Components,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_scale_2: float | None = None,
    flow_shift: float | None = None,
) -> Schedule:
    """The steps of the pipeline's own scheduler; those of an rCM student are unguided.

    Two experts switch at `boundary_ratio`: steps at or above it run `transformer`, the others
    `transformer_2` (diffusers, WanPipeline).

    Raises:
        BadInput: the scheduler is unknown to diffusers or is not one for flow prediction.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    name = str(config.get("_class_name", ""))
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if flow_shift is not None:
        settings["shift" if name.startswith("FlowMatch") else "flow_shift"] = flow_shift
    boundary = components.pipeline_config.get("boundary_ratio")
    expand_timesteps = bool(components.pipeline_config.get("expand_timesteps", False))
    if name == RCM_SCHEDULER:
        return rcm_schedule(
            num_inference_steps,
            SIGMA_MAX if settings.get("sigma_max") is None else settings["sigma_max"],
            settings.get("rule", "sde"),
            boundary=boundary,
            expand_timesteps=expand_timesteps,
        )
    scheduler = make_scheduler({"class": name, "config": settings})
    scheduler.set_timesteps(num_inference_steps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    train_steps = settings.get("num_train_timesteps", 1000)
    steps = []
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        high = boundary is None or timestep >= boundary * train_steps
        scale = guidance_scale if high or guidance_scale_2 is None else guidance_scale_2
        steps.append(
            Step(
                time=sigmas[index],
                next_time=sigmas[index + 1],
                timestep=float(timestep),
                denoiser="transformer" if high else "transformer_2",
                guidance_scale=scale if guidance_scale > 1 else None,
            )
        )
    return Schedule(
        steps=tuple(steps),
        scheduler={
            "class": name,
            "config": settings,
            "num_inference_steps": num_inference_steps,
        },
        initial_noise_scale=float(scheduler.init_noise_sigma),
        expand_timesteps=expand_timesteps,
    )


def make_scheduler(description: Mapping[str, Any]) -> Any:
    """A diffusers scheduler from `Schedule.scheduler`.

    Raises:
        BadInput: diffusers has no scheduler of that name.
    """
    import diffusers

    name = description["class"]
    known = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if known is None:
        raise BadInput(f"scheduler_config.json: diffusers has no scheduler {name!r}")
    return known.from_config(dict(description["config"]))
