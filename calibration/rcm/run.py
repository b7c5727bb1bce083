"""Jobs of `turbo-opt calibrate rcm`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from turbo_opt.calibration.data.samples import EMPTY_PROMPT, SampleSet
from turbo_opt.calibration.flow import Denoiser, NoiseLevels
from turbo_opt.calibration.jobs.run import Parts, open_parts, train
from turbo_opt.calibration.networks import build_network
from turbo_opt.calibration.places import Progress, Report, Say, unheard
from turbo_opt.calibration.rcm.objective import FAKE, RCMObjective
from turbo_opt.calibration.rcm.schema import Distillation, RCMJob
from turbo_opt.calibration.rcm.tangents import carry_tangents
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import (
    check_start,
    initial_values,
    make_sparse,
    set_attention,
)
from turbo_opt.calibration.training.blocks import set_up_blocks
from turbo_opt.calibration.training.context import share_tokens
from turbo_opt.calibration.training.loop import Trainer
from turbo_opt.calibration.training.world import World
from turbo_opt.checkpoints.student import METHOD
from turbo_opt.errors import BadInput
from turbo_opt.ir.rcm import rcm_schedule
from turbo_opt.ir.schedule import Schedule


def train_rcm(
    job: RCMJob,
    out: Path,
    world: World,
    *,
    resume: bool = False,
    progress: Progress,
    say: Say = unheard,
) -> Report:
    """Distil a student and write `out/model`. All processes call.

    Raises:
        BadInput: the job, its data or its models do not fit; nothing was written.
        TurboOptError: the loss or a gradient is not finite.
    """
    parts = open_parts(job, job.student.start, say)
    if len(parts.teacher.pipeline.denoisers) > 1:
        raise BadInput(
            f"teacher.source: {parts.teacher.pipeline.path} has two denoisers; a student is "
            "sampled from pure noise to a clip by one, so only models of one are distilled"
        )
    check_start(job.sla, parts.start, say)
    empty_prompt = _empty_prompt(job, parts.samples)

    def slow_down_fake_score(trainer: Trainer) -> None:
        if job.rcm.reverse is not None:
            trainer.trainees[FAKE].rate_scale = job.rcm.reverse.fake_rate

    return train(
        parts,
        out,
        world,
        lambda: _objective(parts, empty_prompt, world),
        resume=resume,
        progress=progress,
        say=say,
        schedule=_schedule(parts),
        adjust=slow_down_fake_score,
        declared={"distillation": METHOD, "sigma_max": str(job.rcm.sigma_max)},
        remarks=lambda steps: remarks(job.rcm, steps),
    )


def remarks(settings: Distillation, steps: int) -> list[str]:
    """What there is to say of a training that ended after so many steps: that it had no reverse
    term, though the job asks for one."""
    reverse = settings.reverse
    if reverse is None or steps >= settings.warm_up + reverse.student_every:
        return []
    return [
        f"none of the {steps} steps trained the student by rcm's reverse term: the first that does "
        f"is step {settings.warm_up + reverse.student_every}, as rcm.warm_up is {settings.warm_up} "
        f"and rcm.reverse.student_every {reverse.student_every}; lower them, train for longer, or "
        "set rcm.reverse to null"
    ]


def _empty_prompt(job: RCMJob, samples: SampleSet) -> Tensor | None:
    scale = job.rcm.guidance_scale
    if scale == 1:
        return None
    try:
        return samples.empty_prompt()
    except BadInput as error:
        raise BadInput(
            f"{samples.path / EMPTY_PROMPT}: missing or broken, and guidance needs the empty "
            "prompt's embeddings; make the set with turbo-opt calibrate data, or set "
            f"rcm.guidance_scale to 1, now {scale:g}"
        ) from error


def _objective(parts: Parts[RCMJob], empty_prompt: Tensor | None, world: World) -> RCMObjective:
    job, group = parts.job, world.context_group
    fill = initial_values(job.sla, parts.teacher.config) if job.sla else {}

    def share(network: nn.Module) -> None:
        if group is not None:
            set_attention(network, attend_densely, group)
            share_tokens(network, group)

    def frozen(network: nn.Module) -> None:
        share(network)
        network.requires_grad_(False)
        set_up_blocks(network, compile=job.training.compile)

    def trained(network: nn.Module) -> None:
        share(network)
        set_up_blocks(network, job.training.activations, job.training.compile)

    def student(network: nn.Module) -> None:
        trained(network)
        if job.sla is not None:
            make_sparse(network, job.sla, group)
        elif job.rcm.forward.needs_jvp:
            carry_tangents(network)

    def denoiser(network: nn.Module) -> Denoiser:
        return Denoiser(network, parts.teacher)

    return RCMObjective(
        denoiser(build_network(parts.start, world, student, fill)),
        denoiser(build_network(parts.teacher, world, frozen)),
        denoiser(build_network(parts.teacher, world, trained)) if job.rcm.reverse else None,
        job.rcm,
        NoiseLevels.of(job.noise, parts.teacher),
        None if empty_prompt is None else empty_prompt.to(world.device),
        job.data.unconditional_share,
    )


def _schedule(parts: Parts[RCMJob]) -> Schedule | None:
    """The student's steps of the clips that the job draws."""
    job = parts.job
    if job.samples is None:
        return None
    components = parts.teacher.pipeline.components
    return rcm_schedule(
        job.samples.num_inference_steps,
        job.rcm.sigma_max,
        "sde",
        expand_timesteps=components.pipeline_config.get("expand_timesteps", False),
    )
