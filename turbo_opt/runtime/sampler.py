"""The sampling loop, as the schedule says: x goes from noise at t = 1 to a clip at t = 0.

Steps follow the rules of `rules`, or the diffusers scheduler that the schedule names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turbo_opt.errors import BadInput
from turbo_opt.ir.schedule import Schedule, Step
from turbo_opt.runtime.loop_graph import ClipLoop, StepCall, why_not
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.rules import advance, drawn_noise, guided

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all) after every step; of a clip that is one CUDA graph, every step at
once, after it was launched. A GPU may still be working in both cases: nothing waits for it."""


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
    loop_graph: bool = False,
) -> Tensor:
    """Run every step of `schedule` on `latents`.

    Args:
        transformers: denoiser name → network with diffusers' call.
        prompt_embeds, negative_prompt_embeds: text embeddings (B, L_text, C_text); the negative
            ones are needed where a step is guided.
        latents: the first x, (B, C, F, H, W); see `initial_latents`.
        generator: source of the noise that `rcm-sde` adds.
        conditions: further inputs of the network, given at every step.
        loop_graph: where it can be, replay the whole clip as one CUDA graph from the second of its
            kind on; `CompiledTransformer.loop_graph_status` says whether it is, or why not.

    Returns:
        The last x, float32. On a CPU it is, bit for bit, what diffusers' pipeline gives.

    Raises:
        BadInput: the schedule needs something that was not given, or mixes rules that cannot be.
    """
    _check(transformers, schedule, negative_prompt_embeds)
    stepper = _Scheduler(schedule, latents.device)
    calls = _calls(
        transformers, schedule, latents, prompt_embeds, negative_prompt_embeds, conditions or {}
    )
    noise: Iterator[Tensor | None] = (
        drawn_noise(step, latents, generator) for step in schedule.steps
    )
    reason = why_not(calls, latents, loop_graph)
    if reason is not None:
        x = _step_by_step(calls, stepper, latents, noise, progress)
        _tell(calls, reason)
        return x
    loop = ClipLoop(calls, latents)
    if loop.is_known:
        drawn = list(noise)
        replayed = loop.replay(drawn)
        _tell(calls, loop.status)
        if replayed is not None:
            for done in range(len(calls)):
                progress(done + 1, len(calls))
            return replayed
        noise = iter(drawn)
    x = _step_by_step(calls, stepper, latents, noise, progress)
    loop.made()
    _tell(calls, loop.status)
    return x


def _step_by_step(
    calls: Sequence[StepCall],
    stepper: _Scheduler,
    x: Tensor,
    noise: Iterator[Tensor | None],
    progress: Progress,
) -> Tensor:
    for index, call in enumerate(calls):
        latents = x.to(call.network.dtype)
        predictions = [
            call.network(hidden_states=latents, **given, return_dict=False)[0]
            for given in call.inputs
        ]
        v = guided(predictions, call.step.guidance_scale)
        if call.step.rule == "scheduler":
            x = stepper.step(index, v, x.float())
        else:
            x = advance(call.step, v, x, next(noise))
        progress(index + 1, len(calls))
    return x.float()


def _tell(calls: Sequence[StepCall], status: str) -> None:
    for call in calls:
        if isinstance(call.network, CompiledTransformer):
            call.network.loop_graph_status = status


def _calls(
    transformers: Mapping[str, Any],
    schedule: Schedule,
    latents: Tensor,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    conditions: Mapping[str, Tensor],
) -> list[StepCall]:
    # The same tensors at every step: a compiled network knows them again by identity.
    dtypes = {transformers[step.denoiser].dtype for step in schedule.steps}
    prompts = {dtype: [_own(prompt_embeds.to(dtype))] for dtype in dtypes}
    if negative_prompt_embeds is not None:
        for dtype, embeds in prompts.items():
            embeds.append(_own(negative_prompt_embeds.to(dtype)))
    conditions = {name: _own(tensor) for name, tensor in conditions.items()}
    calls = []
    for step in schedule.steps:
        network = transformers[step.denoiser]
        given = {"timestep": _timestep(schedule, step, latents, network), **conditions}
        calls.append(
            StepCall(
                step,
                network,
                tuple(
                    {**given, "encoder_hidden_states": embeds}
                    for embeds in prompts[network.dtype][: step.evaluations]
                ),
            )
        )
    return calls


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode: torch does not count writes to
    those, so nothing that was computed from them could be known again."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


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
