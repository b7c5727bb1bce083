"""Edits of exported programs: copies, new weights, calls with values that are known already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from turbo_opt.ir.edit import add_weight, copy_exported, insert_call, parameter_names, user_inputs

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + self.linear(x + 1) + y


@pytest.fixture
def exported() -> ExportedProgram:
    torch.manual_seed(0)
    rows = Dim("rows", min=2)
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    return torch.export.export(Net(), inputs, dynamic_shapes=({0: rows}, {0: rows}), strict=False)


def test_a_copy_is_run_and_changed_without_the_original(exported: ExportedProgram) -> None:
    copied = copy_exported(exported)
    inputs = [*exported.state_dict.values(), torch.randn(5, 4), torch.randn(5, 4)]
    before = [node.name for node in exported.graph.nodes]
    (add,) = [node for node in copied.graph.nodes if node.args[1:] == (user_inputs(copied)[1],)]
    new = insert_call(copied, add, aten.mul.Tensor, add.args)
    copied.graph_signature.replace_all_uses(add.name, new.name)
    add.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    copied.graph.erase_node(add)
    add_weight(copied, "more", (2,), torch.float32)
    copied.graph_module.recompile()
    copied.validate()
    x, y = inputs[-2:]
    with torch.no_grad():
        product = copied.graph_module(*inputs[:2], torch.empty(2), x, y)[0]
        total = exported.graph_module(*inputs)[0]
    assert torch.allclose(product, (total - y) * y, atol=1e-6)
    assert [node.name for node in exported.graph.nodes] == before
    assert "more" not in exported.state_dict
    assert list(parameter_names(copied).values()) == ["linear.weight", "linear.bias", "more"]
    assert copied.graph_signature.user_outputs == (new.name,)
    assert exported.graph_signature.user_outputs != (new.name,)


def test_calls_alike_share_a_value_and_others_do_not(exported: ExportedProgram) -> None:
    first, second, *_ = [n for n in exported.graph.nodes if n.target is aten.linear.default]
    (output,) = [node for node in exported.graph.nodes if node.op == "output"]

    def value(target: object, *args: object) -> Tensor:
        node = insert_call(exported, output, target, args)  # type: ignore[arg-type]
        return node.meta["val"]

    unsqueezed = value(aten.unsqueeze.default, first, 0)
    assert value(aten.unsqueeze.default, second, 0) is unsqueezed
    assert value(aten.unsqueeze.default, first, 1).shape != unsqueezed.shape
    assert value(aten.mul.Tensor, first, 2).dtype == torch.float32
    assert value(aten.to.dtype, first, torch.int32).dtype == torch.int32
    assert value(aten.mul.Tensor, first, True) is not value(aten.mul.Tensor, first, 1)
    rows = unsqueezed.shape[1]
    assert value(aten.transpose.int, first, 0, 1).stride() == (1, 4)
    assert value(aten.contiguous.default, first).shape[0] == rows


def test_how_many_values_are_not_zero_is_asked_of_every_call(exported: ExportedProgram) -> None:
    first, second, *_ = [n for n in exported.graph.nodes if n.target is aten.linear.default]
    (output,) = [node for node in exported.graph.nodes if node.op == "output"]
    counts = {
        str(insert_call(exported, output, aten.nonzero.default, (node,)).meta["val"].shape[0])
        for node in (first, second)
    }
    assert len(counts) == 2
