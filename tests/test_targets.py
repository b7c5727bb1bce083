"""Targets by name and by what a driver reports."""

from __future__ import annotations

import pytest

from turbo_opt.errors import BadInput
from turbo_opt.targets import classify_gpu, detect_target, get_target, known_targets


def test_known_targets_say_what_they_can_do():
    h200 = get_target("h200")
    assert (h200.device_type, h200.compute_capability, h200.memory_gib) == ("cuda", (9, 0), 139)
    assert h200.schemes == ("fp8-block", "int8-block")
    assert get_target("cpu").compute_capability is None
    assert get_target("rtx4090").schemes[0] == "int8-block"
    assert not get_target("a100").supports("fp8-block")
    assert {"h100", "l40s", "rtx5090", "b200"} <= set(known_targets())


def test_unknown_target_names_the_nearest_one():
    with pytest.raises(BadInput) as caught:
        get_target("rtx490")
    assert str(caught.value) == (
        "unknown target 'rtx490', did you mean 'rtx4090'? Known: a100, b200, cpu, h100, h200, "
        "l40s, rtx4090, rtx5090. Any other NVIDIA GPU: its compute capability, like 'sm86'."
    )


@pytest.mark.parametrize(
    ("name", "capability"), [("sm86", (8, 6)), ("sm_90", (9, 0)), ("sm120", (12, 0))]
)
def test_compute_capability_names_a_generic_target(name, capability):
    target = get_target(name)
    assert target.compute_capability == capability
    assert target.name == f"sm{capability[0]}{capability[1]}"
    assert target.memory_gib is None


@pytest.mark.parametrize(
    ("device", "capability", "memory_gib", "name"),
    [
        ("NVIDIA H200", (9, 0), 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.1, "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.2, "a100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 31.4, "rtx5090"),
        ("NVIDIA L40S", (8, 9), 44.4, "l40s"),
        ("NVIDIA GH200 480GB", (9, 0), 94.5, "sm90"),
        ("NVIDIA H200 MIG 1g.18gb", (9, 0), 16.0, "sm90"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.4, "sm80"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 15.6, "sm89"),
        ("NVIDIA GeForce RTX 3090", (8, 6), 23.7, "sm86"),
    ],
)
def test_gpu_is_recognised_by_name_and_memory(device, capability, memory_gib, name):
    target = classify_gpu(device, capability, memory_gib)
    assert target.name == name
    assert target.compute_capability == capability
    assert target.memory_gib == pytest.approx(memory_gib, abs=1)


def test_generic_gpu_knows_its_schemes_by_compute_capability():
    assert classify_gpu("x", (7, 0), 16).schemes == ()
    assert classify_gpu("x", (8, 6), 24).schemes == ("int8-block",)
    assert classify_gpu("x", (10, 3), 260).schemes == ("fp8-block", "int8-block")


def test_machine_without_cuda_is_the_cpu_target(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_target() == get_target("cpu")
