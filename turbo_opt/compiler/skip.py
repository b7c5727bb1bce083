"""Which layers a pass leaves alone: the `skip` option that passes over layers share."""

from __future__ import annotations

from fnmatch import fnmatch

from pydantic import Field, NonNegativeInt

from turbo_opt.compiler.base import PassOptions
from turbo_opt.compiler.blocks import BlockIndex
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Denoiser, Program


class Skip(PassOptions):
    """Which layers stay as they are."""

    first: NonNegativeInt = Field(0, description="blocks to skip at the start")
    last: NonNegativeInt = Field(0, description="blocks to skip at the end")
    names: tuple[str, ...] = Field(
        (), description="globs over module paths, such as `*.attn2.*` or `blocks.0.ffn.*`"
    )


class Skipper:
    """Answers for one run of a pass which modules its `skip` option names.

    Args:
        pass_name: for messages.
        layer: what the pass rewrites, such as `linear layer`.
        example: a module path of one.

    Raises:
        BadInput: `first` and `last` leave no block.
    """

    def __init__(
        self, program: Program, skip: Skip, *, pass_name: str, layer: str, example: str
    ) -> None:
        self._skip = skip
        self._unused = set(skip.names)
        self._words = (pass_name, layer, example)
        self._blocks = {denoiser.name: BlockIndex(denoiser) for denoiser in program}
        for blocks in self._blocks.values():
            blocks.check_edges(skip.first, skip.last)

    def blocks(self, denoiser: Denoiser) -> BlockIndex:
        """The transformer blocks of `denoiser`."""
        return self._blocks[denoiser.name]

    def skips(self, denoiser: Denoiser, module: str) -> bool:
        """Whether the layer at `module` is to be left alone."""
        matching = {glob for glob in self._skip.names if fnmatch(module, glob)}
        self._unused -= matching
        edge = self.blocks(denoiser).is_edge(module, self._skip.first, self._skip.last)
        return bool(matching) or edge

    def check(self) -> None:
        """Every name must have matched a layer by now.

        Raises:
            BadInput: one did not.
        """
        if self._unused:
            pass_name, layer, example = self._words
            raise BadInput(
                f"{pass_name}: skip.names {min(self._unused)!r} matches no {layer}; "
                f"names are module paths such as {example!r}"
            )
