"""Blocks through torch.compile: the same training, and no more graphs than networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla.run import train_sla
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training import compiled
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """What torch.compile was given; it runs as it was traced, without a C++ compiler."""
    seen: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(graph)
        return graph.forward

    def compile_blocks(network) -> None:
        for block in network.blocks:
            block.compile(backend=note, dynamic=False, fullgraph=True)

    torch.compiler.reset()
    monkeypatch.setattr("turbo_opt.calibration.sla.run.compile_blocks", compile_blocks)
    yield seen
    torch.compiler.reset()


@pytest.mark.parametrize("activations", ["keep", "selective"])
def test_a_compiled_training_is_the_same_training(home, graphs, tmp_path, activations) -> None:
    reports = {}
    for compile in ("false", "true"):
        settings = [f"training.compile={compile}", f"training.activations={activations}"]
        job = load_job(home / "job.yaml", SLAJob, settings)
        reports[compile] = train_sla(job, tmp_path / compile, ALONE, progress=quiet)
    assert len(graphs) == 2  # one for the student's blocks, one for the teacher's
    after = {name: report["after"]["held_out_loss"] for name, report in reports.items()}
    assert after["true"] == pytest.approx(after["false"], rel=1e-4)
    assert after["true"] != pytest.approx(reports["true"]["before"]["held_out_loss"], rel=1e-3)


def test_blocks_are_compiled_in_place_and_keep_their_names() -> None:
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    compiled.compile_blocks(network)
    assert [name for name, _ in network.named_parameters()] == ["blocks.0.weight", "blocks.0.bias"]
    x = torch.ones(1, 2)
    with compiled.uncompiled():
        torch.testing.assert_close(
            network.blocks[0](x),
            torch.nn.functional.linear(x, network.blocks[0].weight, network.blocks[0].bias),
        )


JOB = """\
schema_version: 1
job: {job}
data: {{folder: samples}}
training: {{compile: true}}
"""


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (RCMJob, "rcm", "compiled by training.compile have no forward-mode derivative"),
        (RouterJob, "router", "training.compile"),
    ],
)
def test_where_blocks_cannot_be_compiled_it_says_so(kind, name, message, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.format(job=name))
    with pytest.raises(BadInput, match=message):
        load_job(tmp_path / "job.yaml", kind, [])
