"""Where weights are, what is in them, and what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tests.helpers.checkpoints import LAYOUTS, write_layout, write_safetensors
from turbo_opt.checkpoints.places import files_in, locate, places_of
from turbo_opt.checkpoints.reader import fitted, identities, listed, read_network
from turbo_opt.checkpoints.student import declared_student
from turbo_opt.errors import BadInput
from turbo_opt.ir.weights import constant

ONE, TWO = ["transformer"], ["transformer", "transformer_2"]
WEIGHTS = {
    "patch_embedding.weight": torch.randn(6, 4, 1, 2, 2),
    "blocks.0.attn1.to_q.weight": torch.randn(6, 6),
    "blocks.0.scale_shift_table": torch.randn(1, 6, 6),
    "blocks.0.attn1.proj_l.bias": torch.randn(128),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights_under_the_same_names(tmp_path, layout):
    place = write_layout(layout, tmp_path / "weights", WEIGHTS)
    found = read_network(place)
    assert found.place == place
    assert set(found.tensors) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        tensor = fitted(name, found.tensors[name], tuple(value.shape))
        assert torch.equal(tensor.load(), value)


def test_only_a_patch_embedding_may_be_flat():
    flat = constant(torch.randn(6, 16))
    assert fitted("patch_embedding.weight", flat, (6, 4, 1, 2, 2)).shape == (6, 4, 1, 2, 2)
    assert fitted("patch_embedding.weight", flat, (6, 5, 1, 2, 2)) is None
    assert fitted("proj_out.weight", flat, (6, 4, 4)) is None


def test_two_names_of_one_weight_are_both_told(tmp_path):
    value = torch.ones(2)
    both = {"head.head.bias": value, "net.proj_out.bias": value.clone()}
    write_safetensors(tmp_path / "both.safetensors", both)
    with pytest.raises(BadInput, match=r"'head.head.bias' and 'net.proj_out.bias' are both"):
        read_network(tmp_path / "both.safetensors")


def test_counters_of_a_training_are_no_weights(tmp_path):
    counters = {
        "net.accum_iteration": torch.tensor(1000),
        "net.accum_video_sample_counter": torch.tensor(64000),
        "net.accum_train_in_hours": torch.tensor(3.5),
    }
    torch.save({**counters, "net.head.head.bias": torch.ones(2)}, tmp_path / "student.pt")
    assert list(read_network(tmp_path / "student.pt").tensors) == ["proj_out.bias"]


def test_long_lists_of_names_are_cut():
    assert listed("cab") == "a, b, c"
    assert listed("gfedcba") == "a, b, c, d, e and 2 more"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(folder):
    for name in TWO:
        (folder / name).mkdir(parents=True)
        write_safetensors(
            folder / name / "diffusion_pytorch_model.safetensors", {"proj_out.bias": torch.ones(2)}
        )
    return folder


def test_a_source_is_a_name_in_the_recipe_or_a_path(here):
    file = write_safetensors(here / "s.safetensors", WEIGHTS)
    assert locate("student", ONE, {"student": str(file)}) == {"transformer": file}
    assert locate("s.safetensors", ONE, {}) == {"transformer": file}
    assert places_of("student", {"student": "s.safetensors"}) == [file]


def test_a_pair_of_experts_is_a_folder_with_both_or_a_mapping(here):
    folder = pair(here / "pair")
    expected = {name: folder / name for name in TWO}
    assert locate("pair", TWO, {}) == expected
    assert locate({"transformer": "pair", "transformer_2": "pair"}, TWO, {}) == expected
    assert places_of("pair", {}) == list(expected.values())
    separate = {"transformer": "pair/transformer", "transformer_2": "pair/transformer_2"}
    assert locate(separate, TWO, {}) == expected


@pytest.mark.parametrize(
    ("ref", "denoisers", "message"),
    [
        ("none", ONE, r"no weights 'none': neither a name in the recipe's `weights` \(student\)"),
        ("studen", ONE, "did you mean 'student'"),
        ("student", ONE, r"no weights 'student' \(./gone.pth\): no such file or .* nor a hub id$"),
        ("sla", ONE, r"nor a hub id; `--set weights.sla=…` gives them$"),
        ("pair", ONE, "pair: has a second expert, transformer_2, which the model has not"),
        (
            "one.pth",
            TWO,
            r"holds one network, the model has 2; .* \{transformer=… transformer_2=…\}",
        ),
        ({"transformer": "one.pth"}, TWO, "no weights are named for transformer_2"),
        ({"transformer": "one.pth", "low": "one.pth"}, ONE, "unknown denoiser 'low'"),
    ],
)
def test_a_source_that_is_not_there_or_not_clear_is_refused(here, ref, denoisers, message):
    pair(here / "pair")
    torch.save({"proj_out.bias": torch.ones(2)}, "one.pth")
    with pytest.raises(BadInput, match=message):
        locate(ref, denoisers, {"student": "./gone.pth"})


def test_one_file_in_a_folder_is_found_several_are_not_guessed(here):
    with pytest.raises(BadInput, match="holds no weights; name one file"):
        files_in(here)
    (here / ".metadata").write_text("")
    with pytest.raises(BadInput, match=r"is a DCP checkpoint, .*`turbo-opt calibrate convert /"):
        files_in(here)
    (here / ".metadata").unlink()
    (here / "__0_0.distcp").write_text("")
    unfinished = r"unfinished DCP checkpoint: .* cut off; take an earlier one \(of .* `latest` in"
    with pytest.raises(BadInput, match=unfinished):
        files_in(here)
    one = write_safetensors(here / "a.safetensors", WEIGHTS)
    assert files_in(here) == [(one, None)]
    torch.save({}, "b.pth")
    with pytest.raises(BadInput, match=r"holds several files of weights \(a.safetensors, b.pth\)"):
        files_in(here)
    (here / "notes.txt").write_text("")
    with pytest.raises(BadInput, match=r"notes.txt: not a file of weights; those end in"):
        files_in(here / "notes.txt")


def test_hub_ids_come_from_the_local_cache_or_the_hub(here, monkeypatch):
    asked = []

    def snapshot(repo, allow_patterns, local_files_only):
        asked.append((repo, local_files_only))
        if local_files_only:
            raise FileNotFoundError
        return str(pair(here / "snapshot"))

    def file(repo, name, local_files_only):
        asked.append((repo, name, local_files_only))
        return str(write_safetensors(here / "w.safetensors", WEIGHTS))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    assert locate("owner/model", TWO, {})["transformer"] == here / "snapshot" / "transformer"
    assert locate("owner/model/sub/w.safetensors", ONE, {}) == {
        "transformer": here / "w.safetensors"
    }
    assert asked == [
        ("owner/model", True),
        ("owner/model", False),
        ("owner/model", "sub/w.safetensors", True),
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="owner/other: no such file or folder, nor in the local hub"):
        locate("owner/other", ONE, {})
    assert asked[-1] == ("owner/other", True)


def test_a_student_declares_itself_in_its_metadata(tmp_path):
    file = write_safetensors(
        tmp_path / "s.safetensors", WEIGHTS, distillation="rcm", sigma_max="120"
    )
    assert declared_student(read_network(file)).sigma_max == 120.0
    silent = write_safetensors(tmp_path / "t.safetensors", WEIGHTS, format="pt")
    assert declared_student(read_network(silent)) is None


@pytest.mark.parametrize("layout", ["turbodiffusion", "diffusers-folder"])
def test_a_student_declares_itself_in_a_json_beside_it(tmp_path, layout):
    place = write_layout(layout, tmp_path / "student", WEIGHTS)
    assert declared_student(read_network(place)) is None
    before = identities([place])
    note = place / "distillation.json" if place.is_dir() else place.with_suffix(".json")
    note.write_text(json.dumps({"distillation": "rcm", "trained_by": "me"}))
    student = declared_student(read_network(place))
    assert student is not None and student.sigma_max is None
    assert identities([place]) != before


def test_a_pipeline_folder_may_declare_its_networks_students(tmp_path):
    folder = pair(tmp_path / "pair")
    assert declared_student(read_network(folder / "transformer_2")) is None
    (folder / "distillation.json").write_text(json.dumps({"distillation": "rcm", "sigma_max": 9}))
    assert declared_student(read_network(folder / "transformer_2")).sigma_max == 9


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"distillation": "dmd2"}, "is distilled by 'dmd2'; only 'rcm' is known"),
        ({"distillation": "rcm", "sigma_max": -1}, "sigma_max: Input should be greater than 0"),
        ({"distillation": 4}, "distillation: Input should be a valid string, got 4"),
        (["rcm"], "expected a JSON object"),
    ],
)
def test_a_declaration_that_is_malformed_or_of_another_method_is_refused(tmp_path, note, message):
    place = write_layout("original", tmp_path / "student", WEIGHTS)
    Path(place).with_suffix(".json").write_text(json.dumps(note))
    with pytest.raises(BadInput, match=message):
        declared_student(read_network(place))
