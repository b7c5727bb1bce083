"""A graph file is read as torch would read it, without torch's slow and trusting reader."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch.export import ExportedProgram

import turbo_opt
from tests.helpers.tiny_folder import shared_artifact, tiny_program
from turbo_opt.artifact import graph_file
from turbo_opt.artifact.graph_file import graph_bytes, latent_sides, read_graph
from turbo_opt.artifact.load import read_limits
from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.artifact.weights_reader import StoredWeights
from turbo_opt.compiler.manager import PassManager
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.runtime.limits import latent_limits

PIPELINE = "canonicalize,fuse-norms,fuse-qk-norm-rope,quantize-linear,fuse-norm-quantize"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with operators of ours, some with several results."""
    planned = validate_pipeline(parse_pipeline(PIPELINE))
    (denoiser,) = PassManager(planned).run(tiny_program())
    path = tmp_path_factory.mktemp("graph") / "transformer.pt2"
    path.write_bytes(graph_bytes(denoiser.exported))
    return path


def by_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportedProgram:
    with monkeypatch.context() as patch:
        patch.setattr(graph_file, "rebuild", _not_here)
        return read_graph(path)


def _not_here(*_: Any, **__: Any) -> Any:
    raise AttributeError("this torch has none")


def test_every_node_is_that_of_torchs_own_reader(graph, monkeypatch) -> None:
    ours, theirs = read_graph(graph), by_torch(graph, monkeypatch)
    nodes = list(zip(ours.graph.nodes, theirs.graph.nodes, strict=True))
    assert any(node.target is torch.ops.turbo_opt.block_linear.default for node, _ in nodes)
    for one, two in nodes:
        assert (one.op, one.name, one.target) == (two.op, two.name, two.target)
        assert str((one.args, one.kwargs)) == str((two.args, two.kwargs))
        assert one.meta.keys() == two.meta.keys()
        assert described(one.meta.get("val")) == described(two.meta.get("val"))
        assert one.meta.get("nn_module_stack") == two.meta.get("nn_module_stack")


def test_weights_signature_and_ranges_are_those_of_torchs_own_reader(graph, monkeypatch) -> None:
    ours, theirs = read_graph(graph), by_torch(graph, monkeypatch)
    assert ours.graph_signature == theirs.graph_signature
    assert ours.module_call_graph == theirs.module_call_graph
    assert list(ours.state_dict) == list(theirs.state_dict)
    for name, weight in ours.state_dict.items():
        assert type(weight) is type(theirs.state_dict[name])
        assert described(weight) == described(theirs.state_dict[name])
    assert {str(key): str(value) for key, value in ours.range_constraints.items()} == {
        str(key): str(value) for key, value in theirs.range_constraints.items()
    }
    config = {"patch_size": (1, 2, 2)}
    assert latent_limits(ours, config) == latent_limits(theirs, config)


def test_a_loaded_model_computes_bit_for_bit_what_torchs_reader_gives(stored, monkeypatch) -> None:
    ours = turbo_opt.load(stored)
    with monkeypatch.context() as patch:
        patch.setattr(graph_file, "rebuild", _not_here)
        theirs = turbo_opt.load(stored)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
    }
    assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


def test_torchs_reader_is_not_needed_and_no_text_of_a_file_reaches_eval(graph, monkeypatch) -> None:
    sympify = sympy.sympify

    def guarded(value: Any, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(value, str), f"{value!r} would be evaluated"
        return sympify(value, *args, **kwargs)

    monkeypatch.setattr(sympy, "sympify", guarded)
    monkeypatch.setattr(torch.export, "load", _not_here)
    assert len(user_inputs(read_graph(graph))) == 3


def test_it_is_said_when_torchs_slow_reader_had_to_serve(graph, monkeypatch, caplog) -> None:
    read_graph(graph)
    assert not caplog.records
    by_torch(graph, monkeypatch)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "transformer.pt2: read by torch.export.load, which is slow" in record.getMessage()


def test_values_that_are_described_alike_are_made_once(graph) -> None:
    values = [
        node.meta["val"]
        for node in read_graph(graph).graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert len({id(value) for value in values}) * 2 < len(values)


@pytest.mark.parametrize("experts", [1, 2])
def test_limits_are_known_before_the_graph_is_read(experts: int) -> None:
    root = shared_artifact(experts)
    assert read_limits(root, read_manifest(root)) == turbo_opt.load(root).limits


@pytest.mark.parametrize(
    "damage",
    [lambda graph: graph["tensor_values"].clear(),
     lambda graph: _replace_side(graph, {"as_int": "many"}),
     lambda graph: _replace_side(graph, {"as_expr": {"expr_str": "true"}}),
     lambda graph: _replace_side(graph, {"as_expr": {"expr_str": "Integer()"}}),
     lambda graph: _replace_side(graph, {"as_expr": {"expr_str": "exit()"}})],
)  # fmt: skip
def test_limits_of_a_damaged_graph_are_bad_input(stored, tmp_path, damage) -> None:
    with zipfile.ZipFile(stored / "denoisers" / "transformer.pt2") as archive:
        model = json.loads(archive.read("archive/models/model.json"))
    damage(model["graph_module"]["graph"])
    with zipfile.ZipFile(tmp_path / "g.pt2", "w") as archive:
        archive.writestr("archive/models/model.json", json.dumps(model))
    with pytest.raises(BadInput, match=r"g\.pt2: damaged, the size of its latents"):
        latent_sides(tmp_path / "g.pt2")


def _replace_side(graph: dict[str, Any], side: dict[str, Any]) -> None:
    graph["tensor_values"]["hidden_states"]["sizes"][2] = side


def test_weights_that_nobody_waits_for_are_left_unread(stored, monkeypatch) -> None:
    weights = StoredWeights(stored, read_manifest(stored).denoisers["transformer"])
    with weights.arriving() as wait:
        assert all(torch.equal(value, weights[name]) for name, value in wait().items())
    read: list[str] = []
    slow = threading.Event()

    def waiting(_: StoredWeights, name: str) -> None:
        read.append(name)
        slow.wait(5)

    monkeypatch.setattr(StoredWeights, "__getitem__", waiting)
    threading.Timer(0.1, slow.set).start()
    with pytest.raises(BadInput, match="another reason"), weights.arriving():
        raise BadInput("another reason")
    assert len(read) < len(weights)


def described(value: Any) -> Any:
    """All of a value that is not the object itself."""
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return type(value), str(value)
    sides = [str(side) for side in (*value.shape, *value.stride(), value.storage_offset())]
    return sides, value.dtype, value.device, value.requires_grad
