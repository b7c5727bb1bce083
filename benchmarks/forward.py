"""One forward of a full-size denoiser: diffusers against the compiled graph, after each pass.

    python -m benchmarks.forward --model 1.3b --out results/
    python -m benchmarks.forward --model 14b --out results/

Random weights of a trained model's scale, random inputs, one clip of 81 frames, all in one run on
one GPU. Every configuration is timed with the same attention backend order. Quality is the SQNR of
the output against eager diffusers in bf16 on the same inputs and weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import results
from benchmarks.kernels._harness import Session, Timing, sqnr_db
from benchmarks.results import Ceiling
from turbo_opt.capture.export import export_denoiser
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.rcm import SIGMA_MAX, rcm_steps, rcm_times
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import LazyTensor, WeightStore, cast, constant
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.sampler import initial_latents, sample

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Case:
    """A model and a clip: the diffusers config and the latent's (frames, height, width)."""

    name: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    runs: int


_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
CASES = {
    "1.3b": Case(
        "wan2.1-t2v-1.3b-480p",
        {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        (21, 60, 104),
        runs=10,
    ),
    "14b": Case(
        "wan2.1-t2v-14b-720p",
        {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        (21, 90, 160),
        runs=3,
    ),
    "tiny": Case(
        "tiny-random",
        {**_WAN, "num_attention_heads": 2, "num_layers": 2, "ffn_dim": 256, "text_dim": 64},
        (3, 8, 8),
        runs=2,
    ),
}
_SPARSE = "sparse-attention{{mode={mode} topk=0.1 block_q=64 block_k=128{pv}}}"
_FUSED = (
    "canonicalize,fuse-norms,merge-padding,{attention}fuse-qk-norm-rope,"
    "quantize-linear{{scheme={scheme}}},fuse-norm-quantize,fuse-qkv{{cross_attention=false}},"
    "fuse-epilogues{{linear_gelu={fp8} linear_residual={fp8}}},hoist-invariants"
)
_SAGESLA = _SPARSE.format(mode="sagesla", pv=" pv=fp8") + ","
PIPELINES = {
    "sla-bf16": "canonicalize,fuse-norms," + _SPARSE.format(mode="sla", pv=""),
    "sagesla-fp8": _FUSED.format(attention=_SAGESLA, scheme="fp8-block", fp8="true"),
    "sagesla-int8": _FUSED.format(attention=_SAGESLA, scheme="int8-block", fp8="false"),
    "fused-fp8": _FUSED.format(attention="", scheme="fp8-block", fp8="true"),
    "captured": "",
    "fuse-norms": "canonicalize,fuse-norms",
    "fp8-block": "canonicalize,fuse-norms,quantize-linear{scheme=fp8-block},fuse-norm-quantize",
    "int8-block": "canonicalize,fuse-norms,quantize-linear{scheme=int8-block},fuse-norm-quantize",
}
"""Configurations by name, in the order they run: all of a 14B take twelve minutes. Sparse
attention computes another function than dense: what rounds in it is judged against `sla-bf16`,
which keeps the same share of blocks in 16 bits."""
SPARSE_REFERENCE = "sla-bf16"
STEPS = 4
PROMPT_TOKENS = 160
"""Of 512 positions: an extended prompt of some 120 words."""


class Bench:
    """One run on one device: the reference model, its inputs, and the records made so far."""

    def __init__(self, case: Case, session: Session) -> None:
        import diffusers

        self.case, self.session = case, session
        self.device, self.dtype = session.device, torch.bfloat16
        torch.manual_seed(0)
        with torch.device("meta"):
            model = diffusers.WanTransformer3DModel(**case.config).eval()
        self.graph = export_denoiser("WanTransformer3DModel", case.config, self.dtype, False)
        self.weights = self._random_weights()
        self.projections = self._random_projections()
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
        planned = validate_pipeline(parse_pipeline(pipeline))
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

    def clip(self, module: CompiledTransformer) -> Callable[[], Tensor]:
        """The denoising of one clip by four rCM steps: all but text encoder and VAE."""
        schedule = four_steps()
        generator = torch.Generator(self.device).manual_seed(0)
        shape = tuple(self.inputs["hidden_states"].shape)
        latents = initial_latents(schedule, shape, generator, self.device)
        prompt = self.inputs["encoder_hidden_states"]

        def run() -> Tensor:
            return sample(
                {"transformer": module}, schedule, prompt, latents=latents, generator=generator
            )

        return run

    def release_reference(self) -> None:
        """Drop the diffusers model's compiled code, keep the shared weights."""
        torch.compiler.reset()
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _random_weights(self) -> dict[str, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        weights: dict[str, Tensor] = {}
        for name, meta in self.graph.exported.state_dict.items():
            if name in self.graph.tables:
                weights[name] = self.graph.tables[name].to(self.device)
                continue
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
            if meta.ndim > 1:
                fan_in = meta[0].numel() if meta.ndim != 3 else meta.shape[-1]
                tensor.normal_(0, fan_in**-0.5, generator=generator)
            else:
                tensor.normal_(1 if "norm" in name and "weight" in name else 0, 0.02,
                               generator=generator)  # fmt: skip
            weights[name] = tensor
        return weights

    def _random_projections(self) -> dict[str, Tensor]:
        """What a checkpoint tuned for sparse-linear attention holds besides: proj_l, float32."""
        generator = torch.Generator(self.device).manual_seed(1)
        weights: dict[str, Tensor] = {}
        for layer in range(self.case.config["num_layers"]):
            for leaf, shape in (("weight", (128, 128)), ("bias", (128,))):
                tensor = torch.empty(shape, device=self.device)
                tensor.normal_(0, 0.02, generator=generator)
                weights[f"blocks.{layer}.attn1.proj_l.{leaf}"] = tensor
        return weights

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
        embeddings[:, PROMPT_TOKENS:] = 0
        return embeddings

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def _leaf(name: str, like: Tensor) -> LazyTensor:
    return LazyTensor(tuple(like.shape), like.dtype, "file", {"path": "", "key": name})


def four_steps() -> Schedule:
    """Those of an rCM student, unguided."""
    times = rcm_times(4, SIGMA_MAX)
    return Schedule(rcm_steps(times, "sde"), initial_noise_scale=times[0])


def measure(
    bench: Bench, call: Callable[[], Tensor], warmup: int = 1
) -> tuple[Timing, Tensor, int]:
    """Time a forward; also its output and the peak of device memory while it ran.

    Args:
        warmup: calls before the timed ones; a CUDA graph is recorded at the second.
    """
    cuda = bench.device.type == "cuda"
    with torch.no_grad(), sdpa_kernel(ATTENTION, set_priority=True):
        output = call().clone()
        for _ in range(warmup - 1):
            call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(bench.case.runs):
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                call()
                times.append((time.perf_counter() - begun) * 1e3)
    ordered = sorted(times)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return Timing(ordered[len(ordered) // 2], spread, len(times)), output, peak


def floor_ms(bench: Bench, matmul: Ceiling) -> Ceiling:
    """The least time of the dense arithmetic: linear layers at the library's product rate in the
    given precision, dense attention at the measured rate of the best library kernel."""
    config, (frames, height, width) = bench.case.config, bench.case.latent
    tokens, heads = frames * height * width // 4, config["num_attention_heads"]
    dim, ffn, layers = heads * 128, config["ffn_dim"], config["num_layers"]
    linear = 2 * tokens * (6 * dim * dim + 2 * dim * ffn) + 2 * 512 * 2 * dim * dim
    query = torch.randn(1, heads, tokens, 128, device=bench.device, dtype=bench.dtype)
    with sdpa_kernel(ATTENTION, set_priority=True):
        attention = bench.session.time(
            lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), [()]
        )
    cross = 4 * tokens * 512 * dim
    rate = 4 * tokens * tokens * dim / attention.ms
    milliseconds = layers * (linear / matmul.value / 1e9 + attention.ms + cross / rate)
    return Ceiling(milliseconds, "ms", f"linear at {matmul.what}, attention at the library's rate")


def run(case: Case, session: Session, only: list[str], out: Path) -> None:
    """Measure every configuration of one model; each record is written as soon as it is known."""
    bench = Bench(case, session)
    floors = {
        "bf16": floor_ms(bench, session.bf16_matmul),
        "fp8-block": floor_ms(bench, session.library_matmul["fp8-block"]),
        "int8-block": floor_ms(bench, session.library_matmul["int8-block"]),
    }
    baseline: dict[str, float] = {}
    few = 2 if case.runs > 3 else 1
    eager, reference, peak = measure(bench, bench.eager(), few)
    baseline["diffusers-eager"] = eager.ms
    _keep(bench, out, "diffusers-eager", eager, peak, floors["bf16"])
    if not only or "compiled" in only:
        timing, output, peak = measure(bench, bench.compiled(), few)
        baseline["diffusers-compiled"] = timing.ms
        _keep(
            bench, out, "diffusers-compiled", timing, peak, floors["bf16"],
            quality={"sqnr_db_vs_eager_bf16": sqnr_db(reference, output)}, baseline=baseline,
        )  # fmt: skip
        bench.release_reference()
    reference_bytes = sum(tensor.nbytes for tensor in bench.weights.values())
    sparse_reference: Tensor | None = None
    for name, pipeline in PIPELINES.items():
        if only and name not in only:
            continue
        module, weight_bytes = bench.optimized(pipeline)
        timing, output, peak = measure(bench, bench.call(module), warmup=3)
        shared = reference_bytes if weight_bytes < reference_bytes else 0
        sparse = "sparse-attention" in pipeline
        if name == SPARSE_REFERENCE:
            sparse_reference = output
        other = sparse_reference if sparse else reference
        against = f"sqnr_db_vs_{SPARSE_REFERENCE if sparse else 'eager-bf16'}".replace("-", "_")
        quality = {} if other is None else {against: sqnr_db(other, output)}
        common = {"baseline": baseline, "weight_bytes": weight_bytes}
        _keep(
            bench, out, name, timing, peak - shared, _floor_of(floors, pipeline), quality=quality,
            **common,
        )  # fmt: skip
        if "hoist-invariants" in pipeline:
            timing, _, peak = measure(bench, bench.clip(module), warmup=1)
            _keep(
                bench, out, name, timing, peak - shared, None, metric="four_steps_ms",
                baseline={k: v * 100 for k, v in baseline.items() if k.startswith("diffusers")},
                weight_bytes=weight_bytes,
            )  # fmt: skip
        del module, output
        bench._collect()


def _floor_of(floors: dict[str, Ceiling], pipeline: str) -> Ceiling | None:
    """The floor of a dense configuration by its precision; none is stated for sparse ones."""
    if "sparse-attention" in pipeline:
        return None
    schemes = [name for name in floors if name in pipeline]
    return floors[schemes[0] if schemes else "bf16"]


def _keep(
    bench: Bench,
    out: Path,
    name: str,
    timing: Timing,
    peak: int,
    floor: Ceiling | None,
    *,
    metric: str = "forward_ms",
    quality: dict[str, float] | None = None,
    baseline: dict[str, float] | None = None,
    weight_bytes: int = 0,
) -> None:
    """Print one line and write one record.

    `peak` leaves out the reference's weights where the compiled graph has its own.
    """
    session, case = bench.session, bench.case
    quality = quality or {}
    print(
        f"{name:20s} {metric:14s} {timing.ms:10.1f} ms ± {timing.spread_ms:.1f}  "
        f"{', '.join(f'{k} {v:.1f}' for k, v in quality.items())}  "
        f"peak {peak / 2**30:.1f} GiB  weights {weight_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    record = session.add(
        f"{case.name}/{name}/{metric}",
        timing.ms,
        "ms",
        timing.spread_ms,
        timing.runs,
        ceiling=floor,
        share_of_ceiling=floor.value / timing.ms if floor else None,
        baseline={k: v for k, v in (baseline or {}).items() if k != name},
        quality=quality,
        config={
            "pipeline": PIPELINES.get(name, name),
            "peak_gib": peak / 2**30,
            "weight_gib": weight_bytes / 2**30,
            "latent": list(case.latent),
            "prompt_tokens": PROMPT_TOKENS,
        },
    )
    results.merge(out / "forward.json", [record])


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CASES), default="1.3b")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--only", nargs="*", default=[], help="configurations to measure")
    parser.add_argument("--dry-run", action="store_true", help="CPU, proves that the script runs")
    options = parser.parse_args()
    session = Session(dry=options.dry_run)
    run(CASES[options.model], session, options.only, options.out)
    print(results.tabulate(session.records))
    print(json.dumps(session.environment))


if __name__ == "__main__":
    main()
