"""The 8-bit tiles that Triton's attention kernels read, and what comes with them."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import heads_of_one_product, rotation


@pytest.fixture(scope="module")
def launch():
    from turbo_opt.kernels._triton.attention import launch  # imports Triton

    return launch


def test_tiles_stand_for_q_k_and_v_with_even_channels_first(launch, device):
    length, (block_q, block_k) = 150, (64, 128)
    q, k, v = heads_of_one_product(1, 2, length, torch.float16, device)
    blocks = launch.Blocks(0.5, block_q, block_k)
    ready = launch.prepare(q, k, v, blocks, rotation=None, projection=None, int8=True, fp8=True)

    def even_first(x):
        return torch.cat([x[..., ::2], x[..., 1::2]], -1)

    def close(actual, exact, step):
        """Half a step of rounding, and a little of float32."""
        return ((actual - exact).abs() <= step * 0.501).all()

    q_back = (ready.q_int8.double() * ready.q_scale[..., None].double()).flatten(1, 2)[:, :length]
    q_steps = ready.q_scale.double().flatten(1)[:, :length, None]
    assert close(q_back, even_first(q[0].double()), q_steps)
    smooth = even_first((k.double() - k.double().mean(2, keepdim=True))[0])
    k_steps = ready.k_scale.double()[..., None, None].expand(-1, -1, block_k, 1)
    k_back = (ready.k_int8.double() * k_steps).flatten(1, 2)[:, :length]
    assert close(k_back, smooth, k_steps.flatten(1, 2)[:, :length])
    assert (ready.k_int8.flatten(1, 2)[:, length:] == 0).all()
    v_back = ready.v_fp8.double().transpose(2, 3).flatten(1, 2) * ready.v_scale.double()[:, None]
    assert (v_back[:, length:] == 0).all()
    # e4m3 is 1/16 away at most, or half a subnormal step; twice that, or once more halved by a
    # carry, where the interpreter truncates.
    difference = (v_back[:, :length] - v[0].double()).abs()
    near = v[0].double().abs() / 8 + ready.v_scale.double()[:, None] * 2.0**-9
    assert (difference > near).double().mean() < (0 if device.type == "cuda" else 0.05) + 1e-9
    means = torch.stack([part.double().mean(2) for part in k.split(block_k, 2)], 2)
    torch.testing.assert_close(ready.k_means.double(), even_first(means), rtol=1e-5, atol=1e-6)


def test_heads_apart_in_memory_are_refused_where_the_norm_spans_them(launch, device):
    q = torch.randn(1, 2, 5, 128, device=device, dtype=torch.float16)
    turned = launch.Rotation(None, None, *rotation(5, device), 1e-6)
    with pytest.raises(ValueError, match="heads of a token must lie together"):
        launch.prepare(
            q, q, q, launch.Blocks(0.5, 64, 128),
            rotation=turned, projection=None, int8=True, fp8=True,
        )  # fmt: skip
