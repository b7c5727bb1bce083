"""Timing every provider of a call, and choosing one."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from turbo_opt.kernels import measure as measuring
from turbo_opt.kernels import operator
from turbo_opt.kernels.measure import Measurement, measure, random_inputs, timed_inputs
from turbo_opt.kernels.operator import forced_providers
from turbo_opt.kernels.timing import Timing

CPU = torch.device("cpu")


def linear(tokens=64, features=128, device="meta"):
    """Arguments of an int8 `block_linear`."""
    q = torch.empty(tokens, features, dtype=torch.int8, device=device)
    weight = torch.empty(128, features, dtype=torch.int8, device=device)
    blocks = features // 128
    scale = torch.empty(-(-tokens // 128), blocks, device=device)
    weight_scale = torch.empty(1, blocks, device=device)
    return (q, scale, weight, weight_scale, None, "int8-block", torch.float32)


def test_every_provider_that_serves_is_timed_on_real_tensors_and_the_rest_is_explained():
    found = measure(operator("block_linear"), linear(), CPU)
    assert found.declared == "torch"
    assert set(found.times) == {"torch", "reference"}
    assert all(timing.ms > 0 and timing.runs >= 3 for timing in found.times.values())
    assert found.skipped == {"triton": "Triton's interpreter is no way to run"}
    assert forced_providers() == {}


def test_what_is_too_large_for_a_cpu_is_skipped(monkeypatch):
    monkeypatch.setattr(measuring, "_time", lambda *_: pytest.fail("it was timed"))
    found = measure(operator("block_linear"), linear(tokens=300_000), CPU)
    assert not found.times and found.entry() is None
    assert found.skipped["reference"] == "inputs above 32 MiB are not timed on a CPU"


def test_a_provider_that_fails_is_skipped_with_its_message(monkeypatch):
    library = importlib.import_module("turbo_opt.kernels.block_linear.torch_library")

    def broken(*args):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(library, "block_linear", broken)
    found = measure(operator("block_linear"), linear(), CPU)
    assert found.skipped["torch"] == "it failed: no such instruction"
    assert set(found.times) == {"reference"}


def test_a_provider_that_is_not_installed_is_named_so_the_choice_stands_without_it(
    monkeypatch,
):
    linears = operator("block_linear")
    providers = [replace(each, requires="no_such_package") if each.name == "triton" else each
                 for each in linears.providers]  # fmt: skip
    monkeypatch.setattr(linears, "providers", providers)
    monkeypatch.setitem(linears._providers, "triton", providers[1])
    found = measure(linears, linear(), CPU)
    assert found.skipped == {"triton": "the package 'no_such_package' is not installed"}
    entry = found.entry()
    assert entry is not None and entry.judges(linears.choose("cpu", *linear()).serving)


def test_a_slow_provider_is_timed_once(monkeypatch):
    monkeypatch.setattr(measuring, "LONGEST_CALL_MS", 0.0)
    found = measure(operator("block_linear"), linear(), CPU)
    assert {timing.runs for timing in found.times.values()} == {1}


@pytest.mark.parametrize(
    ("ms", "choice"),
    [
        ({"torch": 1.0, "triton": 0.98}, "torch"),
        ({"torch": 1.0, "triton": 0.96}, "triton"),
        ({"torch": 1.0, "triton": 0.9, "reference": 0.8}, "reference"),
        ({"triton": 0.9, "reference": 0.89}, "reference"),  # torch, the declared one, failed
        ({"torch": 1.0}, None),
    ],
)
def test_the_declared_provider_is_left_for_a_gain_only(ms, choice):
    times = {name: Timing(value, 0.0, 5) for name, value in ms.items()}
    entry = Measurement("torch", times, {}).entry()
    assert (entry.provider if entry else None) == choice
    assert entry is None or entry.ms == ms


def prompted(name, positions, batch=2, dtype=torch.float32):
    """Arguments of an attention to a padded prompt of so many positions."""
    q = torch.empty(batch, 2, 7, 128, dtype=dtype, device="meta")
    k = torch.empty(batch, 2, positions, 128, dtype=dtype, device="meta")
    start = torch.empty(batch, dtype=torch.int32, device="meta")
    return (q, k, k, start, None, *(["fp8-block"] if name.endswith("quantize") else []))


@pytest.mark.parametrize(("positions", "words"), [(512, 160), (161, 160), (160, 159), (1, 0)])
@pytest.mark.parametrize("name", ["padded_attention", "padded_attention_quantize"])
def test_a_padded_prompt_is_timed_with_typical_words(name, positions, words, monkeypatch):
    reference = importlib.import_module(f"turbo_opt.kernels.{name}.reference")
    whole, starts = getattr(reference, name), []

    def seen(q, k, v, start, *others):
        starts.append(start)
        return whole(q, k, v, start, *others)

    monkeypatch.setattr(reference, name, seen)
    found = measure(operator(name), prompted(name, positions), CPU)
    assert len(starts) >= found.times["reference"].runs >= 3
    assert all(start.tolist() == [words, words] for start in starts)
    assert starts[0].dtype is torch.int32


def test_an_operator_that_says_nothing_of_typical_values_is_timed_with_zeros():
    lists = torch.empty(1, 2, 4, 3, dtype=torch.int32, device="meta")
    q = torch.empty(1, 2, 256, 64, device="meta")
    sparse = operator("block_sparse_attention")
    made = timed_inputs(sparse, (q, q, q, lists, 64, 64), CPU)
    assert sparse.typical_inputs is None
    assert not made[3].any() and made[3].shape == lists.shape
    assert made[0].std() > 0 and made[4:] == (64, 64)


def test_random_inputs_have_the_layout_of_what_they_stand_for():
    meta = torch.empty(2, 3, 4, device="meta")
    given = (
        meta.transpose(0, 2),
        meta[:, :1].expand(2, 5, 4),
        meta.to(torch.float8_e4m3fn),
        meta.to(torch.int8),
        meta.to(torch.int32),
        meta[:0],
        None,
        "int8-block",
    )
    made = random_inputs(given, CPU)
    for expected, actual in zip(given[:6], made[:6], strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert actual.stride() == expected.stride() and actual.device == CPU
    assert made[0].std() > 0 and made[3].float().std() > 1 and not made[4].any()
    assert made[1].isfinite().all() and made[2].float().std() > 0
    assert made[6:] == (None, "int8-block")


@pytest.mark.gpu
def test_providers_are_timed_by_graphs_on_a_gpu():
    place = torch.device("cuda", torch.cuda.current_device())
    x = torch.empty(1, 4096, 1536, dtype=torch.bfloat16, device="meta")
    found = measure(operator("rms_norm"), (x, None, 1e-6), place)
    assert set(found.times) | set(found.skipped) == set(
        operator("rms_norm").choose(place, x, None, 1e-6).serving
    )
    assert all(0 < timing.ms < 50 for timing in found.times.values())
    assert found.entry() is not None
