"""One diffusers transformer as a weight-free exported program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from turbo_opt.capture.checkpoint import storage_dtype
from turbo_opt.capture.inputs import capture_inputs
from turbo_opt.capture.repeat import expand, repeated_blocks
from turbo_opt.collector import collector_paused
from turbo_opt.errors import BadInput


@dataclass(frozen=True)
class CapturedGraph:
    """A graph, and the values of the buffers that no checkpoint stores (by name)."""

    exported: ExportedProgram
    tables: Mapping[str, Tensor]


def export_denoiser(
    class_name: str, config: Mapping[str, Any], dtype: torch.dtype, expand_timesteps: bool
) -> CapturedGraph:
    """Trace the model on meta parameters; no weight is read or allocated.

    Of blocks that are equal one is traced (`capture.repeat`).

    Buffers outside the checkpoint (the rotary tables) become ordinary weights of the graph, so
    that passes and artifacts treat everything a graph reads alike.

    Raises:
        BadInput: config.json does not describe a model of this class.
    """
    model, tables = _weightless_model(class_name, config, dtype)
    inputs = capture_inputs(class_name, config, dtype, expand_timesteps)
    kwargs = {**inputs.tensors, "return_dict": False}
    shapes = {**inputs.dynamic_shapes, "return_dict": None}
    with torch.no_grad(), warnings.catch_warnings(), collector_paused():
        warnings.simplefilter("ignore")
        with repeated_blocks(model):
            exported = torch.export.export(
                model, (), kwargs=kwargs, dynamic_shapes=shapes, strict=False
            )
        exported = expand(exported)
    _keep_tables_as_weights(exported)
    return CapturedGraph(exported, tables)


def _weightless_model(
    class_name: str, config: Mapping[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    import diffusers
    from accelerate import init_empty_weights

    model_class = getattr(diffusers, class_name)
    try:
        with init_empty_weights(include_buffers=False):
            model = model_class.from_config(dict(config)).eval()
    except (TypeError, ValueError) as error:
        raise BadInput(f"config.json does not describe a {class_name}: {error}") from None
    persistent = set(model.state_dict())
    tables = {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if name not in persistent
    }
    keep_float32 = model_class._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, dtype, keep_float32))
        parameter.requires_grad_(False)
    return model.to("meta"), tables


def _keep_tables_as_weights(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.BUFFER and spec.persistent is False and spec.target is not None:
            spec.persistent = True
            exported.state_dict[spec.target] = exported.constants.pop(spec.target).to("meta")
