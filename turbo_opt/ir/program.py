"""Program: the one representation that capture makes, passes rewrite and artifacts store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from turbo_opt.ir.edit import copy_exported, parameter_names
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.printer import graph_text
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.stages import StageInputs
from turbo_opt.ir.weights import WeightStore


@dataclass
class Denoiser:
    """One network of the loop: a weight-free graph, and the weights it takes.

    Attributes:
        name: `transformer`, or `transformer_2` for the second expert, as in the diffusers folder.
        exported: a torch.export program on the meta device; parameters and buffers are
            placeholders, tokens and batch are symbolic.
        weights: a lazy tensor for every parameter and buffer placeholder.
        model_class: the diffusers class it was captured from.
        config: that class's config.
        stages: inputs that a clip, or a noise level, sets once: what follows from them alone is
            computed once. None recorded: everything runs at each step. See `ir.stages`.
        unread: weights of the checkpoint that the graph does not read, for passes that may want
            them (`blocks.0.attn1.proj_l.weight` of sparse-linear attention); never saved.
    """

    name: str
    exported: ExportedProgram
    weights: WeightStore
    model_class: str
    config: Mapping[str, Any]
    stages: StageInputs = field(default_factory=dict)
    unread: WeightStore = field(default_factory=WeightStore)

    @property
    def graph_module(self) -> GraphModule:
        """The fx module inside the exported program."""
        return self.exported.graph_module

    @property
    def graph(self) -> Graph:
        """The fx graph that passes rewrite."""
        return self.exported.graph_module.graph

    def parameters(self) -> dict[Node, str]:
        """Placeholder → parameter or buffer name."""
        return parameter_names(self.exported)

    def fork(self) -> Denoiser:
        """A copy whose graph and weight map can be rewritten without touching this one."""
        return replace(
            self,
            exported=copy_exported(self.exported),
            weights=self.weights.copy(),
            unread=self.unread.copy(),
        )

    def digest(self) -> str:
        """SHA-256 over the normalized graph with dtypes and arguments, the weights, the stages."""
        hasher = hashlib.sha256(graph_text(self.exported, stable=True).encode())
        hasher.update(self.weights.digest().encode())
        hasher.update(self.unread.digest().encode())
        hasher.update(json.dumps(dict(self.config), sort_keys=True, default=str).encode())
        hasher.update(json.dumps(dict(self.stages), sort_keys=True).encode())
        return hasher.hexdigest()


@dataclass(frozen=True)
class Components:
    """Where the parts that are not compiled live: a diffusers folder and what is in it.

    Attributes:
        source: what the user named: `tiny-wan`, a folder, or a hub id.
        pipeline_class: the diffusers pipeline class of `model_index.json`.
        folders: component → (library, class), as in `model_index.json`.
        pipeline_config: the remaining entries, such as `boundary_ratio`.
    """

    source: str
    pipeline_class: str
    folders: Mapping[str, tuple[str, str]]
    pipeline_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Program:
    """Everything a recipe turns into an artifact.

    Attributes:
        denoisers: by name; two for a pair of experts.
        schedule: the sampling loop as data.
        components: references to text encoder, tokenizer, VAE, image encoder.
        facts: what is known to hold.
        history: one JSON-able record per pass run.
    """

    denoisers: dict[str, Denoiser]
    schedule: Schedule
    components: Components
    facts: frozenset[Fact] = frozenset()
    history: tuple[Mapping[str, Any], ...] = ()

    def fork(self) -> Program:
        """A copy that a pass may rewrite."""
        return replace(self, denoisers={name: item.fork() for name, item in self.denoisers.items()})

    def __iter__(self) -> Iterator[Denoiser]:
        return iter(self.denoisers.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights of all denoisers once computed."""
        return sum(denoiser.weights.nbytes for denoiser in self)

    def digest(self) -> str:
        """SHA-256 of all that a pass can see, for the pass cache."""
        parts = {
            "denoisers": {name: item.digest() for name, item in self.denoisers.items()},
            "schedule": self.schedule.to_json(),
            "facts": sorted(self.facts),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
