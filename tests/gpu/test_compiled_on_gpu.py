"""The compiled transformer on a GPU: fast providers run, and agree with the CPU reference."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import VARIANTS, captured_program, random_inputs
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.kernels import clear_recorded_choices, recorded_choices
from turbo_opt.runtime.module import CompiledTransformer

pytestmark = pytest.mark.gpu

FUSED = "canonicalize,fuse-norms,quantize-linear{{scheme={}}},fuse-norm-quantize"


def on(device, program):
    (denoiser,) = program
    weights = {name: tensor.load() for name, tensor in denoiser.weights.items()}
    return CompiledTransformer.build(denoiser.exported, weights, denoiser.config, device)


def optimized(variant, scheme):
    planned = validate_pipeline(parse_pipeline(FUSED.format(scheme)))
    program = captured_program(variant, torch.bfloat16)
    return PassManager(planned, verification=Verification("off")).run(program)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scheme", ["int8-block", "fp8-block"])
def test_gpu_and_cpu_agree_and_no_reference_runs_on_the_gpu(name, scheme):
    if scheme == "fp8-block" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8 products")
    variant = VARIANTS[name]
    program = optimized(variant, scheme)
    inputs = random_inputs(variant, 2, 3, 8, 12, torch.bfloat16)
    clear_recorded_choices()
    with torch.no_grad():
        found = on("cuda", program)(**{k: v.cuda() for k, v in inputs.items()}).sample
    used = recorded_choices()
    assert all("reference" not in providers for providers in used.values()), used
    with torch.no_grad():
        expected = on("cpu", program)(**inputs).sample
    assert sqnr_db(expected.float(), found.cpu().float()) >= 25


def test_a_compiled_transformer_moves_between_devices():
    variant = VARIANTS["t2v"]
    module = on("cpu", optimized(variant, "int8-block"))
    inputs = random_inputs(variant, 1, 2, 8, 8, torch.bfloat16)
    with torch.no_grad():
        expected = module(**inputs).sample
        found = module.to("cuda")(**{k: v.cuda() for k, v in inputs.items()}).sample
    assert module.device.type == "cuda"
    assert sqnr_db(expected.float(), found.cpu().float()) >= 25


def test_the_forward_can_be_captured_in_a_cuda_graph():
    variant = VARIANTS["t2v"]
    module = on("cuda", optimized(variant, "int8-block"))
    inputs = {k: v.cuda() for k, v in random_inputs(variant, 1, 2, 8, 8, torch.bfloat16).items()}
    inputs["timestep"] = inputs["timestep"].float()
    with torch.no_grad():
        expected = module(**inputs).sample
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(**inputs).sample
        captured.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
