"""What was measured decides which provider runs, unless it cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from turbo_opt.kernels import (
    Capability,
    clear_recorded_choices,
    explain,
    force_provider,
    operator,
    quantize_activation,
    quantize_weight,
    read_provider_tables,
    recorded_choices,
)
from turbo_opt.kernels import provider_table as tables
from turbo_opt.kernels.capability import CPU, parse_capability
from turbo_opt.kernels.provider_table import DeviceRecord, Entry, ProviderTableError, call_key

HERE = tables.device_name(torch.device("cpu"))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The user's table, in an empty folder; shipped ones are out of sight."""
    path = tmp_path / "cache" / "providers.json"
    monkeypatch.setenv(tables.TABLE_VARIABLE, str(path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "measured")
    read_provider_tables()
    yield path
    monkeypatch.undo()
    read_provider_tables()


def linear(tokens=8):
    """Arguments of an int8 `block_linear`, which torch and the reference serve on a CPU."""
    operands = (
        *quantize_activation(torch.randn(tokens, 128), "int8-block"),
        *quantize_weight(torch.randn(128, 128), "int8-block"),
    )
    return (*operands, None, "int8-block", torch.float32)


def key_of(args, name="block_linear"):
    return call_key(operator(name).describe(*args), args)


def prefer(provider, args, ms=None, skipped=None, name="block_linear"):
    """A table's operators that hold one choice."""
    ms = {"torch": 2.0, "reference": 1.0} if ms is None else ms
    skipped = {"triton": "only interpreted"} if skipped is None else skipped
    return {name: {key_of(args, name): Entry(provider, ms, skipped)}}


def write(path, operators, device=HERE, capability="cpu", versions=None):
    versions = tables.current_versions() if versions is None else versions
    tables.write_table(path, {device: DeviceRecord(capability, versions, operators)})
    read_provider_tables()


def chosen(args, device="cpu"):
    place = torch.device("cpu") if device == "cpu" else device
    return explain("block_linear", place, *args)


def test_a_recorded_choice_changes_what_runs(table):
    args = linear()
    assert chosen(args).provider == "torch"
    write(table, prefer("reference", args))
    clear_recorded_choices()
    torch.ops.turbo_opt.block_linear(*args)
    assert recorded_choices()["block_linear"] == {"reference": 1}
    choice = chosen(args)
    assert choice.measured.device == HERE
    assert choice.passed_over["torch"] == (
        f"works, but 'reference' was measured to be faster on {HERE}"
    )


def test_a_forced_provider_comes_before_a_recorded_one(table):
    args = linear()
    write(table, prefer("reference", args))
    with force_provider({"block_linear": "torch"}):
        assert chosen(args).provider == "torch"
    assert chosen(args).provider == "reference"


def test_a_choice_holds_for_calls_of_about_that_size_only(table):
    write(table, prefer("reference", linear(64)))
    assert [chosen(linear(tokens)).provider for tokens in (44, 48, 64, 88, 92)] == [
        "torch", "reference", "reference", "reference", "torch",
    ]  # fmt: skip
    assert chosen(linear(61)).provider == "torch", "another fact: no multiple of 4"


def test_keys_tell_sizes_by_powers_of_two_and_facts_exactly():
    x = torch.empty(1, 32760, 1536, dtype=torch.bfloat16, device="meta")
    wide = torch.empty(1, 75600, 5120, dtype=torch.bfloat16, device="meta")
    quantize = operator("quantize_activation")
    assert call_key(quantize.describe(x, "fp8-block"), (x,)) == (
        "1x32768x1536 channels=1536 dtype=bfloat16 scheme=fp8-block"
    )
    assert call_key(quantize.describe(wide, "int8-block"), (wide,)).startswith("1x65536x5120 ")
    empty = torch.empty(0, 128)
    assert call_key(quantize.describe(empty, "fp8-block"), (empty,)).startswith("0x128 ")


def test_a_described_gpu_takes_what_was_measured_on_its_kind(table):
    args = linear()
    write(table, prefer("triton", args, {"triton": 1, "reference": 2}, {}), "NVIDIA H200", "sm90")
    choice = chosen(args, "sm90")
    assert (choice.provider, choice.measured.device) == ("triton", "NVIDIA H200")
    assert chosen(args, "sm89").measured is None
    assert chosen(args).measured is None


def test_the_devices_own_record_comes_before_one_of_its_kind(table):
    args = linear()
    versions, other = tables.current_versions(), prefer("torch", args)
    tables.write_table(
        table,
        {
            "a first device": DeviceRecord("cpu", versions, other),
            HERE: DeviceRecord("cpu", versions, prefer("reference", args)),
        },
    )
    read_provider_tables()
    assert chosen(args).measured.device == HERE


def test_the_users_record_comes_before_a_shipped_one_which_holds_for_all_versions(table, tmp_path):
    args, shipped = linear(), tmp_path / "measured" / "some.json"
    write(shipped, prefer("reference", args), "a device", "cpu", {"torch": "1.0"})
    assert chosen(args).measured.device == "a device"
    write(table, prefer("torch", args))
    assert (chosen(args).provider, chosen(args).measured.device) == ("torch", HERE)


@pytest.mark.parametrize(
    ("provider", "ms", "skipped"),
    [
        ("cutlass", {"cutlass": 1, "torch": 2, "reference": 3}, {"triton": "x"}),
        ("torch", {"torch": 1, "triton": 2}, {}),
    ],
    ids=["unknown provider", "one that serves was not tried"],
)
def test_entries_that_do_not_fit_are_passed_over(table, provider, ms, skipped):
    args = linear()
    write(table, prefer(provider, args, ms, skipped))
    assert chosen(args).measured is None
    assert chosen(args).provider == "torch"


def test_an_entry_whose_provider_does_not_serve_now_is_passed_over(table, monkeypatch):
    args = linear()
    write(table, prefer("triton", args, {"triton": 1, "torch": 2, "reference": 3}, {}))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice = chosen(args)
    assert choice.provider == "torch" and choice.measured is None
    assert "needs its interpreter" in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not JSON", "not a table of measured providers"),
        (b"\xff\xfe", "not a table of measured providers"),
        (b"[]", "not a table of measured providers"),
        (b'{"format": 1}', "not a table of measured providers"),
        (b'{"format": 1, "devices": {"x": {"operators": 3}}}', "not a table of measured"),
        (b'{"format": 99, "devices": {}}', "its format is 99, not 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_warning_and_no_error(table, content, message):
    table.parent.mkdir()
    table.write_bytes(content)
    with pytest.raises(ProviderTableError, match=message):
        tables.read_table(table)
    with pytest.warns(UserWarning, match=message) as warned:
        providers = [chosen(linear(tokens)).provider for tokens in (8, 16)]
    assert providers == ["torch", "torch"]
    assert len(warned) == 1 and str(table) in str(warned[0].message)


def test_measurements_of_other_versions_are_one_warning_and_no_choice(table):
    args = linear()
    write(table, prefer("reference", args), versions={"kernels": "0", "torch": "2.0"})
    with pytest.warns(UserWarning, match=r"bench kernels. measures again") as warned:
        providers = [chosen(args).provider for _ in range(2)]
    assert providers == ["torch", "torch"]
    assert len(warned) == 1 and HERE in str(warned[0].message)


def test_a_missing_table_is_no_warning(table, recwarn):
    assert chosen(linear()).provider == "torch"
    assert not recwarn.list


def test_zero_turns_tables_off(table, monkeypatch):
    args = linear()
    write(table, prefer("reference", args))
    monkeypatch.setenv(tables.TABLE_VARIABLE, "0")
    read_provider_tables()
    assert chosen(args).provider == "torch"


def test_a_table_is_read_back_as_written_and_merging_keeps_the_rest(tmp_path):
    first = {
        "a": DeviceRecord("sm90", {"torch": "2"}, {"adaln": {"k": Entry("cuda", {"cuda": 1})}})
    }
    more = {
        "a": DeviceRecord("sm90", {"torch": "2"}, {"adaln": {"l": Entry("triton", {"triton": 1})}}),
        "b": DeviceRecord("cpu", {"torch": "2"}, {}),
    }
    both = tables.merged(first, more)
    tables.write_table(tmp_path / "deep" / "t.json", both)
    assert tables.read_table(tmp_path / "deep" / "t.json") == both
    assert set(both) == {"a", "b"} and set(both["a"].operators["adaln"]) == {"k", "l"}
    assert set(first["a"].operators["adaln"]) == {"k"}
    newer = {"a": DeviceRecord("sm90", {"torch": "3"}, {})}
    assert tables.merged(both, newer)["a"].operators == {}
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["t.json"]


def test_choices_have_a_digest_that_times_do_not_change(table):
    args = linear()
    assert tables.choices_digest(CPU) is None
    write(table, prefer("reference", args))
    first = tables.choices_digest(CPU)
    write(table, prefer("reference", args, {"torch": 5.0, "reference": 4.0}))
    assert tables.choices_digest(CPU) == first is not None
    write(table, prefer("torch", args))
    assert tables.choices_digest(CPU) != first
    assert tables.choices_digest(Capability("sm", 9, 0)) is None


def test_bitwise_replay_is_asked_for_under_the_same_choices_only(table):
    from turbo_opt.artifact.environment import fingerprint

    before = fingerprint()
    write(table, prefer("reference", linear()))
    assert fingerprint() != before


def test_shipped_tables_are_read_without_complaint():
    for path in tables.SHIPPED.glob("*.json"):
        assert tables.read_table(path)


def test_a_new_process_decides_by_the_users_table(table):
    args = linear()
    write(table, prefer("reference", args))
    tensors = [item.tolist() if isinstance(item, torch.Tensor) else item for item in args[:4]]
    script = (
        "import json, sys, torch, turbo_opt.kernels as k\n"
        "q, s, w, t = (torch.tensor(x) for x in json.loads(sys.argv[1]))\n"
        "k.block_linear(q.to(torch.int8), s, w.to(torch.int8), t, None, 'int8-block', "
        "torch.float32)\n"
        "print(k.recorded_choices())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(tensors)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "{'block_linear': {'reference': 1}}" in done.stdout, done.stderr


SHIPPED = sorted(tables.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_choose_among_what_operators_have(path):
    for record in tables.read_table(path).values():
        assert parse_capability(record.capability).kind == "sm"
        for name, entries in record.operators.items():
            declared = {provider.name for provider in operator(name).providers} | {"reference"}
            for entry in entries.values():
                assert {*entry.ms, *entry.skipped} <= declared, name
                assert entry.ms[entry.provider] < 1.05 * min(entry.ms.values())


def test_a_described_h200_takes_what_its_shipped_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv(tables.TABLE_VARIABLE, str(tmp_path / "none.json"))
    read_provider_tables()
    x = torch.empty(32760, 1536, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(12, 32760, device="meta").t()
    weight = torch.empty(1536, 1536, dtype=torch.float8_e4m3fn, device="meta")
    args = (x[None], scale, weight, torch.empty(12, 12, device="meta"), None, "fp8-block",
            torch.bfloat16)  # fmt: skip
    choice = explain("block_linear", "sm90", *args)
    monkeypatch.undo()
    read_provider_tables()
    assert (choice.provider, choice.measured.device) == ("cuda", "NVIDIA H200")
