"""What the tests of sparse attention share: problems, and independent formulas in float64."""

from __future__ import annotations

import math

import torch

from tests.kernels.kernel_checks import relative_error, run_by

HEAD_DIM = 128
BLOCKS = [(64, 128), (128, 64)]


def heads_of_one_product(batch, heads, length, dtype, device, head_dim=HEAD_DIM):
    """q, k and v as a model has them: parts of one (B, L, 3·H·D), viewed as (B, H, L, D)."""
    qkv = torch.randn(batch, length, 3 * heads * head_dim, device=device, dtype=dtype)
    parts = qkv.split(heads * head_dim, dim=-1)
    return tuple(x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in parts)


def projection(device, head_dim=HEAD_DIM, with_bias=True):
    """A weight that keeps magnitudes, and a bias."""
    weight = torch.randn(head_dim, head_dim, device=device) / head_dim**0.5
    return weight, torch.randn(head_dim, device=device) if with_bias else None


def heads_on_meta(dtype, head_dim):
    """q, k and v of a valid call, by name."""
    q = torch.empty(1, 2, 300, head_dim, dtype=dtype, device="meta")
    return {"q": q, "k": q, "v": q}


def sparsity_on_meta(head_dim, block_q, block_k):
    """What sparse-linear attention takes besides q, k and v, by name."""
    return {
        "proj_weight": torch.empty(head_dim, head_dim, device="meta"),
        "proj_bias": torch.empty(head_dim, device="meta"),
        "topk": 0.1,
        "block_q": block_q,
        "block_k": block_k,
        "feature_map": "softmax",
    }


def highest_blocks(q, k, topk, block_q, block_k):
    """Whether each query block keeps each key block, (B, H, NQ, NK); token by token in float64."""

    def means(x, block):
        return torch.stack([part.double().mean(2) for part in x.split(block, 2)], 2)

    scores = torch.einsum("bhqd,bhkd->bhqk", means(q, block_q), means(k, block_k))
    keep = max(1, int(topk * math.ceil(k.shape[2] / block_k)))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(keep).indices, True)


def masked_attention(q, k, v, kept, block_q, block_k):
    """Dense softmax attention in float64, all but the kept blocks hidden by a mask."""
    length = q.shape[2]
    mask = kept.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    hidden = ~mask[:, :, :length, :length]
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.double()


def with_8_bit_operands(q, k, v, kept, block_q, block_k, scale=None):
    """The sparse branch of one head, query by query in float64, from integers and e4m3 codes."""
    scale = q.shape[1] ** -0.5 if scale is None else scale

    def e4m3(x):
        return x.float().to(torch.float8_e4m3fn).double()

    q, k, v = q.double(), k.double(), v.double()
    smooth = k - k.mean(0)
    k_int, k_step = torch.empty_like(k), torch.empty_like(k[:, 0])
    for first in range(0, len(k), block_k):
        part = slice(first, first + block_k)
        k_step[part] = smooth[part].abs().max().clamp_min(1e-8) / 127
        k_int[part] = (smooth[part] / k_step[first]).round()
    v_step = v.abs().amax(0) / 448
    v_code = e4m3(v / v_step)
    o = torch.empty_like(q)
    for token in range(len(q)):
        step = q[token].abs().max() / 127
        q_int = (q[token] / step).round()
        seen = kept[token // block_q].repeat_interleave(block_k)[: len(k)]
        scores = (k_int @ q_int) * step * k_step * scale
        p = (scores[seen] - scores[seen].max()).exp()
        o[token] = e4m3(448 * p) @ v_code[seen] / 448 * v_step / p.sum()
    return o


def linear_branch(q, k, v, feature_map, eps=1e-5):
    """Each query's weights over all keys, written out: φ(q)·φ(k) / (1e-5 + their sum)."""

    def phi(x):
        x = x.double()
        if feature_map == "softmax":
            return x.exp() / x.exp().sum(-1, keepdim=True)
        return torch.where(x > 0, x + 1, x.exp()) if feature_map == "elu" else x.clamp_min(0)

    weights = torch.einsum("bhqd,bhkd->bhqk", phi(q), phi(k))
    return weights @ v.double() / (eps + weights.sum(-1, keepdim=True))


def sparse_linear(q, k, v, weight, bias, topk, block_q, block_k, feature_map):
    """The definition of sla, in float64."""
    kept = highest_blocks(q, k, topk, block_q, block_k)
    o = masked_attention(q, k, v, kept, block_q, block_k)
    if weight is not None:
        o = o + linear_branch(q, k, v, feature_map) @ weight.double().T
    return o if bias is None else o + bias.double()


def rotation(length, device, head_dim=HEAD_DIM):
    """cos and sin (1, L, 1, D / 2), laid out as the models have them: every second of a table."""
    angle = torch.randn(1, length, 1, head_dim // 2, device=device) * 3
    return tuple(x.repeat_interleave(2, -1)[..., ::2] for x in (angle.cos(), angle.sin()))


def normalized_and_turned(x, weight, cos, sin, eps):
    """RMSNorm over all channels, then a complex product for each pair: (B, L, H, D) float64."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, cos.shape[-1], 2)).contiguous())
    turned = pairs * torch.complex(cos.double(), sin.double())
    return torch.view_as_real(turned).flatten(-2)


def assert_attends(expected, provider, name, args, largest_error):
    """The operator by that provider is finite and that close to `expected`."""
    o = run_by(provider, name, *args)
    assert o.dtype is args[0].dtype and o.isfinite().all()
    error = relative_error(expected, o)
    assert error < largest_error, f"relative error {error:.2g}"
    return o
