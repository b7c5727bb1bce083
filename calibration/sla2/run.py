"""Jobs of `turbo-opt calibrate router`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from turbo_opt.calibration.flow import Denoiser, NoiseLevels
from turbo_opt.calibration.jobs.run import Parts, open_parts, shipped_weights, train
from turbo_opt.calibration.networks import build_network
from turbo_opt.calibration.places import Progress, Report, Say, unheard
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla2.compare import Choose, straight_through
from turbo_opt.calibration.sla2.objective import RouterObjective
from turbo_opt.calibration.sla2.router import Routers
from turbo_opt.calibration.sla2.schema import RouterJob, Routing
from turbo_opt.calibration.sla2.soft import soft_topk
from turbo_opt.calibration.training.objective import Objective
from turbo_opt.calibration.training.world import World


def train_router(
    job: RouterJob,
    out: Path,
    world: World,
    *,
    resume: bool = False,
    progress: Progress,
    say: Say = unheard,
) -> Report:
    """Train routers and ratios, and write `out/model`: the teacher with them. All processes call.

    Raises:
        BadInput: the job, its data or its model do not fit; nothing was written.
        TurboOptError: the loss or a gradient is not finite.
    """
    parts = open_parts(job, say=say)
    return train(
        parts,
        out,
        world,
        lambda: _objective(parts, world),
        resume=resume,
        progress=progress,
        say=say,
        weights=_teacher_with_routers,
    )


def _objective(parts: Parts[RouterJob], world: World) -> RouterObjective:
    job, settings = parts.job, parts.job.router
    return RouterObjective(
        _routers(parts, world),
        Denoiser(build_network(parts.teacher, world, _freeze), parts.teacher),
        NoiseLevels.of(job.noise, parts.teacher),
        Sparsity(settings.topk, settings.block_q, settings.block_k, settings.feature_map),
        _choice(settings),
        settings.query_blocks,
        job.data.unconditional_share,
    )


def _choice(settings: Routing) -> Choose:
    if settings.choice == "soft":
        return functools.partial(soft_topk, temperature=settings.temperature)
    return functools.partial(straight_through, temperature=settings.temperature)


def _routers(parts: Parts[RouterJob], world: World) -> Routers:
    routers = Routers(parts.teacher.config).reset().to(world.device)
    if world.size > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(routers, mesh=world.mesh, reshard_after_forward=True)
    return routers


def _freeze(network: nn.Module) -> None:
    network.requires_grad_(False)


def _teacher_with_routers(objective: Objective) -> Mapping[str, Tensor]:
    assert isinstance(objective, RouterObjective)
    teacher = objective.teacher.network
    frozen = {name: parameter.detach() for name, parameter in teacher.named_parameters()}
    return frozen | shipped_weights(objective)
