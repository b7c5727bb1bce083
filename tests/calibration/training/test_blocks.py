"""Blocks through torch.compile: the same training, and no more graphs than networks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from turbo_opt.calibration.flow import Denoiser
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.rcm.run import train_rcm
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.objective import SLAObjective
from turbo_opt.calibration.sla.run import train_sla
from turbo_opt.calibration.sla.student import (
    add_projections,
    attend_sparsely,
    set_attention,
    zero_projections,
)
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training import blocks
from turbo_opt.calibration.training.objective import Loss
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput, TurboOptError

ALONE = World(0, 1, torch.device("cpu"))


UNGUIDED = """\
schema_version: 1
job: rcm
teacher: {source: ./teacher}
data: {folder: samples, held_out: 2}
rcm: {guidance_scale: 1.0, warm_up: 2, reverse: null, forward: {tangent: difference}}
training: {steps: 2, batch: 2, compute_dtype: float32}
"""


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture
def compile_by(monkeypatch):
    """Has torch.compile use another compiler, `compile_by(backend)`, as if it were its own."""
    compile = torch.compile

    def use(backend: Callable[..., object], **more: object) -> None:
        def instead(forward, *, dynamic, options):
            return compile(forward, dynamic=dynamic, backend=backend, **more)

        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", instead)

    yield use
    torch.compiler.reset()


@pytest.fixture
def graphs(compile_by) -> list[torch.fx.GraphModule]:
    """What torch.compile was given; it runs as it was traced, without a C++ compiler."""
    seen: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(graph)
        return graph.forward

    compile_by(note, fullgraph=True)
    return seen


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


@pytest.mark.parametrize("share", [3.0, -1.0])
def test_a_compiler_that_is_wrong_stops_the_training(home, tmp_path, compile_by, share) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: object) -> object:
        return lambda *args: tuple(  # the right values, and `share` of their derivative
            out.detach() + share * (out - out.detach()) for out in graph.forward(*args)
        )

    compile_by(wrong)
    job = load_job(home / "job.yaml", SLAJob, ["training.compile=true"])
    with pytest.raises(
        TurboOptError, match=r"student's gradient by compiled blocks .* training.compile to f"
    ):
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out" / "model").exists()


def test_a_compiler_that_fails_is_named_with_the_remedy(home, tmp_path, compile_by) -> None:
    def missing(graph: torch.fx.GraphModule, inputs: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    compile_by(missing)
    job = load_job(home / "job.yaml", SLAJob, ["training.compile=true"])
    message = (
        r"cannot be compiled here \(.*No working C\+\+ compiler.*; set training.compile to false"
    )
    with pytest.raises(TurboOptError, match=message):
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)


def test_a_student_that_is_still_its_teacher_is_trained(home, tmp_path, compile_by) -> None:
    """Its first gradient is zero as written, and what is left of rounding when compiled."""

    def rounded(graph: torch.fx.GraphModule, inputs: object) -> object:
        off = 1 + 1e-5 * torch.is_grad_enabled()
        return lambda *args: tuple(off * out for out in graph.forward(*args))

    compile_by(rounded)
    (home / "unguided.yaml").write_text(UNGUIDED)
    job = load_job(home / "unguided.yaml", RCMJob, ["training.compile=true"])
    report = train_rcm(job, tmp_path / "out", ALONE, progress=quiet)
    assert report["steps"] == 2


def test_a_loss_of_rounding_says_nothing_of_the_compiler(home, tmp_path, compile_by) -> None:
    """A sparse student that keeps every block is its teacher, but for the order of sums."""

    def rounded(graph: torch.fx.GraphModule, inputs: object) -> object:
        off = 1 + 1e-3 * torch.is_grad_enabled()
        return lambda *args: tuple(off * out for out in graph.forward(*args))

    compile_by(rounded)
    settings = ["training.compile=true", "training.steps=1", "sla.topk=1.0"]
    job = load_job(home / "job.yaml", SLAJob, settings)
    assert train_sla(job, tmp_path / "out", ALONE, progress=quiet)["steps"] == 1


def test_a_network_whose_turn_comes_later_is_checked_too(home, tmp_path, compile_by) -> None:
    """The first step is the fake score's, whose attention is dense; the student's is sparse."""

    def wrong(graph: torch.fx.GraphModule, inputs: object) -> object:
        off = 9 * ("block_routing" in graph.code)  # of the derivative alone
        return lambda *args: tuple(out + off * (out - out.detach()) for out in graph.forward(*args))

    compile_by(wrong)
    (home / "unguided.yaml").write_text(UNGUIDED)
    settings = ["sla={topk: 0.5, block_q: 64, block_k: 64}", "rcm.reverse={student_every: 2}"]
    settings += ["rcm.warm_up=0", "training.compile=true", "training.activations=keep"]
    job = load_job(home / "unguided.yaml", RCMJob, settings)
    with pytest.raises(TurboOptError, match=r"the student's gradient by compiled blocks is"):
        train_rcm(job, tmp_path / "out", ALONE, progress=quiet)
    assert (
        len((tmp_path / "out" / "log.csv").read_text().splitlines()) <= 2
    )  # before the first step


def test_a_gradient_that_is_not_finite_is_of_the_samples_not_of_the_compiler(
    home, graphs, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        SLAObjective,
        "loss",
        lambda self, *args, loss=SLAObjective.loss: Loss(loss(self, *args).value * torch.inf),
    )
    job = load_job(home / "job.yaml", SLAJob, ["training.compile=true"])
    with pytest.raises(TurboOptError, match=r"the loss is not finite at step 1 of 4.*samples 00"):
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)


def test_a_prediction_that_is_not_finite_is_of_the_samples_too(
    home, graphs, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        Denoiser,
        "__call__",
        lambda self, *args, call=Denoiser.__call__: call(self, *args) * torch.inf,
    )
    settings = ["training.compile=true", "data.held_out=0"]  # or those would be met first
    job = load_job(home / "job.yaml", SLAJob, settings)
    with pytest.raises(TurboOptError, match=r"the loss is not finite at step 1 of 4.*samples 00"):
        train_sla(job, tmp_path / "out", ALONE, progress=quiet)


def test_a_loss_that_was_only_compiled_is_not_in_the_log(home, graphs, tmp_path) -> None:
    """The fake score's, which has not been trained as long as the tangent warms up."""
    (home / "unguided.yaml").write_text(UNGUIDED)
    settings = ["rcm.reverse={student_every: 2}", "rcm.warm_up=1", "training.steps=3"]
    settings += ["training.compile=true", "training.activations=keep", "log.every=1"]
    job = load_job(home / "unguided.yaml", RCMJob, settings)
    train_rcm(job, tmp_path / "out", ALONE, progress=quiet)
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        logged = {row["step"]: row["fake"] for row in csv.DictReader(file)}
    assert not logged["1"] and logged["2"] and logged["3"] == logged["2"]


