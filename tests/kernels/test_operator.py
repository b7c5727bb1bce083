"""Which provider runs, why, and how that is forced, explained and recorded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import turbo_opt.kernels as kernels
from turbo_opt.kernels import (
    Capability,
    OperatorInputError,
    ProviderError,
    adaln,
    choose,
    clear_recorded_choices,
    explain,
    force_provider,
    operators,
    parse_capability,
    quantize_activation,
    quantize_weight,
    recorded_choices,
    rms_norm,
)
from turbo_opt.kernels import operator as operator_named


def linear_arguments(scheme, tokens=8, dtype=torch.bfloat16):
    operands = (
        *quantize_activation(torch.randn(tokens, 128), scheme),
        *quantize_weight(torch.randn(128, 128), scheme),
    )
    return (*operands, None, scheme, dtype)


@pytest.mark.parametrize(
    ("scheme", "device", "provider"),
    [
        ("fp8-block", "sm90", "torch"),
        ("fp8-block", "sm89", "triton"),
        ("fp8-block", "sm120", "triton"),
        ("fp8-block", "sm80", "reference"),
        ("fp8-block", "cpu", "reference"),
        ("int8-block", "sm90", "triton"),
        ("int8-block", "sm80", "triton"),
        ("int8-block", "sm75", "reference"),
        ("int8-block", "cpu", "torch"),
    ],
)
def test_block_linear_on_described_devices(scheme, device, provider):
    assert choose("block_linear", device, *linear_arguments(scheme)) == provider


def test_autocast_changes_nothing_in_an_operator():
    """Training calls operators under autocast, which would have their products in bfloat16."""
    q_means, k_means = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64)
    lists = kernels.block_routing(q_means, k_means, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(q_means[0, 0], k_means[0, 0].T).dtype is torch.bfloat16
        assert torch.equal(kernels.block_routing(q_means, k_means, 9), lists)


def test_the_choice_may_be_asked_with_meta_tensors():
    x, scale = torch.empty(1, 9, 64, device="meta"), torch.empty(1, 1, 64, device="meta")
    assert choose("adaln", "sm90", x, scale, scale, 1e-6) == "triton"
    assert choose("adaln", Capability("sm", 7, 5), x, scale, scale, 1e-6) == "reference"
    assert choose("adaln", Capability("mps"), x, scale, scale, 1e-6) == "reference"


def test_explain_says_why_each_other_provider_was_passed_over():
    choice = explain("block_linear", "sm90", *linear_arguments("fp8-block", tokens=7))
    assert choice.provider == "cuda"
    assert "multiple of 4" in choice.passed_over["torch"]
    assert choice.passed_over["reference"] == "works, but 'cuda' is preferred on sm90"
    assert "not torch: the number of tokens" in str(choice)


def test_a_forced_provider_runs_and_is_recorded(device):
    x = torch.randn(2, 128, device=device)
    clear_recorded_choices()
    rms_norm(x)
    with force_provider({"rms_norm": "triton"}):
        rms_norm(x)
        rms_norm(x)
    rms_norm(x)
    counts = recorded_choices()["rms_norm"]
    assert counts["triton"] >= 2 and sum(counts.values()) == 4
    clear_recorded_choices()
    assert recorded_choices() == {}


def test_an_impossible_forced_choice_names_operator_provider_and_reason():
    arguments = linear_arguments("fp8-block")
    with force_provider({"block_linear": "torch"}):
        message = r"block_linear: provider 'torch' was forced.*sm89: cuBLASLt"
        with pytest.raises(ProviderError, match=message):
            choose("block_linear", "sm89", *arguments)
    assert choose("block_linear", "sm89", *arguments) == "triton"


def test_forced_contexts_nest():
    x, scale = torch.randn(1, 2, 64), torch.randn(1, 1, 64)
    arguments = (x, scale, scale, 1e-6)
    with force_provider({"adaln": "reference"}):
        with force_provider({"rms_norm": "reference"}):
            assert choose("adaln", "sm90", *arguments) == "reference"
        with force_provider({"adaln": "triton"}):
            assert choose("adaln", "sm90", *arguments) == "triton"
        assert choose("adaln", "sm90", *arguments) == "reference"
    assert choose("adaln", "sm90", *arguments) == "triton"


def test_unknown_names_are_answered_with_the_nearest():
    with (
        pytest.raises(ProviderError, match="did you mean 'adaln'"),
        force_provider({"adln": "triton"}),
    ):
        pass
    with (
        pytest.raises(ProviderError, match="did you mean 'triton'"),
        force_provider({"adaln": "trition"}),
    ):
        pass
    with pytest.raises(OperatorInputError, match="'sm90'"):
        parse_capability("hopper")


def run_with_providers(value: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import torch, turbo_opt.kernels as k\n"
        "k.rms_norm(torch.randn(2, 128))\n"
        "print(k.recorded_choices())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "TURBO_OPT_PROVIDERS": value},
        check=False,
    )


def test_the_environment_variable_forces_too():
    result = run_with_providers("rms_norm=reference, adaln=triton")
    assert "{'rms_norm': {'reference': 1}}" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [("rms_norm", "not of the form"), ("rms_norm=cudnn", "has no provider 'cudnn'")],
)
def test_a_wrong_environment_variable_is_an_error(value, message):
    result = run_with_providers(value)
    assert result.returncode != 0 and message in result.stderr


def test_import_is_light():
    script = (
        "import torch, sys, time; start = time.perf_counter(); import turbo_opt.kernels; "
        "taken = time.perf_counter() - start; "
        "assert 'triton' not in sys.modules or 'triton' in before; "
        "assert not torch.cuda.is_initialized(); print(taken)"
    ).replace("start = time", "before = set(sys.modules); start = time")
    taken = []
    for _ in range(3):  # the first of a new installation also compiles what it imports
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        taken.append(float(result.stdout))
        if taken[-1] < 0.5:  # about 20 ms; generous, for a busy machine
            return
    pytest.fail(f"importing the kernels takes {min(taken)} s")


def test_every_operator_has_a_schema_a_reference_and_no_alias():
    packages = {path.parent for path in Path(kernels.__file__).parent.glob("*/reference.py")}
    assert len(operators()) == len(packages)
    for name, each in operators().items():
        assert each.provider_names()[-1] == "reference"
        schema = getattr(torch.ops.turbo_opt, name).default._schema
        assert not schema.is_mutable
        assert operator_named(name) is each


@pytest.mark.gpu
def test_a_tensor_on_the_gpu_is_served_by_triton(device):
    clear_recorded_choices()
    x, scale = torch.randn(1, 9, 64, device=device), torch.randn(1, 1, 64, device=device)
    adaln(x, scale, scale)
    assert recorded_choices() == {"adaln": {"triton": 1}}
