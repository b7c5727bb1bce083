"""Which modules are the transformer blocks, found by structure: those that hold attention."""

from __future__ import annotations

import re

from torch.fx import Node

from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.program import Denoiser

_ATTENTION = frozenset(
    {
        "aten.scaled_dot_product_attention.default",
        "turbo_opt.sage_attention.default",
        "turbo_opt.padded_attention.default",
        "turbo_opt.padded_attention_quantize.default",
        "turbo_opt.sla.default",
        "turbo_opt.sagesla.default",
        "turbo_opt.sla2.default",
        "turbo_opt.norm_rope_sagesla.default",
        "turbo_opt.norm_rope_sagesla_quantize.default",
    }
)
_NUMBERED = re.compile(r"^(?P<stack>[A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)*)\.(?P<index>\d+)\.")


def is_attention(node: Node) -> bool:
    """Whether `node` is attention, PyTorch's or one of ours. Its first operand is q."""
    return str(node.target) in _ATTENTION


class BlockIndex:
    """The numbered stacks of one denoiser (`blocks`, `vace_blocks`) and their lengths."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser.name
        self._lengths: dict[str, int] = {}
        for node in denoiser.graph.nodes:
            if is_attention(node):
                found = _NUMBERED.match(module_path(node) + ".")
                if found:
                    stack, index = found["stack"], int(found["index"])
                    self._lengths[stack] = max(self._lengths.get(stack, 0), index + 1)

    def contains(self, module: str) -> bool:
        """Whether a module path lies in a transformer block."""
        found = _NUMBERED.match(module + ".")
        return found is not None and found["stack"] in self._lengths

    def is_edge(self, module: str, first: int, last: int) -> bool:
        """Whether it lies in the first or last blocks of its stack."""
        found = _NUMBERED.match(module + ".")
        if found is None or found["stack"] not in self._lengths:
            return False
        index, length = int(found["index"]), self._lengths[found["stack"]]
        return index < first or index >= length - last

    def check_edges(self, first: int, last: int) -> None:
        """Raise BadInput when `first` and `last` leave no block of a stack."""
        for stack, length in self._lengths.items():
            if first + last >= length:
                raise BadInput(
                    f"{self._denoiser}: skip.first {first} and skip.last {last} leave none of "
                    f"the {length} blocks in {stack!r}"
                )
