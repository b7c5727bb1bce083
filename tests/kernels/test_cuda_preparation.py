"""q, k and v of sparse attention prepared by CUDA kernels, and the tiles they leave on Hopper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.attention_checks import (
    heads_of_one_product,
    linear_branch,
    normalized_and_turned,
    projection,
    rotation,
)
from tests.kernels.kernel_checks import relative_error
from turbo_opt.kernels import capability_of

BLOCK_Q, BLOCK_K, HEAD_DIM, EPS = 64, 128, 128, 1e-6
TABLE_ERROR = 0.5 / 16383  # of the cosines and sines that the kernels read
SHAPES = [(1, 1, 2), (1, 129, 1), (2, 777, 3), (1, 2000, 4)]  # batch, length, heads


@pytest.fixture(scope="module")
def cuda():
    from turbo_opt.kernels._cuda import prepare  # imports Triton

    return prepare


@pytest.fixture(scope="module")
def operands():
    from turbo_opt.kernels._triton.attention import operands

    return operands


def unswizzled(tiles):
    """Rows of 128 bytes, their 16-byte chunk c taken back from place c ^ (row % 8)."""
    rows = torch.arange(tiles.shape[-2], device=tiles.device)[:, None]
    place = torch.arange(8, device=tiles.device)[None] ^ (rows % 8)
    chunks = tiles.view(torch.uint8).unflatten(-1, (8, 16))
    moved = chunks.gather(-2, place[:, :, None].expand_as(chunks))
    return moved.flatten(-2).view(tiles.dtype)


def own_order(row, order):
    """What lies at place i of `row` back at `order[i]`."""
    ordered = torch.empty_like(row)
    ordered[..., order] = row
    return ordered


def channel_order():
    """Chunk c holds channels 8c … 8c + 7, then 64 + 8c … 64 + 8c + 7."""
    chunks = ((first, first + 64) for first in range(0, 64, 8))
    return [low + i for pair in chunks for low in pair for i in range(8)]


def token_order():
    """In each 16 tokens, 8j + 2t + i lies at 4t + 2j + i."""
    within = [8 * j + 2 * t + i for t, j, i in itertools.product(range(4), range(2), range(2))]
    return [first + token for first in range(0, BLOCK_K, 16) for token in within]


def test_orders_are_permutations():
    assert sorted(channel_order()) == sorted(token_order()) == list(range(128))
    assert channel_order()[:17] == [*range(8), *range(64, 72), 8]
    assert token_order()[:5] == [0, 1, 8, 9, 2]


@given(blocks=st.integers(1, 3000), heads=st.integers(1, 200), programs=st.integers(1, 150))
def test_parts_cover_all_blocks_and_none_is_empty(cuda, blocks, heads, programs):
    for between in (3.0, 0.25):
        per_part, parts = cuda._parts(blocks, heads, programs, between)
        assert (parts - 1) * per_part < blocks <= parts * per_part


@pytest.mark.parametrize(
    ("blocks", "heads", "between"),
    [(256, 12, 3.0), (591, 40, 3.0), (512, 12, 0.25), (1182, 40, 0.25)],
)
def test_at_the_models_shapes_few_multiprocessors_wait(cuda, blocks, heads, between):
    per_part, parts = cuda._parts(blocks, heads, 132, between)
    turns = -(-heads * parts // 132)
    assert turns * per_part * 132 < 1.06 * blocks * heads
    assert parts * heads <= 10 * 132


def test_aligned_inputs_are_used_as_they_are(cuda):
    q, k, v = heads_of_one_product(2, 3, 5, torch.bfloat16, torch.device("cpu"))
    assert all(cuda._aligned(x) is x for x in (q, k, v))
    one = torch.empty_strided((1, 1, 5, 128), (3, 3, 128, 1), dtype=torch.bfloat16)
    assert cuda._aligned(one) is one  # what is not stepped over has any stride


def odd_inputs():
    wide = torch.randn(1, 2, 6, 129).bfloat16()
    yield "tokens 129 channels apart", wide[..., :128]
    yield "one of tokens 129 channels apart", wide[:1, :1, :1, :128]
    yield "not on 16 bytes", torch.randn(1, 2, 6, 136).bfloat16()[..., 1:129]
    yield "tokens together", torch.randn(1, 2, 128, 8).bfloat16().mT


@pytest.mark.parametrize(("name", "x"), odd_inputs())
def test_other_inputs_are_copied_with_the_heads_of_a_token_together(cuda, name, x):
    copy = cuda._aligned(x)
    assert torch.equal(copy, x)
    assert copy.stride(3) == 1 and copy.stride(1) == 128 and copy.data_ptr() % 16 == 0


def prepared(cuda, operands, shape, turned, feature_map, device):
    """Inputs, the weights and tables or None, proj_l or None, and what the kernels made of them."""
    if capability_of(device)[:2] != ("sm", 9):
        pytest.skip("written for sm90")
    batch, length, heads = shape
    q, k, v = heads_of_one_product(batch, heads, length, torch.bfloat16, device)
    k += torch.randn(128, device=device).bfloat16()
    v += 2  # else the linear branch is near zero
    rotated = projected = None
    if turned:
        weights = 1 + torch.randn(2, heads * HEAD_DIM, device=device) / 4
        rotated = operands.Rotation(*weights, *rotation(length, device), EPS)
    if feature_map:
        projected = operands.Projection(*projection(device), feature_map)
    return q, k, v, rotated, projected, cuda.prepare(q, k, v, rotated, projected)


def exact_heads(q, k, rotated):
    """q and k as the operators mean them, (B, H, L, D) float64."""
    if rotated is None:
        return q.double(), k.double()
    tables = rotated.cos, rotated.sin, rotated.eps
    return tuple(
        normalized_and_turned(x.transpose(1, 2).flatten(2), weight, *tables).transpose(1, 2)
        for x, weight in ((q, rotated.q_weight), (k, rotated.k_weight))
    )


def block_means(x, block):
    return torch.stack([part.mean(2) for part in x.split(block, 2)], 2)


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_stand_for_q_k_and_v(cuda, operands, shape, turned, device):
    q, k, v, rotated, _, ready = prepared(cuda, operands, shape, turned, None, device)
    exact_q, exact_k = exact_heads(q, k, rotated)
    length = q.shape[2]

    def dequantized(tiles, scale):
        rows = own_order(unswizzled(tiles), channel_order()).double() * scale.double()
        return rows.view(*q.shape[:2], -1, HEAD_DIM)

    q_step = ready.q_scale[..., None]
    k_step = ready.k_scale[..., None, None].expand(*ready.k_int8.shape[:3], 1)
    smooth = exact_k - exact_k.mean(2, keepdim=True)
    for tiles, step, exact in (
        (ready.q_int8, q_step, exact_q),
        (ready.k_int8, k_step, smooth),
    ):
        back = dequantized(tiles, step)
        steps = step.double().reshape(*q.shape[:2], -1, 1)
        assert (back[:, :, length:] == 0).all()
        # Half a step of rounding, a little of float32, and the tables' rounding of 127 steps.
        assert ((back[:, :, :length] - exact).abs() <= steps[:, :, :length] * 0.52 + 1e-6).all()
    largest = exact_q.abs().amax(-1) / 127
    actual = ready.q_scale.double().view(*q.shape[:2], -1)[:, :, :length]
    rtol = 1e-5 + (2 * TABLE_ERROR if turned else 0)
    torch.testing.assert_close(actual, largest, rtol=rtol, atol=1e-9)

    codes = own_order(unswizzled(ready.v_fp8.view(torch.uint8)), token_order())
    codes = codes.view(torch.float8_e4m3fn).float().mT.reshape(*v.shape[:2], -1, HEAD_DIM)
    v_step = ready.v_scale.view(*v.shape[:2], 1, HEAD_DIM)
    torch.testing.assert_close(v_step[:, :, 0], v.float().abs().amax(2) / 448, rtol=1e-5, atol=1e-9)
    expected = (v.float() / v_step).to(torch.float8_e4m3fn).float()
    assert ((codes[:, :, :length] - expected) != 0).float().mean() < 2e-3  # ties
    assert (codes[:, :, length:] == 0).all()

    for means, exact, block in (
        (ready.q_means, exact_q, BLOCK_Q),
        (ready.k_means, exact_k, BLOCK_K),
    ):
        bound = TABLE_ERROR if turned else 1e-5
        assert relative_error(block_means(exact, block), means) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_linear_branch_is_its_definition(cuda, operands, shape, feature_map, turned, device):
    q, k, v, rotated, projected, ready = prepared(
        cuda, operands, shape, turned, feature_map, device
    )
    weights = projected.weight.double(), projected.bias.double()
    expected = linear_branch(*exact_heads(q, k, rotated), v, feature_map) @ weights[0].T
    actual = ready.branch.transpose(1, 2).double() - weights[1]
    assert relative_error(expected, actual) < 0.01  # its factors and the result are bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(2, 777, 3), (2, 777, 4), (1, 2000, 2)], ids=str)
def test_how_work_is_divided_changes_no_bit(cuda, operands, shape, turned, device, monkeypatch):
    """Programs take many blocks and many parts, slots are used again, rounds are left half full."""
    *inputs, ready = prepared(cuda, operands, shape, turned, "softmax", device)
    branches = {}
    for per_part, programs in itertools.product((1, 2, 3, 4, 5, 7, 32), (1, 3, 132)):
        monkeypatch.setattr(cuda, "_parts", lambda n, *_, p=per_part, **__: (p, -(-n // p)))
        monkeypatch.setattr(cuda, "multiprocessors", lambda _, p=programs: p)
        again, case = cuda.prepare(*inputs), (per_part, programs)
        for name in ("q_int8", "q_scale", "q_means", "k_int8", "k_scale"):
            assert torch.equal(getattr(again, name), getattr(ready, name)), (name, case)
        assert torch.equal(again.v_fp8.view(torch.uint8), ready.v_fp8.view(torch.uint8)), case
        # The order in which states of parts are added is another, however many programs take them.
        assert relative_error(ready.branch.double(), again.branch) < 0.01, case
        assert torch.equal(again.branch, branches.setdefault(per_part, again.branch)), case


@pytest.mark.gpu
def test_a_bias_that_does_not_lie_on_16_bytes(cuda, operands, device):
    q, k, v, _, projected, ready = prepared(cuda, operands, (1, 200, 2), False, "softmax", device)
    shifted = torch.cat((projected.bias[:1], projected.bias))[1:]
    assert shifted.data_ptr() % 16
    again = cuda.prepare(q, k, v, None, projected._replace(bias=shifted))
    assert torch.equal(again.branch, ready.branch)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-12, 50.0, 3e4, 1e15])
def test_softmax_of_channels_of_any_size(cuda, operands, size, device):
    """Where some may be beyond 28, tokens' largest channels are subtracted before exponentials."""
    if capability_of(device)[:2] != ("sm", 9):
        pytest.skip("written for sm90")
    q, k, v = heads_of_one_product(1, 2, 300, torch.bfloat16, device)
    q[:, :, ::3] *= size
    k[:, :, ::5] *= -size
    q[:, :, 7], k[:, :, 8] = -size, -2 * size  # all channels the same
    projected = operands.Projection(*projection(device), "softmax")
    ready = cuda.prepare(q, k, v + 2, None, projected)
    actual = ready.branch.transpose(1, 2).double() - projected.bias.double()
    assert actual.isfinite().all()
    if size < 1e3:  # beyond, no key has the channel that a query chooses: 0 / 0 without eps
        expected = linear_branch(q.double(), k.double(), v + 2, "softmax")
        assert relative_error(expected @ projected.weight.double().T, actual) < 0.01


