"""A diffusers Wan denoiser whose self-attention is sparse-linear and can be trained.

Only the attention processor is exchanged, and `proj_l` added to each self-attention, or router and
ratio of SLA2: parameters keep diffusers' names, and those that are added are those that the pass
`sparse-attention` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turbo_opt.calibration.jobs.schema import SparseLinear
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.places import Say, unheard
from turbo_opt.calibration.sla.attention import Sparsity, linear_branch, sparse_branch
from turbo_opt.calibration.sla2.router import ROUTER, add_routers, attend_routed, router_names
from turbo_opt.calibration.training.context import heads_to_tokens, tokens_to_heads
from turbo_opt.errors import BadInput

PROJECTION = "proj_l"
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(attention module, q, k, v) → o, all (B, H, L, D), the last three after norm and rotation."""


class HeadAttention:
    """A diffusers processor for Wan's self-attention around any function of q, k and v.

    Args:
        attend: what is computed of them.
        group: processes that share the tokens; each attends with all tokens of some heads.
    """

    def __init__(self, attend: Attend, group: Any = None) -> None:
        self._attend = attend
        self._group = group

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention of (B, L, C); see diffusers' WanAttnProcessor."""
        assert encoder_hidden_states is None and attention_mask is None and rotary_emb is not None
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        q, k = (
            _turned(norm(project(hidden_states)).unflatten(2, (attn.heads, -1)), *rotary_emb)
            for norm, project in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        # Under autocast the norm's result is float32, v what products are made in.
        heads = [tokens_to_heads(x.to(v.dtype), self._group).transpose(1, 2) for x in (q, k, v)]
        o = self._attend(attn, *heads).transpose(1, 2)
        o = heads_to_tokens(o, self._group).flatten(2)
        return attn.to_out[1](attn.to_out[0](o))


def make_sparse(network: nn.Module, settings: SparseLinear, group: Any = None) -> None:
    """Give a network the self-attention that a job asks for, and say which weights are trained.

    Args:
        group: processes that share the tokens.
    """
    sparsity = Sparsity.of(settings)
    if settings.mode == "sla2":
        add_routers(network)
        set_attention(network, attend_routed(sparsity, group), group)
    else:
        add_projections(network)
        set_attention(network, attend_sparsely(sparsity), group)
    for name, parameter in network.named_parameters():
        everything = settings.trained == "all" and f".{ROUTER}." not in name
        parameter.requires_grad_(everything or f".{PROJECTION}." in name)


def initial_values(settings: SparseLinear, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values of what `make_sparse` adds, by parameter name, for a start without them."""
    return zero_projections(config) if settings.mode == "sla" else {}


def check_start(settings: SparseLinear | None, start: DenoiserFolder, say: Say = unheard) -> None:
    """See that a student can start from a model. Reads no weights.

    Args:
        settings: of its attention; None is dense.
        say: told of weights that the student has no place for.

    Raises:
        BadInput: a student of SLA2 would start without a router.
    """
    stored = start.checkpoint({}).unread
    mode = "dense" if settings is None else settings.mode
    if useless := [name for name in stored if _is_left_out(name, mode)]:
        say(
            f"student.start: {start.path} is tuned for another attention than this job's ({mode}): "
            f"{len(useless)} of its weights are left out, {useless[0]} the first"
        )
    if mode != "sla2":
        return
    missing = [name for name in router_names(start.config) if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(
            f"student.start: {start.path} has no {missing[0]}{more}; sla.mode sla2 starts from the "
            "`model` folder that `turbo-opt calibrate router` writes"
        )


def _is_left_out(name: str, mode: str) -> bool:
    """Whether a student of that mode has no such weight, one of sparse attention."""
    projection, routed = f".attn1.{PROJECTION}." in name, f".{ROUTER}." in name
    return (projection and mode != "sla") or (routed and mode != "sla2")


def check_dense(folder: DenoiserFolder) -> None:
    """Raise BadInput if a companion is tuned for sparse attention. Reads no weights."""
    stored = folder.checkpoint({}).unread
    learned = [name for name in stored if f".attn1.{PROJECTION}." in name or f".{ROUTER}." in name]
    if learned:
        raise BadInput(
            f"companions: {folder.path} has {learned[0]}: it is tuned for sparse attention, and "
            "would be imitated with dense; name the model that it was before"
        )


def attend_sparsely(sparsity: Sparsity) -> Attend:
    """o = sparse branch + proj_l(linear branch), with the module's own `proj_l`."""

    def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = sparse_branch(q, k, v, sparsity)
        linear = linear_branch(q, k, v, sparsity.feature_map)
        return o + project_branch(attn.proj_l, linear)

    return attend


def project_branch(proj: nn.Linear, linear: Tensor) -> Tensor:
    """proj_l of the linear branch, in float32 as the operators have it, back in the same dtype."""
    with torch.autocast(linear.device.type, enabled=False):
        return proj(linear.to(proj.weight.dtype)).to(linear.dtype)


def add_projections(network: nn.Module) -> None:
    """Give every self-attention a `proj_l`, without values if the network has none."""
    for _, attention in self_attentions(network):
        head_dim = attention.inner_dim // attention.heads
        device = attention.to_q.weight.device
        attention.proj_l = nn.Linear(head_dim, head_dim, device=device)


def zero_projections(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values of every `proj_l` at the start of tuning, by parameter name."""
    width = int(config["attention_head_dim"])
    return {
        f"blocks.{layer}.attn1.{PROJECTION}.{kind}": torch.zeros(shape)
        for layer in range(int(config["num_layers"]))
        for kind, shape in (("weight", (width, width)), ("bias", (width,)))
    }


def set_attention(network: nn.Module, attend: Attend, group: Any = None) -> None:
    """Have every self-attention compute `attend`."""
    for _, attention in self_attentions(network):
        attention.set_processor(HeadAttention(attend, group))


def self_attentions(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of each self-attention, in the order they run."""
    for index, block in enumerate(network.blocks):  # type: ignore[arg-type]
        yield f"blocks.{index}.attn1", block.attn1


def _turned(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels turned by its token's angle; tables repeat each angle twice."""
    even, odd = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).type_as(x_BLHD)
