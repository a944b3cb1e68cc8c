"""Weight files: formats, wrappers, and an error for everything that is not weights."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks.checkpoints import load_weights, read_checkpoint
from networks.cifar_resnet import CifarResNet


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return CifarResNet(8, 4)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(key == other_key and torch.equal(value, copy) for (key, value), (other_key, copy) in pairs)


@pytest.mark.parametrize("form", ["plain", "safetensors", "state_dict", "module.", "both", "compiled", "old"])
def test_every_usual_form_loads(network: nn.Module, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    state = dict(network.state_dict())
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif form == "both":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    elif form == "compiled":
        torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path)
    elif form == "old":
        torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    else:
        torch.save(state, path)
    other = CifarResNet(8, 4)
    load_weights(other, read_checkpoint(path), str(path))
    assert same(network, other)
    said = {"state_dict": "'state_dict'", "both": "'module.'", "compiled": "'_orig_mod.'"}
    assert said.get(form, "") in caplog.text


def test_half_precision_is_widened(network: nn.Module, tmp_path: Path):
    state = {key: value.half() if value.ndim == 4 else value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    other = CifarResNet(8, 4)
    load_weights(other, read_checkpoint(tmp_path / "w.pth"), "w.pth")
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))


def test_all_missing_unexpected_and_misshapen_keys_are_listed(network: nn.Module):
    state = dict(network.state_dict())
    del state["bn1.weight"], state["linear.bias"]
    state["fc.weight"] = torch.zeros(1)
    state["linear.weight"] = torch.zeros(10, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.checkpoint") as caught:
        load_weights(network, state, "w.pth")
    message = str(caught.value)
    assert "2 missing: bn1.weight, linear.bias" in message
    assert "1 unexpected: fc.weight" in message
    assert "linear.weight (expected (4, 64), got (10, 64))" in message
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


class Surprise:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("/nonexistent/never"),))


def test_pickled_objects_are_refused(tmp_path: Path):
    torch.save({"state_dict": Surprise()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"unpickling runs code.*state_dict\(\)"):
        read_checkpoint(tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Surprise()))
    with pytest.raises(ValueError, match=r"model\.checkpoint"):
        read_checkpoint(tmp_path / "raw.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_corrupt_files_are_named(network: nn.Module, name: str, content: str, tmp_path: Path):
    path = tmp_path / name
    if name == "w.pth":
        torch.save(network.state_dict(), path)
    else:
        save_file(dict(network.state_dict()), path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>404</html>", "truncated": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match=str(path)):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"epoch": 3, "w": torch.zeros(1)}, [torch.zeros(1)], {}])
def test_files_without_a_state_dict_are_refused(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_missing_file_says_where_to_get_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file at .*nothing\.pth; get it from example\.org"):
        read_checkpoint(tmp_path / "nothing.pth", "example.org")