class Block(torch.nn.Linear):
    """As blocks are, in that its forward is its class's own."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("activations", ["keep", "selective", "recompute"])
def test_blocks_keep_their_names_and_what_they_compute(graphs, activations) -> None:
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([Block(2, 2), Block(2, 2)])
    x = torch.ones(1, 2)
    expected = network.blocks[1](x)
    blocks.set_up_blocks(network, activations, compile=True)
    assert [name for name, _ in network.named_parameters()] == [
        f"blocks.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")
    ]
    with blocks.uncompiled():
        torch.testing.assert_close(network.blocks[1](x), expected)
    assert not graphs
    torch.testing.assert_close(network.blocks[1](x), expected)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["keep", "selective", "recompute"])
def test_compiled_gradients_are_those_of_blocks_as_written(home, activations) -> None:
    folder, device = open_denoiser(str(home / "teacher"), "transformer"), torch.device("cuda")
    gradients = []
    for how in ({}, {"activations": activations, "compile": True}):

        def prepare(network, how=how) -> None:
            add_projections(network)
            set_attention(network, attend_sparsely(Sparsity(0.5, 64, 64)))
            blocks.set_up_blocks(network, **how)

        world = World(0, 1, device)
        network = build_network(folder, world, prepare, zero_projections(folder.config))
        torch.manual_seed(0)
        x, t, text = torch.randn(1, 16, 2, 16, 16), torch.tensor([0.6]), torch.randn(1, 16, 32)
        Denoiser(network, folder)(x.to(device), t.to(device), text.to(device)).mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for written, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, written, rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
def test_compiled_gradients_of_many_tokens() -> None:
    """Where Inductor has left gradients of a block's modulations unwritten, see `compiling`."""
    config = {
        "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 1024, "num_layers": 1,
        "text_dim": 32, "in_channels": 16, "out_channels": 16,
    }  # fmt: skip
    gradients = []
    for how in ({}, {"compile": True}):
        torch.manual_seed(0)
        network = diffusers.WanTransformer3DModel(**config).cuda()
        blocks.set_up_blocks(network, **how)
        x, text = torch.randn(1, 16, 9, 128, 128), torch.randn(1, 16, 32)
        inputs = (x.cuda(), torch.tensor([600.0]).cuda(), text.cuda())
        (network(*inputs, return_dict=False)[0] * x.cuda()).mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, written in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], written, rtol=1e-2, atol=1e-6, msg=name)


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
