"""Batches are a function of seed and position: of nothing that would have to be remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_opt.calibration.data.batches import Batches, split
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.flow import NoiseLevels, noisy
from turbo_opt.errors import BadInput

CPU = torch.device("cpu")


def batches(folder: Path, seed: int = 0, broken_share: float = 0.5) -> Batches:
    samples = SampleSet.open(folder, broken_share)
    return Batches(samples, range(6), seed, CPU, unconditional=True)


def test_each_epoch_sees_every_sample_once_in_its_own_order(home: Path) -> None:
    source = batches(home / "samples")
    first, second = (source.at(range(start, start + 6)).names for start in (0, 6))
    assert sorted(first) == sorted(second) == [f"{i:06d}.safetensors" for i in range(6)]
    assert first != second


def test_two_halves_are_the_whole(home: Path) -> None:
    whole = batches(home / "samples").at(range(4, 8))
    halves = [batches(home / "samples").at(range(start, start + 2)) for start in (4, 6)]
    assert whole.names == halves[0].names + halves[1].names
    for draw in ("noise", "uniform"):
        parts = torch.cat([getattr(half, draw)("a") for half in halves])
        assert torch.equal(getattr(whole, draw)("a"), parts)


def test_draws_differ_by_name_seed_and_position(home: Path) -> None:
    batch = batches(home / "samples").at([0, 6])
    other = batches(home / "samples", seed=1).at([0, 6])
    draws = [batch.noise("a"), batch.noise("b"), other.noise("a")]
    flat = torch.stack([draw[i].flatten() for draw in draws for i in range(2)])
    assert flat.unique(dim=0).shape[0] == 6


def test_a_broken_sample_is_replaced_by_the_next(samples_folder) -> None:
    folder = samples_folder()
    whole = batches(folder).at(range(6)).names
    (folder / whole[2]).unlink()
    assert batches(folder).at(range(6)).names == (*whole[:2], whole[3], *whole[3:])


def test_held_out_samples_that_are_all_broken_are_named(samples_folder) -> None:
    folder = samples_folder()
    for number in (6, 7):
        (folder / f"{number:06d}.safetensors").write_bytes(b"")
    samples = SampleSet.open(folder, 0.5)
    measured = Batches(samples, split(samples, 2)[1], 0, CPU, unconditional=False)
    told = (
        r"none of 2 samples can be read \(000006.safetensors: .*; 000007.*\); data.held_out takes"
    )
    with pytest.raises(BadInput, match=told):
        measured.at([0], shuffled=False)


def test_a_share_of_prompts_is_the_empty_one(home: Path) -> None:
    batch = batches(home / "samples").at(range(64))
    assert torch.equal(batch.with_empty_prompts(0.0), batch.prompt_embeds)
    assert batch.empty_prompt is not None
    replaced = batch.with_empty_prompts(0.25)
    empty = (replaced == batch.empty_prompt).flatten(1).all(1)
    kept = (replaced == batch.prompt_embeds).flatten(1).all(1)
    assert (empty | kept).all() and 5 < empty.sum() < 28


def test_nothing_left_to_train_on_is_said(home: Path) -> None:
    samples = SampleSet.open(home / "samples")
    assert split(samples, 2) == (list(range(6)), [6, 7])
    with pytest.raises(BadInput, match=r"holds 8 samples, data.held_out takes 8"):
        split(samples, 8)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_stay_in_their_range_and_follow_the_shift(shift: float) -> None:
    u = torch.linspace(0, 1, 101)
    whole = NoiseLevels(shift, 0.0, 1.0).at(u)
    torch.testing.assert_close(whole, shift * u / (1 + (shift - 1) * u))
    high = NoiseLevels(shift, 0.875, 1.0).at(u)
    assert high[0] == pytest.approx(0.875) and high[-1] == pytest.approx(1.0)
    assert (high.diff() > 0).all()


def test_noisy_latents_lie_between_data_and_noise() -> None:
    clean, noise = torch.ones(2, 1, 1, 2, 2), torch.zeros(2, 1, 1, 2, 2)
    x = noisy(clean, noise, torch.tensor([0.25, 1.0]))
    assert (x[0] == 0.75).all() and (x[1] == 0).all()


def test_a_resident_set_gives_the_same_batches(samples_folder) -> None:
    folder = samples_folder()
    (folder / "000002.safetensors").write_bytes(b"not a sample")
    read = batches(folder)
    kept = Batches(SampleSet.open(folder, 0.5), range(6), 0, CPU, unconditional=True, resident=True)
    wanted = read.at(range(9))
    for path in folder.glob("0*.safetensors"):
        path.unlink()
    found = kept.at(range(9))
    assert found.names == wanted.names
    assert torch.equal(found.latents, wanted.latents)
    assert torch.equal(found.prompt_embeds, wanted.prompt_embeds)


def test_noise_drawn_together_follows_from_seed_place_and_name(home: Path) -> None:
    def at(positions, seed: int = 0):
        samples = SampleSet.open(home / "samples")
        return Batches(samples, range(6), seed, CPU, unconditional=True, together=True).at(
            positions
        )

    first = at([0, 1]).noise("a")
    assert first.shape == (2, *at([0]).latents.shape[1:])
    assert torch.equal(first, at([0, 1]).noise("a"))
    others = [at([2, 3]).noise("a"), at([0, 1]).noise("b"), at([0, 1], seed=1).noise("a")]
    assert not any(torch.equal(first, other) for other in others)
    assert not torch.equal(first[0], first[1])
    assert at([0, 1]).uniform("t").shape == (2,)
