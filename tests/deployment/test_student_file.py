"""Student files load back bitwise, and everything else is refused with a reason."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from deployment.student_file import load_student, save_student
from quantizers.calibrate import calibrate_ranges
from quantizers.layer import sites
from tests.deployment.students import net, student_of
from tests.lightning_modules.canaries import pickled
from tests.quantizers.test_calibrate import Either, conversion


def network(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    path = save_student(network(seed=0), tmp_path / "student.safetensors", {"teacher": "abc"})
    other = network(seed=1)
    assert load_student(other, path, {"teacher": "abc"})["teacher"] == "abc"
    assert all(
        torch.equal(a, b) for a, b in zip(network().state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert list(tmp_path.iterdir()) == [path]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_student(network(), tmp_path / "none.safetensors")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    pickled(path, tmp_path / "sign")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_student(network(), path)
    assert not (tmp_path / "sign").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sign").exists()  # so it would have been


def test_truncated(tmp_path: Path) -> None:
    path = save_student(network(), tmp_path / "student.safetensors", {})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_student(network(), path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="expected format"):
        load_student(network(), tmp_path / "a.safetensors")


def test_another_network_or_teacher(tmp_path: Path) -> None:
    path = save_student(network(4), tmp_path / "student.safetensors", {"teacher": "abc"})
    with pytest.raises(ValueError, match="does not fit"):
        load_student(network(8), path)
    with pytest.raises(ValueError, match="teacher is 'abc'"):
        load_student(network(4), path, {"teacher": "xyz"})


def branching(seed: int) -> nn.Module:
    """A student with a branch that images with a positive sum never take."""
    torch.manual_seed(seed)
    return conversion(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Either(), nn.Flatten(), nn.Linear(144, 2))
    ).student.eval()


def test_a_tensor_that_no_image_reached_stays_in_float_when_reloaded(tmp_path: Path) -> None:
    student, other = branching(0), branching(1)
    calibrate_ranges(student, torch.randn(4, 3, 6, 6), batch_size=2)
    path = save_student(student, tmp_path / "student.safetensors", {"teacher": "abc"})
    load_student(other, path, {"teacher": "abc"})
    switched = {name: site.enabled for name, site in sites(student)}
    assert sorted(set(switched.values())) == [False, True]
    assert {name: site.enabled for name, site in sites(other)} == switched
    x = torch.randn(4, 4, 6, 6) - 5  # into the branch that was never taken
    with torch.no_grad():
        assert torch.equal(other.get_submodule("2")(x), student.get_submodule("2")(x))


def test_what_was_off_before_is_as_in_the_file_afterwards(tmp_path: Path) -> None:
    student, other = branching(0), branching(1)
    path = save_student(student, tmp_path / "student.safetensors", {})
    next(sites(other))[1].enabled = False
    load_student(other, path)
    assert all(site.enabled for _, site in sites(other))


def with_metadata(path: Path, **changes: str) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, metadata=metadata)
    return path


def test_a_file_of_a_newer_version_asks_for_an_update(tmp_path: Path) -> None:
    path = save_student(network(), tmp_path / "student.safetensors", {})
    with pytest.raises(ValueError, match=r"of version 2, made by a newer calibrant.*pip install --upgrade calibrant"):
        load_student(network(), with_metadata(path, format="calibrant student 2"))
    with pytest.raises(ValueError, match="expected format 'calibrant student 1', got 'calibrant student x'"):
        load_student(network(), with_metadata(path, format="calibrant student x"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"{}", (2**40).to_bytes(8, "little") + b"{}"])
def test_corrupt_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="student file: "):
        load_student(network(), path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_student(network(), tmp_path)


@pytest.mark.parametrize("content", ["[1", "5", "[[1]]", "null", '{"a": 1}', "[" * 100_000])
def test_corrupt_list_of_what_is_switched_off(content: str, tmp_path: Path) -> None:
    path = save_student(network(), tmp_path / "student.safetensors", {})
    with pytest.raises(ValueError, match=r"switched_off in the metadata of .*student\.safetensors is corrupt"):
        load_student(network(), with_metadata(path, switched_off=content))


@pytest.mark.parametrize("content", ["[1", "[1]", "5", '"stem"', "[" * 100_000])
def test_corrupt_grids(content: str, tmp_path: Path) -> None:
    path = save_student(student_of(net()), tmp_path / "student.safetensors", {})
    with pytest.raises(ValueError, match=r"grids in the metadata of .*student\.safetensors is corrupt"):
        load_student(student_of(net()), with_metadata(path, grids=content))


@pytest.mark.parametrize("version", ["²", "٢", "", "-2", "2.0", "9" * 5000])
def test_a_version_that_is_no_number(version: str, tmp_path: Path) -> None:
    path = save_student(network(), tmp_path / "student.safetensors", {})
    with pytest.raises(ValueError, match=r"expected format 'calibrant student 1', got .* in .*student\.safetensors"):
        load_student(network(), with_metadata(path, format=f"calibrant student {version}"))


def test_other_bits_are_refused_though_all_shapes_fit(tmp_path: Path) -> None:
    path = save_student(student_of(net(), (4, 4)), tmp_path / "student.safetensors", {})
    load_student(student_of(net(), (4, 4)), path)
    with pytest.raises(ValueError, match=r"grid of .* is \[4, False, False\] in .*, but \[3, False, False\] here"):
        load_student(student_of(net(), (3, 4)), path)
    with pytest.raises(ValueError, match=r"the grid of stem.weight_quantizer"):
        load_student(student_of(net(), (4, 4), symmetric=True), path)


def test_other_types_are_refused(tmp_path: Path) -> None:
    path = save_student(network().half(), tmp_path / "student.safetensors", {})
    with pytest.raises(ValueError, match=r"other shapes or types \['0.bias'"):
        load_student(network(), path)


def test_files_from_before_the_grids_were_kept_are_read(tmp_path: Path) -> None:
    path = save_student(student_of(net()), tmp_path / "student.safetensors", {})
    assert load_student(student_of(net()), with_metadata(path, grids="null"))["format"] == "calibrant student 1"
