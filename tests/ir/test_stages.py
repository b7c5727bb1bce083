"""Which node runs in which stage, and which values cross."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.stages import Stage, is_number, split, writes_in_place

STAGES = {"prompt": ("encoder_hidden_states",), "timestep": ("timestep",)}
X, TIMESTEP, TEXT = torch.randn(2, 4, 3, 6, 8), torch.rand(2), torch.randn(2, 7, 16)


def exported(forward, **weights: Tensor):
    """`forward(self, hidden_states, timestep, encoder_hidden_states)`, batch and sides dynamic."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights.items():
                self.register_buffer(name, value)

    Net.forward = forward
    batch, text = Dim("batch", min=1, max=64), Dim("text", min=2, max=4096)
    frames, rows, columns = (Dim(name, min=1, max=512) for name in ("frames", "rows", "columns"))
    shapes = {
        "hidden_states": {0: batch, 2: frames, 3: rows, 4: columns},
        "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: text},
    }
    inputs = {"hidden_states": X, "timestep": TIMESTEP, "encoder_hidden_states": TEXT}
    return torch.export.export(Net(), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)


def kept(program, stages=STAGES):
    """Stage → operators of its kept tensors, and the whole split."""
    found = split(program.graph, user_inputs(program), stages)
    names = {
        stage: [str(n.target).removeprefix("aten.") for n in values if not is_number(n)]
        for stage, values in found.kept.items()
    }
    return names, found


def test_each_value_belongs_to_the_inputs_it_depends_on():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        table = torch.arange(hidden_states.shape[3]).exp()
        text = encoder_hidden_states.tanh().mean((1, 2))
        return hidden_states * table[:, None] + (text + timestep.sin())[:, None, None, None, None]

    names, found = kept(exported(forward))
    assert names[Stage.SHAPE] == ["exp.default"]
    assert names[Stage.PROMPT] == ["mean.dim"]
    assert names[Stage.TIMESTEP] == ["sin.default"]
    assert names[Stage.STEP] == []
    assert "add.Tensor" in {str(n.target).removeprefix("aten.") for n in found.nodes[Stage.STEP]}


def test_what_depends_on_prompt_and_timestep_runs_in_the_step():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        both = (encoder_hidden_states.mean((1, 2)) * timestep).exp()
        return hidden_states + both[:, None, None, None, None]

    _, found = kept(exported(forward))
    targets = {str(node.target) for node in found.nodes[Stage.STEP]}
    assert {"aten.mul.Tensor", "aten.exp.default"} <= targets


def test_views_cross_as_their_base_once():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        shift, scale = timestep.sin().unsqueeze(-1).expand(-1, 2).mul(2).chunk(2, 1)
        return hidden_states * shift[..., None, None, None] + scale[..., None, None, None]

    names, found = kept(exported(forward))
    assert names[Stage.TIMESTEP] == ["mul.Tensor"]
    targets = [str(node.target) for node in found.nodes[Stage.STEP]]
    assert "aten.chunk.default" in targets
    assert "aten.chunk.default" not in [str(n.target) for n in found.nodes[Stage.TIMESTEP]]


def test_a_large_expanded_copy_is_made_at_each_step_and_its_source_is_kept():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        wide = timestep.sin()[:, None, None, None, None, None].expand(*hidden_states.shape, 64)
        return (hidden_states[..., None] * wide.to(torch.float64)).sum(-1)

    names, found = kept(exported(forward))
    assert names[Stage.TIMESTEP] == ["sin.default"]
    assert [str(node.target) for node in found.refused] == ["aten.to.dtype"]


def test_a_large_copy_of_a_weight_is_not_kept_but_a_small_one_is():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return (hidden_states.sum() + self.large.exp()).sum() + self.small.tanh()

    program = exported(forward, large=torch.ones(512, 1024), small=torch.ones(8, 8))
    names, found = kept(program)
    assert names[Stage.SHAPE] == ["tanh.default"]
    assert [str(node.target) for node in found.refused] == ["aten.exp.default"]


def test_random_numbers_are_drawn_at_each_step():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return hidden_states + torch.rand(1)

    names, _ = kept(exported(forward))
    assert names[Stage.SHAPE] == []


def test_without_stages_only_tables_are_kept():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        table = torch.arange(hidden_states.shape[4]).sin()
        return hidden_states * table + timestep.sin()[:, None, None, None, None]

    names, _ = kept(exported(forward), stages={})
    assert names == {
        Stage.SHAPE: ["sin.default"], Stage.PROMPT: [], Stage.TIMESTEP: [], Stage.STEP: []
    }  # fmt: skip


def test_a_write_in_place_is_found():
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return torch.zeros_like(hidden_states).copy_(hidden_states)

    def pure(self, hidden_states, timestep, encoder_hidden_states):
        return hidden_states + 1

    assert writes_in_place(exported(forward).graph).name == "copy_"
    assert writes_in_place(exported(pure).graph) is None
