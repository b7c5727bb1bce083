"""The 8-bit tiles that attention kernels read: plain for Triton, swizzled for CUDA on Hopper."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import heads_of_one_product, projection, rotation


@pytest.fixture(scope="module")
def launch():
    from turbo_opt.kernels._triton.attention import launch  # imports Triton

    return launch


def prepared(launch, length, device, swizzled, blocks):
    torch.manual_seed(1)
    q, k, v = heads_of_one_product(1, 2, length, torch.float16, device)
    turned = launch.Rotation(None, None, *rotation(length, device), 1e-6)
    return launch.prepare(
        q, k, v, launch.Blocks(0.5, *blocks),
        rotation=turned, projection=launch.Projection(*projection(device), "softmax"),
        int8=True, fp8=True, swizzled=swizzled,
    )  # fmt: skip


def as_bytes(tensor):
    return tensor.view(torch.uint8).flatten(0, -3)  # (tiles, rows, bytes of a row)


def swizzled_by_hand(tiles):
    """Bits 4 to 6 of a byte's place in its tile are exchanged with its bits 7 to 9.

    With rows of 128 bytes: 16-byte chunk c of row r lies at chunk c ^ (r % 8). Rows of 64 bytes
    exchange two bits: sm90's swizzle of that width.
    """
    rows, width = tiles.shape[1:]
    place = torch.arange(rows * width, device=tiles.device)
    place = place ^ ((place >> 7) % (width // 16) << 4)
    moved = torch.empty_like(tiles).flatten(1)
    moved[:, place] = tiles.flatten(1)
    return moved.view_as(tiles)


def reordered_by_hand(tiles):
    """In each 32 tokens, 8j + 2t + i lies at 16·(j // 2) + 4t + 2·(j % 2) + i."""
    moved = torch.empty_like(tiles)
    for start in range(0, tiles.shape[2], 32):
        for j in range(4):
            for t in range(4):
                for i in range(2):
                    place = 16 * (j // 2) + 4 * t + 2 * (j % 2) + i
                    moved[:, :, start + place] = tiles[:, :, start + 8 * j + 2 * t + i]
    return moved


@pytest.mark.parametrize(("length", "blocks"), [(1, (64, 128)), (129, (64, 128)), (70, (64, 64))])
def test_swizzled_tiles_are_the_plain_ones_with_chunks_and_tokens_moved(
    launch, length, blocks, device
):
    plain, moved = (
        prepared(launch, length, device, swizzled, blocks) for swizzled in (False, True)
    )
    for name in ("q_int8", "k_int8"):
        expected = swizzled_by_hand(as_bytes(getattr(plain, name)))
        assert torch.equal(as_bytes(getattr(moved, name)), expected), name
    expected = swizzled_by_hand(reordered_by_hand(as_bytes(plain.v_fp8)))
    assert torch.equal(as_bytes(moved.v_fp8), expected)
    for name in ("q_scale", "k_scale", "v_scale", "q_means", "k_means", "branch"):
        assert torch.equal(getattr(moved, name), getattr(plain, name)), name


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
