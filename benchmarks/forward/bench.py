"""One model on one device: diffusers' form of it, and ours after any pipeline."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.forward.cases import Case
from benchmarks.forward.configurations import four_steps
from benchmarks.forward.random_weights import random_projections, random_weights
from benchmarks.kernels._harness import Session
from turbo_opt.capture.export import export_denoiser
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import LazyTensor, WeightStore, cast, constant
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.sampler import initial_latents, sample
from turbo_opt.targets import detect_target


class Bench:
    """The reference model, its captured graph, and the inputs that both are called with."""

    def __init__(self, case: Case, session: Session) -> None:
        import diffusers

        self.case, self.session = case, session
        self.device, self.dtype = session.device, torch.bfloat16
        torch.manual_seed(0)
        with torch.device("meta"):
            model = diffusers.WanTransformer3DModel(**case.config).eval()
        self.graph = export_denoiser("WanTransformer3DModel", case.config, self.dtype, False)
        self.weights = random_weights(
            self.graph.exported.state_dict, self.graph.tables, self.device
        )
        self.projections = random_projections(case.config["num_layers"], self.device)
        model.load_state_dict(
            {k: v for k, v in self.weights.items() if k not in self.graph.tables},
            strict=False,
            assign=True,
        )
        for name, table in self.graph.tables.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, table.to(self.device))
        self.model = model
        frames, height, width = case.latent
        self.inputs = {
            "hidden_states": self._noise(1, 16, frames, height, width),
            "timestep": torch.full((1,), 700.0, device=self.device),
            "encoder_hidden_states": self._prompt(),
        }

    def eager(self) -> Callable[[], Tensor]:
        """Diffusers as it comes."""
        return lambda: self.model(**self.inputs, return_dict=False)[0]

    def compiled(self) -> Callable[[], Tensor]:
        """Diffusers under torch.compile, its blocks compiled once and reused."""
        for block in self.model.blocks:
            block.compile(dynamic=False)
        return self.eager()

    def optimized(self, pipeline: str) -> tuple[CompiledTransformer, int]:
        """Our graph after `pipeline` as a module, and the bytes of its weights on the device."""
        unread = WeightStore(
            {name: _leaf(name, tensor) for name, tensor in self.projections.items()}
        )
        denoiser = Denoiser(
            "transformer", self.graph.exported, self._store(), "WanTransformer3DModel",
            self.case.config, unread=unread,
        )  # fmt: skip
        program = Program({"transformer": denoiser}, Schedule(()), Components("", "", {}))
        target = detect_target() if self.device.type == "cuda" else None  # a dry run takes fp8 too
        planned = validate_pipeline(parse_pipeline(pipeline), target=target)
        denoiser = (
            PassManager(planned, verification=Verification("off"))
            .run(program)
            .denoisers["transformer"]
        )
        weights = {name: self._on_device(item) for name, item in denoiser.weights.items()}
        size = sum(tensor.nbytes for tensor in weights.values())
        module = CompiledTransformer.build(
            denoiser.exported, weights, self.case.config, self.device, denoiser.stages
        )
        return module, size

    def call(self, module: CompiledTransformer) -> Callable[[], Tensor]:
        """One evaluation on the benchmark's inputs."""
        return lambda: module(**self.inputs, return_dict=False)[0]

    def clip(self, module: CompiledTransformer, loop_graph: bool = False) -> Callable[[], Tensor]:
        """The denoising of one clip by four rCM steps: all but text encoder and VAE.

        Args:
            loop_graph: as one CUDA graph from the second clip on, else one for each step.
        """
        schedule = four_steps()
        generator = torch.Generator(self.device).manual_seed(0)
        shape = tuple(self.inputs["hidden_states"].shape)
        latents = initial_latents(schedule, shape, generator, self.device)
        prompt = self.inputs["encoder_hidden_states"]

        def run() -> Tensor:
            return sample(
                {"transformer": module}, schedule, prompt, latents=latents, generator=generator,
                loop_graph=loop_graph,
            )  # fmt: skip

        return run

    def release_reference(self) -> None:
        """Drop the diffusers model's compiled code, keep the shared weights."""
        torch.compiler.reset()
        self.collect()

    def collect(self) -> None:
        """Give back the device memory of what is no longer referred to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _store(self) -> WeightStore:
        store = WeightStore()
        for name, meta in self.graph.exported.state_dict.items():
            if name in self.graph.tables:
                store[name] = constant(self.graph.tables[name])
            else:
                store[name] = cast(_leaf(name, meta), meta.dtype)
        return store

    def _on_device(self, tensor: LazyTensor) -> Tensor:
        def leaf(item: LazyTensor) -> Tensor:
            if item.op == "file":
                key = item.attrs["key"]
                return self.weights[key] if key in self.weights else self.projections[key]
            assert item.value is not None
            return item.value.to(self.device)

        return tensor.evaluate(leaf)[tensor.output]

    def _prompt(self) -> Tensor:
        """Embeddings padded with zeros, as diffusers' pipeline pads what the text encoder gives."""
        embeddings = self._noise(1, 512, self.case.config["text_dim"])
        embeddings[:, self.case.prompt_tokens :] = 0
        return embeddings

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def _leaf(name: str, like: Tensor) -> LazyTensor:
    return LazyTensor(tuple(like.shape), like.dtype, "file", {"path": "", "key": name})
