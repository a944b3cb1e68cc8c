"""Teachers: every source, the names that do not exist, and what a teacher promises."""

from __future__ import annotations

import builtins
import copy
import sys
import urllib.error
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from networks import architectures
from networks.cifar_resnet import CifarResNet
from networks.fingerprint import fingerprint
from networks.resnet_v1 import resnet50_v1, stride_on_first_convolution
from networks.teachers import Teacher, load_teacher

IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": [3, 224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "resize": 256,
}
FASHION: dict[str, Any] = {"num_classes": 10, "input_size": [1, 28, 28], "mean": [0.2860], "std": [0.3530]}
EMBEDDED = resources.files("networks") / "weights" / "fashion_resnet20.safetensors"


def tiny(**changes: Any) -> Teacher:
    return load_teacher("resnet8", "random", **{**FASHION, **changes})


def test_a_teacher_is_frozen_float_and_in_eval_mode():
    teacher = tiny()
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}
    assert teacher.example(3).shape == (3, 1, 28, 28)
    assert teacher.weights_hash == fingerprint(teacher.network.state_dict())
    assert (teacher.mean, teacher.std, teacher.input_size) == ((0.2860,), (0.3530,), (1, 28, 28))


def test_folding_keeps_the_function_and_leaves_no_norm():
    teacher, folded = tiny(), tiny(fold_batch_norm=True)
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(folded.network(images), teacher.network(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
    assert not any(parameter.requires_grad for parameter in folded.network.parameters())
    assert folded.weights_hash != teacher.weights_hash


def test_tiny_is_the_same_every_time_and_leaves_the_global_seed_alone():
    state = torch.random.get_rng_state()
    first = tiny()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert tiny().weights_hash == first.weights_hash != tiny(seed=1).weights_hash


def test_tiny_has_statistics_of_its_own_activations():
    network = copy.deepcopy(tiny().network)
    x = torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_mean.abs().max() > 1e-3
        seen: list[torch.Tensor] = []

        def keep(_: nn.Module, inputs: tuple[torch.Tensor], into: list[torch.Tensor] = seen) -> None:
            into.append(inputs[0])

        with norm.register_forward_pre_hook(keep), torch.inference_mode():
            network(x)
        torch.testing.assert_close(seen[0].mean((0, 2, 3)), norm.running_mean, atol=0.5, rtol=0)
        torch.testing.assert_close(seen[0].var((0, 2, 3)), norm.running_var, atol=0.1, rtol=0.4)


def test_the_embedded_teacher_loads():
    if not EMBEDDED.is_file():
        pytest.skip("networks/weights/fashion_resnet20.safetensors is not there")
    teacher = load_teacher("resnet20", "embedded", weights="fashion_resnet20", **FASHION)
    assert isinstance(teacher.network, CifarResNet)
    assert teacher.num_classes == 10


def test_unknown_embedded_weights_are_refused():
    with pytest.raises(ValueError, match=r"model\.weights"):
        load_teacher("resnet20", "embedded", weights="fashion_resnet2O", **FASHION)


@pytest.mark.parametrize(
    ("source", "name", "meant"),
    [
        ("torchvision", "resnet81", "resnet18"),
        ("torchvision", "mobilenetv2", "mobilenet_v2"),
        ("timm", "efficientnet_lite_0", "efficientnet_lite0"),
        ("cifar", "resnet_20", "resnet20"),
        ("torchvision", "deeplabv3_resnet50", "resnet50"),
    ],
)
def test_unknown_names_bring_close_matches(source: Any, name: str, meant: str):
    if source == "timm":
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=rf"model\.architecture.*close matches.*\b{meant}\b"):
        load_teacher(name, source, **IMAGENET)


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match=r"model\.source"):
        load_teacher("resnet18", "hub", **IMAGENET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.mean: expected 1 values"):
        tiny(mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"model\.std: expected positive"):
        tiny(std=[0.0])
    with pytest.raises(ValueError, match=r"model\.input_size"):
        tiny(input_size=[28, 28])
    with pytest.raises(ValueError, match="6n \\+ 2"):
        load_teacher("resnet18", "cifar", pretrained=False, **FASHION)
    with pytest.raises(ValueError, match=r"model\.input_size: torchvision networks take 3 channels"):
        load_teacher("resnet18", "torchvision", **{**IMAGENET, "input_size": [1, 28, 28], "mean": [0], "std": [1]})
    with pytest.raises(ValueError, match=r"model\.input_size: the network cannot take \[3, 8, 8\]"):
        load_teacher("squeezenet1_1", "torchvision", pretrained=False, **{**IMAGENET, "input_size": [3, 8, 8]})


def test_a_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_timm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match=r"pip install calibrant\[timm\]"):
        load_teacher("efficientnet_lite0", "timm", **IMAGENET)


