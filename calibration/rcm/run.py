"""Jobs of `turbo-opt calibrate rcm`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from turbo_opt.calibration.components import Preview
from turbo_opt.calibration.data.batches import split
from turbo_opt.calibration.data.samples import EMPTY_PROMPT, SampleSet
from turbo_opt.calibration.export import export_model
from turbo_opt.calibration.fits import check_fits, check_shares
from turbo_opt.calibration.flow import Denoiser, NoiseLevels
from turbo_opt.calibration.networks import (
    DenoiserFolder,
    build_network,
    check_same_architecture,
    open_denoiser,
)
from turbo_opt.calibration.places import (
    MODEL,
    REPORT,
    SAMPLES,
    Progress,
    Report,
    begin_job,
)
from turbo_opt.calibration.rcm.objective import FAKE, STUDENT, RCMObjective
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.rcm.tangents import carry_tangents
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import (
    PROJECTION,
    add_projections,
    attend_sparsely,
    set_attention,
    zero_projections,
)
from turbo_opt.calibration.training.context import share_tokens
from turbo_opt.calibration.training.logs import check_tensorboard
from turbo_opt.calibration.training.loop import Trainer, micro_batch
from turbo_opt.calibration.training.memory import save_activations
from turbo_opt.calibration.training.world import World
from turbo_opt.checkpoints.student import METHOD
from turbo_opt.errors import BadInput
from turbo_opt.ir.rcm import rcm_schedule


@dataclass(frozen=True)
class _Parts:
    job: RCMJob
    samples: SampleSet
    teacher: DenoiserFolder
    start: DenoiserFolder
    empty_prompt: Tensor | None


def train_rcm(
    job: RCMJob, out: Path, world: World, *, resume: bool = False, progress: Progress
) -> Report:
    """Distil a student and write `out/model`. All processes call.

    Raises:
        BadInput: the job, its data or its models do not fit; nothing was written.
        TurboOptError: the loss or a gradient is not finite.
    """
    parts = _open(job)
    micro_batch(job, world)
    check_shares(parts.samples, parts.teacher, world)
    check_tensorboard(job.log.tensorboard)
    if world.is_main:
        begin_job(out, job, resume)
    world.wait()
    started = time.monotonic()
    objective = _objective(parts, world)
    trainer = Trainer(job, out, objective, parts.samples, world, _preview(parts, out, world))
    if job.rcm.reverse is not None:
        trainer.trainees[FAKE].rate_scale = job.rcm.reverse.fake_rate
    if resume:
        trainer.resume()
    first = trainer.step
    before, after = trainer.run(lambda done, total, note: progress("train", done, total, note))
    with trainer.shipped.averaged(job.export.average):
        report = {
            "job": "rcm",
            "model": str(out / MODEL),
            "steps": trainer.step,
            "first_step": first,
            "seconds": time.monotonic() - started,
            "before": before,
            "after": after,
            "broken_samples": len(parts.samples.broken),
        }
        _export(parts, objective.trained[STUDENT], out, report, world)
    return report


def _open(job: RCMJob) -> _Parts:
    """Everything that can be wrong, before any weight is read."""
    teacher = open_denoiser(job.teacher.source, job.teacher.denoiser, job.folder)
    if len(teacher.pipeline.denoisers) > 1:
        raise BadInput(
            f"teacher.source: {teacher.pipeline.path} has two denoisers; a student is sampled from "
            "pure noise to a clip by one, so only models of one are distilled"
        )
    start = teacher
    if job.student.start is not None:
        start = open_denoiser(str(job.path(job.student.start)), teacher.name)
        check_same_architecture(teacher, start)
    samples = SampleSet.open(job.path(job.data.folder), job.data.broken_share)
    split(samples, job.data.held_out)
    check_fits(samples, teacher)
    return _Parts(job, samples, teacher, start, _empty_prompt(job, samples))


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


def _objective(parts: _Parts, world: World) -> RCMObjective:
    job, group = parts.job, world.context_group
    zeros = zero_projections(parts.teacher.config) if job.sla else {}

    def share(network: nn.Module) -> None:
        if group is not None:
            set_attention(network, attend_densely, group)
            share_tokens(network, group)

    def frozen(network: nn.Module) -> None:
        share(network)
        network.requires_grad_(False)

    def trained(network: nn.Module) -> None:
        share(network)
        save_activations(network, job.training.activations)

    def student(network: nn.Module) -> None:
        trained(network)
        if job.sla is not None:
            add_projections(network)
            sla = job.sla
            sparsity = Sparsity(sla.topk, sla.block_q, sla.block_k, sla.feature_map)
            set_attention(network, attend_sparsely(sparsity), group)
            if sla.trained == PROJECTION:
                for name, parameter in network.named_parameters():
                    parameter.requires_grad_(f".{PROJECTION}." in name)
        elif job.rcm.forward.needs_jvp:
            carry_tangents(network)

    def denoiser(network: nn.Module) -> Denoiser:
        return Denoiser(network, parts.teacher)

    empty = parts.empty_prompt
    return RCMObjective(
        denoiser(build_network(parts.start, world, student, zeros)),
        denoiser(build_network(parts.teacher, world, frozen)),
        denoiser(build_network(parts.teacher, world, trained)) if job.rcm.reverse else None,
        job.rcm,
        NoiseLevels.of(job.noise, parts.teacher),
        None if empty is None else empty.to(world.device),
        job.data.unconditional_share,
    )


def _preview(parts: _Parts, out: Path, world: World) -> Preview | None:
    job, index = parts.job, parts.samples.index
    if job.samples is None:
        return None
    return Preview(
        parts.teacher,
        job.samples,
        out / SAMPLES,
        index.latents,
        index.text_length,
        getattr(torch, job.training.compute_dtype),
        world,
        rcm_schedule(
            job.samples.num_inference_steps,
            job.rcm.sigma_max,
            "sde",
            expand_timesteps=parts.teacher.pipeline.components.pipeline_config.get(
                "expand_timesteps", False
            ),
        ),
    )


def _export(parts: _Parts, student: nn.Module, out: Path, report: Report, world: World) -> None:
    values = {name: parameter.detach() for name, parameter in student.named_parameters()}
    export_model(
        parts.teacher,
        values,
        out / MODEL,
        getattr(torch, parts.job.export.dtype),
        {"job": parts.job.canonical(), "report": report},
        world,
        declared={"distillation": METHOD, "sigma_max": str(parts.job.rcm.sigma_max)},
    )
    if world.is_main:
        (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
