"""Tangents through a whole diffusers denoiser: forward mode, differences, and torch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.calibration.rcm.gaussian import Gaussian
from tests.helpers.tiny_folder import tiny_transformer_config
from tests.kernels.kernel_checks import relative_error
from turbo_opt.calibration.rcm.tangents import (
    attend_with_tangents,
    carry_tangents,
    earlier,
    tangent_by_difference,
    tangent_by_forward_mode,
    without_gradient,
)
from turbo_opt.calibration.rcm.trigflow import predictor
from turbo_opt.calibration.training.blocks import set_up_blocks
from turbo_opt.kernels import clear_recorded_choices, force_provider, recorded_choices

SHAPE = (2, 16, 2, 8, 8)


def wan(dtype: torch.dtype = torch.float32) -> Any:
    import diffusers

    torch.manual_seed(0)
    config = tiny_transformer_config(attention_head_dim=32, num_attention_heads=2)
    network = diffusers.WanTransformer3DModel(**config).to(dtype).eval()
    for block in network.blocks:
        block.attn1.norm_q.weight.data *= 1.5  # attention that is far from uniform
        block.attn1.norm_k.weight.data *= 1.5
        block.scale_shift_table.data[:, 2] = 1.0
    return network.requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(x, timestep, prompt) and the direction of the first two."""
    generator = torch.Generator().manual_seed(1)
    x, tx = torch.randn(2, *SHAPE, generator=generator, dtype=dtype)
    prompt = torch.randn(2, 9, 32, generator=generator, dtype=dtype)
    t = torch.tensor([310.0, 770.0], dtype=dtype)
    return (x, t, prompt), (tx, torch.tensor([20.0, -30.0], dtype=dtype))


def jvp(network: Any, exact_attention: bool) -> tuple[Tensor, Tensor]:
    (x, t, prompt), direction = inputs(next(network.parameters()).dtype)
    context = sdpa_kernel(SDPBackend.MATH) if exact_attention else contextlib.nullcontext()
    with context, torch.no_grad():
        return torch.func.jvp(
            lambda x, t: network(x, t, prompt, return_dict=False)[0], (x, t), direction
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_moves_as_it_does_with_attention_in_plain_products(dtype: torch.dtype) -> None:
    network = wan(dtype)
    expected = jvp(network, exact_attention=True)
    carry_tangents(network)
    clear_recorded_choices()
    for mine, theirs in zip(jvp(network, exact_attention=False), expected, strict=True):
        assert relative_error(theirs, mine) < (1e-5 if dtype is torch.float32 else 1e-6)
    assert sum(recorded_choices()["attention_jvp"].values()) == 4


def test_a_denoiser_moves_as_its_differences_say() -> None:
    network = wan(torch.float64)
    carry_tangents(network)
    (x, t, prompt), (tx, tt) = inputs(torch.float64)
    h = 1e-3

    def at(side: float) -> Tensor:
        return network(x + side * h * tx, t + side * h * tt, prompt, return_dict=False)[0]

    difference = (at(1) - at(-1)) / (2 * h)
    assert relative_error(difference, jvp(network, False)[1]) < 1e-3


def test_by_triton_too() -> None:
    network = wan()
    expected = jvp(network, exact_attention=True)
    carry_tangents(network)
    with force_provider({"attention_jvp": "triton"}):
        _, tangent = jvp(network, exact_attention=False)
    assert relative_error(expected[1], tangent) < 1e-4


def test_without_tangents_a_prepared_denoiser_computes_what_it_did() -> None:
    network = wan()
    arguments = inputs()[0]
    before = network(*arguments, return_dict=False)[0]
    carry_tangents(network)
    assert relative_error(before, network(*arguments, return_dict=False)[0]) < 1e-5


@pytest.mark.parametrize("moving", ["q", "k", "v", "kv", "qkv"])
def test_attention_moves_with_whichever_of_its_inputs_does(moving: str) -> None:
    torch.manual_seed(0)
    heads = dict(zip("qkv", torch.randn(3, 1, 2, 7, 16), strict=True))
    directions = tuple(torch.randn(len(moving), 1, 2, 7, 16))
    primals = tuple(heads[name] for name in moving)

    def moved(attend: Callable[..., Tensor]) -> Tensor:
        def run(*given: Tensor) -> Tensor:
            return attend(**(heads | dict(zip(moving, given, strict=True))))

        return torch.func.jvp(run, primals, directions)[1]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).softmax(-1) @ v

    mine = moved(lambda q, k, v: attend_with_tangents(torch.nn.Identity(), q, k, v))
    torch.testing.assert_close(mine, moved(exact), rtol=1e-4, atol=1e-5)


def on_the_path(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, τ and the teacher's F of normal data."""
    (x, *_), _ = inputs(dtype)
    angle = torch.tensor([0.4, 1.2], dtype=torch.float64)
    return x, angle, Gaussian().flow(x, angle)


def velocity_of(network: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda y, t, prompt: network(y, 1000 * t, prompt, return_dict=False)[0].float()


def test_forward_mode_and_difference_agree_on_a_denoiser_to_the_order_of_the_step() -> None:
    network = wan()
    carry_tangents(network)
    # A trained network is smooth in time; a random one hears every sine of 1000·t.
    network.condition_embedder.time_embedder.linear_1.weight.data.unflatten(1, (2, 32))[
        ..., :20
    ] = 0
    predict = predictor(velocity_of(network), inputs()[0][2])
    x, angle, teacher = on_the_path()
    tangent = tangent_by_forward_mode(predict, x, angle, teacher)
    flow = predict(x, angle)
    errors = []
    for step in (0.04, 0.02, 0.01):
        near = earlier(predict, x, angle, teacher, step)
        errors.append(relative_error(tangent, tangent_by_difference(x, angle, flow, near)))
    assert errors[0] < 0.2
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_bfloat16_products_keep_the_tangent_close() -> None:
    network = wan()
    carry_tangents(network)
    predict = predictor(velocity_of(network), inputs()[0][2])
    x, angle, teacher = on_the_path()
    exact = tangent_by_forward_mode(predict, x, angle, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        half = tangent_by_forward_mode(predict, x, angle, teacher)
    assert relative_error(exact, half) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoiser_moves_on_the_gpu_as_on_the_cpu(dtype: torch.dtype) -> None:
    x, angle, teacher = on_the_path()
    network, prompt = wan(), inputs()[0][2]
    carry_tangents(network)
    exact = tangent_by_forward_mode(predictor(velocity_of(network), prompt), x, angle, teacher)
    predict = predictor(velocity_of(network.cuda()), prompt.cuda())
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = tangent_by_forward_mode(predict, x.cuda(), angle.cuda(), teacher.cuda())
    assert relative_error(exact, found.cpu()) < (1e-3 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("activations", ["keep", "selective", "recompute"])
def test_a_tangent_leaves_the_next_forward_its_gradient(activations: str) -> None:
    network = wan().requires_grad_(True)
    carry_tangents(network)
    set_up_blocks(network, activations)
    prompt = inputs()[0][2]
    predict = predictor(velocity_of(network), prompt)
    x, angle, teacher = on_the_path()
    with torch.autocast("cpu", torch.bfloat16):
        tangent = tangent_by_forward_mode(predict, x, angle, teacher)
        flow = predict(x, angle)
    assert not tangent.requires_grad
    flow.square().mean().backward()
    lacking = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not lacking


def test_what_is_cast_without_a_gradient_is_not_kept() -> None:
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with without_gradient():
            layer(torch.ones(1, 4))
        layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is not None