def test_a_failed_download_says_how_to_pass_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"squeezenet1_1-b8a52dc0\.pth .*no route.*model\.checkpoint=<file>"):
        load_teacher("squeezenet1_1", "torchvision", **IMAGENET)
    with pytest.raises(ValueError, match=r"model\.weights: expected one of IMAGENET1K_V1, DEFAULT"):
        load_teacher("squeezenet1_1", "torchvision", weights="IMAGENET1K_V9", **IMAGENET)


def test_published_weights_come_through_torchvisions_own_reader(monkeypatch: pytest.MonkeyPatch):
    source = torchvision.models.squeezenet1_1(weights=None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: source.state_dict())
    teacher = load_teacher("squeezenet1_1", "torchvision", weights="IMAGENET1K_V1", **IMAGENET)
    assert teacher.weights_hash == fingerprint(source.state_dict())


def test_sources_without_published_weights_say_so():
    with pytest.raises(ValueError, match=r"no weights are published.*model\.checkpoint=<file>.*from example\.org"):
        load_teacher("resnet20", "cifar", obtain="example.org", **{**IMAGENET, "input_size": [3, 32, 32]})
    with pytest.raises(ValueError, match="no weights are published for resnet50_v1"):
        load_teacher("resnet50_v1", "torchvision", **IMAGENET)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_training_heads_are_dropped_from_a_checkpoint(architecture: str, tmp_path: Path):
    full = torchvision.models.get_model(architecture, weights=None, init_weights=False, aux_logits=True).eval()
    torch.save(full.state_dict(), tmp_path / "w.pth")
    size = [3, 75, 75]  # the smallest the reductions of both allow
    teacher = load_teacher(
        architecture, "torchvision", checkpoint=str(tmp_path / "w.pth"), **{**IMAGENET, "input_size": size}
    )
    full.transform_input = True  # type: ignore[assignment]  # as torchvision sets it for its published weights
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = teacher.network(x)
        assert isinstance(output, torch.Tensor)
        torch.testing.assert_close(output, full(x))


def test_old_densenet_names_and_unversioned_mnasnet_load(tmp_path: Path):
    small = {**IMAGENET, "input_size": [3, 64, 64]}
    dense = torchvision.models.densenet121(weights=None)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in dense.state_dict().items()
    }
    torch.save(old, tmp_path / "dense.pth")
    teacher = load_teacher("densenet121", "torchvision", checkpoint=str(tmp_path / "dense.pth"), **small)
    assert teacher.weights_hash == fingerprint(dense.state_dict())
    mnas = torchvision.models.mnasnet0_5(weights=None)
    torch.save(dict(mnas.state_dict()), tmp_path / "mnas.pth")
    teacher = load_teacher("mnasnet0_5", "torchvision", checkpoint=str(tmp_path / "mnas.pth"), **small)
    assert teacher.weights_hash == fingerprint(mnas.state_dict())


def test_resnet50_v1_strides_its_first_convolution():
    ours, theirs = resnet50_v1(), torchvision.models.resnet50(weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    strides = {n: m.stride for n, m in ours.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    moved = [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv1", "downsample.0")]
    assert list(strides) == ["conv1", *moved]
    with pytest.raises(ValueError, match="bottleneck"):
        stride_on_first_convolution(torchvision.models.resnet18(weights=None))


def test_build_passes_options_on():
    network = architectures.build("torchvision", "mobilenet_v2", 10, 3, {"width_mult": 0.5})
    assert isinstance(network, torchvision.models.MobileNetV2)
    assert network.last_channel == 1280
    assert next(network.parameters()).shape[0] == 16


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "architecture", "source", "size"),
    [
        ("cifar10_resnet20.pth", "resnet20", "cifar", 32),
        ("cifar10_resnet32.pth", "resnet32", "cifar", 32),
        ("cifar10_resnet56.pth", "resnet56", "cifar", 32),
        ("mobilenet_v2.pth", "mobilenet_v2", "torchvision", 224),
        ("squeezenet1_0.pth", "squeezenet1_0", "torchvision", 224),
        ("resnet50_v1_fp16.pth", "resnet50_v1", "torchvision", 224),
    ],
)
def test_real_weights_load(data_root: Path, file: str, architecture: str, source: Any, size: int):
    classes = 10 if source == "cifar" else 1000
    choices = {**IMAGENET, "num_classes": classes, "input_size": [3, size, size]}
    path = data_root / "weights" / file
    teacher = load_teacher(architecture, source, checkpoint=str(path), **choices)
    stored = torch.load(path, weights_only=True)
    for key, value in teacher.network.state_dict().items():
        if key in stored:
            assert torch.equal(value, stored[key].to(value.dtype))
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}
