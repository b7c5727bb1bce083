"""The student is the teacher's network with another self-attention, under the teacher's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turbo_opt.calibration.flow import Denoiser
from turbo_opt.calibration.networks import (
    DenoiserFolder,
    build_network,
    check_same_architecture,
    open_denoiser,
)
from turbo_opt.calibration.sla.attention import Sparsity
from turbo_opt.calibration.sla.closed_form import attend_densely
from turbo_opt.calibration.sla.student import (
    add_projections,
    attend_sparsely,
    set_attention,
    zero_projections,
)
from turbo_opt.calibration.training.blocks import set_up_blocks
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))


def student_of(folder: DenoiserFolder, topk: float, **options):
    def prepare(network) -> None:
        add_projections(network)
        set_attention(network, attend_sparsely(Sparsity(topk, 64, 64)))
        set_up_blocks(network, options.get("activations", "keep"))

    return build_network(folder, ALONE, prepare, zero_projections(folder.config))


def inputs():
    torch.manual_seed(0)
    return torch.randn(1, 16, 2, 16, 16), torch.tensor([0.6]), torch.randn(1, 16, 32)


@pytest.fixture(scope="module")
def folder(home: Path) -> DenoiserFolder:
    return open_denoiser(str(home / "teacher"), "transformer")


@torch.no_grad()
def test_with_every_block_and_no_projection_it_predicts_what_the_teacher_does(folder) -> None:
    teacher = Denoiser(build_network(folder, ALONE), folder)
    whole, half = (Denoiser(student_of(folder, topk), folder) for topk in (1.0, 0.5))
    expected = teacher(*inputs())
    torch.testing.assert_close(whole(*inputs()), expected, rtol=1e-4, atol=1e-4)
    assert (half(*inputs()) - expected).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_the_attention_processor_equals_that_of_diffusers(folder) -> None:
    network = build_network(folder, ALONE)
    expected = Denoiser(network, folder)(*inputs())
    set_attention(network, attend_densely)
    assert torch.equal(Denoiser(network, folder)(*inputs()), expected)


def test_projections_have_the_names_that_the_pass_reads(folder) -> None:
    names = [name for name, _ in student_of(folder, 0.5).named_parameters() if "proj_l" in name]
    assert names == [
        f"blocks.{i}.attn1.proj_l.{kind}" for i in range(2) for kind in ("weight", "bias")
    ]
    assert set(names) == set(zero_projections(folder.config))


@pytest.mark.parametrize("activations", ["selective", "recompute"])
def test_recomputed_activations_give_the_same_gradients(folder, activations) -> None:
    gradients = []
    for what in ("keep", activations):
        network = student_of(folder, 0.5, activations=what)
        Denoiser(network, folder)(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again)


def test_selective_recomputation_attends_once(folder, monkeypatch) -> None:
    from turbo_opt.kernels import clear_recorded_choices, recorded_choices

    counts = {}
    for what in ("selective", "recompute"):
        network = student_of(folder, 0.5, activations=what)
        clear_recorded_choices()
        Denoiser(network, folder)(*inputs()).mean().backward()
        counts[what] = sum(recorded_choices()["block_sparse_attention"].values())
    assert counts == {"selective": 2, "recompute": 4}


@pytest.mark.parametrize(
    ("activations", "times"), [("keep", 1), ("selective", 1), ("recompute", 2)]
)
def test_attention_of_a_dense_network_and_to_the_prompt_runs_once(
    folder, activations, times
) -> None:
    """Two of each layer, of two layers."""
    network = build_network(folder, ALONE, lambda network: set_up_blocks(network, activations))
    attention, runs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is attention:
                runs.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        Denoiser(network, folder)(*inputs()).mean().backward()
    assert len(runs) == 4 * times


def test_kept_attention_serves_a_second_backward(folder) -> None:
    network = student_of(folder, 0.5, activations="selective")
    loss = Denoiser(network, folder)(*inputs()).square().mean()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(network.get_parameter(name).grad, 2 * gradient)


def test_other_architectures_are_told_apart(folder, home: Path) -> None:
    other = DenoiserFolder(
        folder.pipeline, "transformer", folder.class_name, {**folder.config, "num_layers": 3}
    )
    check_same_architecture(folder, folder)
    with pytest.raises(BadInput, match="different architectures: num_layers is 2 and 3"):
        check_same_architecture(folder, other)


def test_a_model_without_that_denoiser_or_with_images_is_refused(home: Path, tmp_path) -> None:
    from tests.helpers.tiny_folder import write_tiny_folder

    with pytest.raises(BadInput, match="has no transformer_2, only transformer"):
        open_denoiser(str(home / "teacher"), "transformer_2")
    image = write_tiny_folder(tmp_path / "i2v", transformer={"in_channels": 36, "num_layers": 1})
    with pytest.raises(BadInput, match=r"needs\s+more than text"):
        open_denoiser(str(image), "transformer")
