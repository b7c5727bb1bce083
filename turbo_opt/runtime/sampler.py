"""The sampling loop, as the schedule says: x goes from noise at t = 1 to a clip at t = 0.

Rectified flow: x_t = (1 − t)·x₀ + t·ε, and the network predicts v = ε − x₀. One step t → t′:

    euler     x ← x + (t′ − t)·v                                float32
    rcm-ode   x ← x − (t − t′)·v                                float64
    rcm-sde   x ← (1 − t′)·(x − t·v) + t′·ε′,  ε′ ~ N(0, 1)     float64   (rCM, arXiv 2510.08431)
    scheduler the diffusers scheduler named by the schedule
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from turbo_opt.errors import BadInput
from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.runtime.module import CompiledTransformer

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) after every step."""


def initial_latents(
    schedule: Schedule,
    shape: tuple[int, ...],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The first x, (B, C, F, H, W) in the schedule's dtype: unit noise times its scale.

    Drawn in float32 where the generator lives and then moved, so that a CPU generator gives the
    same clip on every device; the draw is that of diffusers' `prepare_latents`.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    noise = noise.to(device, schedule.dtype)
    return noise * schedule.initial_noise_scale if schedule.initial_noise_scale != 1 else noise


@torch.no_grad()
def sample(
    transformers: Mapping[str, Any],
    schedule: Schedule,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None = None,
    *,
    latents: Tensor,
    generator: torch.Generator | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Run every step of `schedule` on `latents`.

    Args:
        transformers: denoiser name → network with diffusers' call.
        prompt_embeds, negative_prompt_embeds: text embeddings (B, L_text, C_text); the negative
            ones are needed where a step is guided.
        latents: the first x, (B, C, F, H, W); see `initial_latents`.
        generator: source of the noise that `rcm-sde` adds.
        conditions: further inputs of the network, given at every step.

    Returns:
        The last x, float32. On a CPU it is, bit for bit, what diffusers' pipeline gives.

    Raises:
        BadInput: the schedule needs something that was not given, or mixes rules that cannot be.
    """
    _check(transformers, schedule, negative_prompt_embeds)
    stepper = _Scheduler(schedule, latents.device)
    # The same tensors at every step: a compiled network knows them again by identity.
    dtypes = {transformers[step.denoiser].dtype for step in schedule.steps}
    prompts = {dtype: prompt_embeds.to(dtype) for dtype in dtypes}
    negatives = {}
    if negative_prompt_embeds is not None:
        negatives = {dtype: negative_prompt_embeds.to(dtype) for dtype in dtypes}
    x = latents
    for index, step in enumerate(schedule.steps):
        network = transformers[step.denoiser]
        inputs = {
            "hidden_states": x.to(network.dtype),
            "timestep": _timestep(schedule, step, x, network),
            **(conditions or {}),
        }
        prompt, negative = prompts[network.dtype], negatives.get(network.dtype)
        v = _predict(network, inputs, prompt, negative, step.guidance_scale)
        if step.rule == "scheduler":
            x = stepper.step(index, v, x.float())
        else:
            x = advance(step, v, x, generator)
        progress(index + 1, len(schedule.steps))
    return x.float()


def advance(step: Step, v: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """x after one step of a rule of ours; float64 for the rCM rules, else float32.

    Args:
        v: the network's prediction at `step.time`.
    """
    if step.rule == "euler":
        return x.float() + (step.next_time - step.time) * v.float()
    x, v = x.double(), v.double()
    if step.rule == "rcm-ode":
        return x - (step.time - step.next_time) * v
    clean = x - step.time * v
    if step.next_time == 0:
        return clean
    where = generator.device if generator is not None else x.device
    noise = torch.randn(x.shape, generator=generator, device=where).to(x)
    return (1 - step.next_time) * clean + step.next_time * noise


def _predict(
    network: Any,
    inputs: Mapping[str, Tensor],
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    guidance_scale: float | None,
) -> Tensor:
    def run(embeds: Tensor) -> Tensor:
        return network(**inputs, encoder_hidden_states=embeds, return_dict=False)[0]  # type: ignore[no-any-return]

    conditional = run(prompt_embeds)
    if guidance_scale is None:
        return conditional
    assert negative_prompt_embeds is not None
    unconditional = run(negative_prompt_embeds)
    return unconditional + guidance_scale * (conditional - unconditional)


def _timestep(schedule: Schedule, step: Step, x: Tensor, network: Any) -> Tensor:
    if not schedule.expand_timesteps:
        # A compiled network looks the value up; on a GPU, reading it would wait for the last step.
        device = "cpu" if isinstance(network, CompiledTransformer) else x.device
        return torch.full((x.shape[0],), step.timestep, dtype=torch.float32, device=device)
    patch = network.config["patch_size"]
    tokens = math.prod(side // size for side, size in zip(x.shape[2:], patch, strict=True))
    value = torch.tensor(step.timestep, dtype=torch.float32, device=x.device)
    return value.expand(x.shape[0], tokens)


def _check(
    transformers: Mapping[str, Any], schedule: Schedule, negative_prompt_embeds: Tensor | None
) -> None:
    for step in schedule.steps:
        if step.denoiser not in transformers:
            raise BadInput(f"the schedule runs {step.denoiser!r}, there is {sorted(transformers)}")
        if step.guidance_scale is not None and negative_prompt_embeds is None:
            raise BadInput("the schedule is guided: negative_prompt_embeds are needed")


class _Scheduler:
    """The diffusers scheduler behind the `scheduler` rule; it keeps the history of its steps."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        rules = {step.rule for step in schedule.steps}
        if "scheduler" not in rules:
            return
        if len(rules) > 1:
            raise BadInput(
                f"a schedule cannot mix {sorted(rules)}: a multistep scheduler needs all steps"
            )
        from turbo_opt.capture.sampling import make_scheduler

        self._scheduler = make_scheduler(schedule.scheduler)
        self._scheduler.set_timesteps(schedule.scheduler["num_inference_steps"], device=device)
        expected = self._scheduler.timesteps.tolist()
        if [step.timestep for step in schedule.steps] != expected:
            raise BadInput(
                f"the schedule's {len(schedule.steps)} steps are not the {len(expected)} that its "
                f"{schedule.scheduler['class']} makes"
            )
        self._scheduler.set_begin_index(0)

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor:
        timestep = self._scheduler.timesteps[index]
        return self._scheduler.step(v, timestep, x, return_dict=False)[0]  # type: ignore[no-any-return]
