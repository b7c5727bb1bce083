"""The weights of one network in a DCP folder, under diffusers' names.

ours       NETWORK.model.NAME, and NETWORK.average.NAME of its moving average
others'    NETWORK.NAME or NAME alone, NAME in any layout that `turbo_opt.checkpoints` knows: rCM
           has `net.` and `net_ema.`, `dcp.save({"model": …})` makes `model.`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from turbo_opt.calibration.places import Say
from turbo_opt.calibration.training.dcp import read_tensor_metadata, read_tensors
from turbo_opt.checkpoints.names import diffusers_name, is_in_block, is_weight
from turbo_opt.checkpoints.reader import listed
from turbo_opt.errors import BadInput, unknown

STUDENT = "student"
"""The network of a checkpoint of ours that is meant where none is named."""
_MODEL, _AVERAGE = "model.", "average."
_AT_ONCE = 2 * 2**30
"""Bytes that are read together."""
_MOST_PARTS = 8
"""Of a weight's name, between dots."""


def weights_in(folder: Path, network: str | None, average: bool, say: Say) -> dict[str, str]:
    """Diffusers' name → key of each weight of one network. Reads no weights.

    Args:
        network: None: the student in a checkpoint of ours, the only one in another program's.
        average: of a checkpoint of ours, the moving average where it has one.
        say: told how much of another program's folder is left out.

    Raises:
        BadInput: there is no such network, several and none is named, or no weight of Wan at all;
            or two keys are one weight.
    """
    metadata, others = read_tensor_metadata(folder)
    keys = list(metadata.state_dict_metadata)
    ours = sorted(
        name
        for name in {key.partition(".")[0] for key in keys if f".{_MODEL}" in key}
        if f"{name}.adamw.updates" in keys
    )
    if not ours:
        return _of_another_program(folder, keys, others, network, say)
    network = network or STUDENT
    if network not in ours:
        raise BadInput(f"{folder}: {unknown('network', network, ours)}")
    chosen: dict[str, str] = {}
    for section in (_MODEL, _AVERAGE) if average else (_MODEL,):
        prefix = f"{network}.{section}"
        chosen |= {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
    return chosen


def read_weights_in(folder: Path, keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name, value on the CPU) of each weight that `weights_in` found, a few of them in memory.

    Raises:
        BadInput: the data is damaged.
    """
    stored = read_tensor_metadata(folder)[0].state_dict_metadata
    group: dict[str, Tensor] = {}
    for count, (name, key) in enumerate(keys.items(), 1):
        entry = stored[key]
        group[name] = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        if count == len(keys) or sum(value.nbytes for value in group.values()) >= _AT_ONCE:
            read_tensors(folder, {keys[item]: value for item, value in group.items()})
            while group:
                yield group.popitem()


def no_weights(place: Path, names: Sequence[str]) -> BadInput:
    """What is wrong with tensors that are no Wan's."""
    return BadInput(
        f"{place}: none of its {len(names)} tensors is named like a weight of Wan, by diffusers or "
        f"by the original's code ({listed(names) or 'it has none'})"
    )


def _of_another_program(
    folder: Path, keys: Sequence[str], others: Sequence[str], network: str | None, say: Say
) -> dict[str, str]:
    network = _chosen(folder, keys, network)
    found: dict[str, str] = {}
    left_out = list(others)
    for key in keys:
        if _network_of(key) != network:
            left_out.append(key)
            continue
        name = diffusers_name(_name_in(key, network))
        if name in found:
            raise BadInput(f"{folder}: {found[name]!r} and {key!r} are both the weight {name!r}")
        found[name] = key
    if left_out:
        of = f"network {network!r}" if network else "model"
        say(
            f"{folder}: {len(left_out)} of {len(keys) + len(others)} entries are left out, as they "
            f"are no weights of its {of}: {listed(left_out)}"
        )
    return found


def _chosen(folder: Path, keys: Sequence[str], network: str | None) -> str:
    """What stands before the names of the network that is meant; empty: nothing does."""
    found = {key: _network_of(key) for key in keys}
    named = {key: prefix for key, prefix in found.items() if prefix is not None}
    # Names at the top, such as proj_out, other networks may have as well.
    of_blocks = {prefix for key, prefix in named.items() if is_in_block(_name_in(key, prefix))}
    networks = sorted(of_blocks or set(named.values()))
    if not networks:
        raise no_weights(folder, keys)
    if network is None and len(networks) > 1:
        example = next((name for name in networks if "ema" in name), networks[-1])
        raise BadInput(
            f"{folder}: holds several networks ({', '.join(map(repr, networks))}); name one, like "
            f"`--network {example}`"
        )
    if network is not None and network not in networks:
        raise BadInput(f"{folder}: {unknown('network', network, networks)}")
    return networks[0] if network is None else network


def _name_in(key: str, network: str) -> str:
    return key.removeprefix(f"{network}.") if network else key


def _network_of(key: str) -> str | None:
    """What stands before a weight's name in `key`, the least of it; None: it has none in it."""
    parts = key.split(".")
    for count in range(max(len(parts) - _MOST_PARTS, 0), len(parts)):
        if is_weight(".".join(parts[count:])):
            return ".".join(parts[:count])
    return None