@pytest.mark.gpu
def test_softmax_of_keys_whose_mean_is_large(cuda, operands, device):
    """Rounded keys are small then, and the features must still stay in range."""
    if capability_of(device)[:2] != ("sm", 9):
        pytest.skip("written for sm90")
    q, k, v = heads_of_one_product(1, 2, 300, torch.bfloat16, device)
    k[:, :, :, ::2] += 200
    projected = operands.Projection(*projection(device), "softmax")
    ready = cuda.prepare(q, k, v + 2, None, projected)
    expected = linear_branch(q.double(), k.double(), v + 2, "softmax")
    actual = ready.branch.transpose(1, 2).double() - projected.bias.double()
    assert relative_error(expected @ projected.weight.double().T, actual) < 0.01


@pytest.mark.gpu
def test_tables_are_within_half_a_step_of_theirs(cuda, device):
    if capability_of(device)[:2] != ("sm", 9):
        pytest.skip("written for sm90")
    cos, sin = rotation(70, device)
    cos[0, 0], sin[0, 0] = 1.0, 0.0
    x = torch.randn(1, 70, 1, HEAD_DIM, device=device).bfloat16().transpose(1, 2)
    *_, turns = cuda.measure_rms(x, x, cos.contiguous(), sin.contiguous(), EPS)
    halves = torch.stack((turns & 0xFFFF, turns >> 16 & 0xFFFF)) - 0x8000
    back = (halves - 16384) / 16383
    expected = torch.stack((cos, sin)).view(2, 70, -1)
    assert (back - expected).abs().max() <= 0.502 / 16383  # float32 rounds before, by 0.001 steps
    assert torch.equal(back[:, 0], expected[:, 0])  # 1 and 0 are exact


