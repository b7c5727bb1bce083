"""Run by torchrun: jobs on two processes, sharing each batch, or each clip.

The first is resumed, so that its last step is made from a checkpoint of two processes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.run import train_rcm
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla.run import solve_sla, train_sla
from turbo_opt.calibration.sla2.run import train_router
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training.trainee import Trainee
from turbo_opt.calibration.training.world import World, start_world
from turbo_opt.errors import BadInput, TurboOptError

DIVERGING = ["training.rate=1e20", "training.steps=1", "data.held_out=0"]
DISCRETE = ["rcm.forward.form=discrete", "rcm.forward.tangent=difference"]
THREE = ["closed_form.clips=3"]  # one process has a clip more than the other


def main(home: Path, out: Path) -> None:
    torch.set_num_threads(1)
    job = load_job(home / "job.yaml", SLAJob)
    with start_world("cpu", context_size=2) as context:
        data = dataclasses.replace(context, context_size=1, context_group=None)
        train_sla(job, out / "data", data, progress=quiet)
        unsaved = load_job(home / "unsaved.yaml", SLAJob)
        train_sla(unsaved, out / "context", context, progress=quiet)
        train_router(
            load_job(home / "router.yaml", RouterJob), out / "router", data, progress=quiet
        )
        solved = load_job(home / "job.yaml", SLAJob, THREE)
        solve_sla(solved, out / "solved", data, progress=quiet)
        distilled = load_job(home / "rcm.yaml", RCMJob)
        train_rcm(distilled, out / "rcm", data, progress=quiet)
        shared = load_job(home / "rcm.yaml", RCMJob, DISCRETE)
        train_rcm(shared, out / "discrete", context, progress=quiet)
        led = load_job(home / "companion.yaml", SLAJob)
        train_sla(led, out / "companion", context, progress=quiet)
        routed = load_job(home / "routed.yaml", SLAJob)
        train_sla(routed, out / "routed", context, progress=quiet)
        # Stopped after the third step, and gone on.
        if data.is_main:
            (out / "data" / "checkpoints" / "latest").write_text("step-000003\n")
        data.wait()
        train_sla(job, out / "data", data, resume=True, progress=quiet)
        try:
            train_sla(job, out / "data", data, progress=quiet)
        except BadInput as error:
            (out / f"refused-{data.rank}.txt").write_text(str(error))
        for share in ("0.5", "0.25"):
            try:
                broken = load_job(home / "broken.yaml", SLAJob, [f"data.broken_share={share}"])
                train_sla(broken, out / f"broken-{share}", data, progress=quiet)
            except BadInput as error:
                (out / f"broken-{data.rank}.txt").write_text(str(error))
        try:
            diverging = load_job(home / "job.yaml", SLAJob, DIVERGING)
            train_sla(diverging, out / "diverged", data, progress=quiet)
        except TurboOptError as error:
            (out / f"diverged-{data.rank}.txt").write_text(str(error))
        (out / f"finite-{data.rank}.txt").write_text(str(finite_with_one_part_spoiled(job, data)))


def finite_with_one_part_spoiled(job: SLAJob, world: World) -> list[bool]:
    """What each process is told of a network, before and after the last one spoils a weight."""
    network = nn.Linear(4, 4)
    fully_shard(network, mesh=world.mesh)
    trainee = Trainee(network, job.training)
    told = [trainee.is_finite()]
    if world.rank == world.size - 1:
        trainee.parameters["weight"].detach().to_local()[0, 0] = float("nan")
    return [*told, trainee.is_finite()]


def quiet(*told: object) -> None:
    """No progress."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
