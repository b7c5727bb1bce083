"""A compiled denoiser as a torch module with the interface of the transformer it came from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from turbo_opt.ir.edit import copy_exported, parameter_names, user_inputs
from turbo_opt.ir.stages import StageInputs, writes_in_place
from turbo_opt.runtime.cuda_graph import CudaBackend, why_not
from turbo_opt.runtime.staged import StagedGraph

_NOT_SAMPLED = "no clip was sampled yet"


def executable(
    exported: ExportedProgram, weights: Mapping[str, Tensor], device: torch.device | str
) -> GraphModule:
    """The graph as a module with its weights in place, on `device`.

    A graph captured on meta names meta in its factory calls and asserts: factories are sent to
    `device`, asserts on metadata are dropped.

    Args:
        weights: every parameter and buffer by name; moved to `device` where they are not yet.

    Raises:
        ValueError: a weight is missing.
    """
    device = torch.device(device)
    missing = exported.state_dict.keys() - weights.keys()
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first is {min(missing)!r}")
    root = nn.Module()
    for name in exported.state_dict:
        _set_weight(root, name, weights[name].to(device))
    exported = copy_exported(exported)
    graph = exported.graph
    for node, name in parameter_names(exported).items():
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", name)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            node.args = (None,)
    _send_factories_to(graph, device)
    return GraphModule(root, graph)


def _send_factories_to(graph: Graph, device: torch.device) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}


def _set_weight(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_buffer(leaf, value)


class CompiledTransformer(nn.Module):
    """A drop-in for `pipe.transformer` in diffusers: same call, same config, same result type.

    Where the artifact names stages (pass `hoist-invariants`), what a prompt, a noise level or a
    clip size determines is computed once and kept, and on a GPU the rest of a step is replayed as a
    CUDA graph from the second call of a shape on. Results are the same. One call at a time.

    Attributes:
        config: the diffusers config of the model it was captured from (attribute access works).
        dtype: dtype of latents and text embeddings it takes.
        stages: which inputs define a stage; see `ir.stages`.
        loop_graph_status: whether the last clip by `sample` could be one CUDA graph; as
            `cuda_graph_status`.
    """

    def __init__(
        self,
        graph: GraphModule,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        inputs: list[str],
        stages: StageInputs | None = None,
        cuda_graph: bool = True,
    ) -> None:
        super().__init__()
        from diffusers.configuration_utils import FrozenDict

        self.graph = graph
        self.config = FrozenDict(copy.deepcopy(dict(config)))
        self.dtype = dtype
        self.inputs = inputs
        self.stages = dict(stages or {}) if writes_in_place(graph.graph) is None else {}
        self.loop_graph_status = _NOT_SAMPLED
        self._cuda_graph = cuda_graph
        self._staged: StagedGraph | None = None

    @classmethod
    def build(
        cls,
        exported: ExportedProgram,
        weights: Mapping[str, Tensor],
        config: Mapping[str, Any],
        device: torch.device | str,
        stages: StageInputs | None = None,
        cuda_graph: bool = True,
    ) -> CompiledTransformer:
        """Put weights and graph together on `device`; see `executable` for what it raises.

        Args:
            stages: which inputs define a stage; without them the graph runs as a whole.
            cuda_graph: replay steps as CUDA graphs on a GPU.
        """
        nodes = user_inputs(exported)
        dtype = nodes[0].meta["val"].dtype
        names = [str(node.target) for node in nodes]
        graph = executable(exported, weights, device)
        return cls(graph, config, dtype, names, stages, cuda_graph)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.graph.state_dict().values())).device

    @property
    def cuda_graph_status(self) -> str:
        """`on, …`, `off, …` or `failed, …` with the reason, for people to read."""
        if not self.stages:
            return "off, the artifact was made without the pass hoist-invariants"
        reason = why_not(self.device, self._cuda_graph)
        if reason is not None:
            return reason
        graphs = self._staged.graphs if self._staged is not None else None
        return graphs.status if graphs is not None else "on, not called yet"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledTransformer:
        """Move to another device. Weights keep their dtypes: the graph is compiled for them.

        What was kept for prompts, noise levels and clip sizes is dropped.

        Raises:
            ValueError: another dtype is asked for.
        """
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if dtype != self.dtype:
            raise ValueError(f"compiled for {self.dtype}, cannot become {dtype}; compile it anew")

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, dtype=self.dtype, device=tensor.device)).device)

        self._staged = None
        self.loop_graph_status = _NOT_SAMPLED
        super()._apply(move, recurse)
        _send_factories_to(self.graph.graph, self.device)
        self.graph.recompile()
        return self

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        **conditions: Tensor,
    ) -> Any:
        """Predict the velocity for one noise level.

        Args:
            hidden_states: latents (B, C, F, H, W).
            timestep: (B,), or (B, L) for models with a timestep per token; any real dtype. One on
                the CPU is accepted anywhere, and what follows from it is known again by its value.
            encoder_hidden_states: text embeddings (B, L_text, C_text).
            encoder_hidden_states_image: image embeddings, where the model takes them.
            return_dict: give a `Transformer2DModelOutput` instead of a 1-tuple.
            attention_kwargs: must be empty; adapters are merged before compiling.
            conditions: further tensors the model takes (VACE's control_hidden_states and
                control_hidden_states_scale).

        Raises:
            ValueError: an input is missing, unknown, or of a shape the model cannot take.
        """
        if attention_kwargs:
            raise ValueError("a compiled transformer takes no attention_kwargs; merge LoRA first")
        given = self.checked(
            {
                "hidden_states": hidden_states,
                "timestep": timestep,
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_hidden_states_image": encoder_hidden_states_image,
                **conditions,
            }
        )
        sample = self._velocity(given)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Diffusers' hook for step caches; nothing to do, prompts are told apart by themselves."""
        yield

    def checked(self, named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Those inputs that are not None.

        Raises:
            ValueError: one is missing, unknown, or of a shape the model cannot take.
        """
        given = {name: value for name, value in named.items() if value is not None}
        if set(given) != set(self.inputs):
            raise ValueError(f"the model takes {self.inputs}, got {sorted(given)}")
        self._check_shape(given["hidden_states"])
        return given

    def staged(self) -> StagedGraph | None:
        """The network in stages, on the device where it is; None if the artifact names none."""
        if self._staged is None and self.stages:
            device = self.device
            wanted = why_not(device, self._cuda_graph) is None
            backend = CudaBackend(device) if wanted else None
            self._staged = StagedGraph(self.graph, self.stages, backend)
        return self._staged

    def _velocity(self, given: dict[str, Tensor]) -> Tensor:
        staged = None if _is_traced(given) else self.staged()
        if staged is not None:
            return staged(given)
        timestep = given["timestep"].to(given["hidden_states"].device, torch.float32)
        return self.graph(**{**given, "timestep": timestep})[0]  # type: ignore[no-any-return]

    def _check_shape(self, hidden_states: Tensor) -> None:
        channels, patch = self.config["in_channels"], self.config["patch_size"]
        if hidden_states.ndim != 5 or hidden_states.shape[1] != channels:
            raise ValueError(
                f"hidden_states must be (B, {channels}, F, H, W), got {tuple(hidden_states.shape)}"
            )
        for axis, size in zip("FHW", patch, strict=True):
            side = hidden_states.shape["BCFHW".index(axis)]
            if side % size:
                raise ValueError(f"latent {axis} = {side} is not a multiple of the patch {size}")


def _is_traced(given: Mapping[str, Tensor]) -> bool:
    """Whether the caller records this call, for gradients or in a CUDA graph of its own: then
    nothing may come from an earlier one."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given.values()):
        return True
    return given["hidden_states"].is_cuda and torch.cuda.is_current_stream_capturing()