@pytest.mark.gpu
def test_heads_do_not_depend_on_those_beside_them(cuda, operands, device):
    q, k, v, _, projected, ready = prepared(cuda, operands, (2, 777, 3), False, "softmax", device)
    for head in range(3):
        alone = cuda.prepare(*(x[:1, head : head + 1] for x in (q, k, v)), None, projected)
        for name in ("q_int8", "q_scale", "k_int8", "k_scale", "v_fp8", "v_scale"):
            assert torch.equal(getattr(alone, name)[0], getattr(ready, name)[head]), name
        assert torch.equal(alone.q_means[0, 0], ready.q_means[0, head])
        # How many programs share the sum over all tokens depends on the number of heads.
        apart = relative_error(ready.branch[:1, :, head].double(), alone.branch[:, :, 0])
        assert apart < 0.01


@pytest.mark.gpu
def test_parameters_in_bfloat16_or_missing_and_packed_tables(cuda, operands, device):
    q, k, v, rotated, projected, _ = prepared(cuda, operands, (2, 300, 3), True, "softmax", device)
    packed = rotated._replace(
        q_weight=None,
        k_weight=rotated.k_weight.bfloat16(),
        cos=rotated.cos.contiguous(),
        sin=rotated.sin.contiguous(),
    )
    ready = cuda.prepare(q, k, v, packed, projected._replace(bias=None))
    exact_q, exact_k = exact_heads(q, k, packed)
    assert relative_error(block_means(exact_q, BLOCK_Q), ready.q_means) < TABLE_ERROR
    assert relative_error(block_means(exact_k, BLOCK_K), ready.k_means) < TABLE_ERROR
    expected = linear_branch(exact_q, exact_k, v, "softmax") @ projected.weight.double().T
    assert relative_error(expected, ready.branch.transpose(1, 2)) < 0.01


@pytest.mark.gpu
def test_heads_apart_in_memory_are_refused_where_the_norm_spans_them(cuda, operands, device):
    q = torch.randn(1, 2, 5, 128, device=device).bfloat16()
    turned = operands.Rotation(None, None, *rotation(5, device), EPS)
    with pytest.raises(ValueError, match="heads of a token must lie together"):
        cuda.prepare(q, q, q, turned, None)
