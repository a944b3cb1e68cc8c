"""Every model configuration composes, agrees with its publisher's metadata, and builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torchvision
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

FOLDER = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
HEAVY = {
    "alexnet",
    "vgg16",
    "resnet50",
    "resnet50_v1",
    "inception_v3",
    "densenet121",
    "googlenet",
    "efficientnet_lite0",
}


def compose(name: str) -> DictConfig:
    model = OmegaConf.load(FOLDER / f"{name}.yaml")
    assert isinstance(model, DictConfig)
    for base in model.pop("defaults", []):
        model = OmegaConf.merge(OmegaConf.load(FOLDER / f"{base}.yaml"), model)
    config = OmegaConf.create({"paths": {"data": "somewhere"}, "model": model})
    OmegaConf.set_struct(config, True)
    return config.model


def test_the_promised_models_are_there():
    promised = """fashion_resnet20 cifar10_resnet20 cifar10_resnet32 cifar10_resnet56 cifar100_resnet20 resnet18
        resnet50 mobilenet_v2 inception_v3 shufflenet_v2 squeezenet1_1 squeezenet1_0 vgg16 efficientnet_lite0
        regnet_x_400mf mnasnet densenet121 googlenet resnet50_v1 tiny alexnet
        cifar10_resnet20_folded mobilenet_v2_folded fixup_resnet20"""
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else ()) for n in NAMES])
def test_builds_without_its_weights(name: str):
    if name == "efficientnet_lite0":
        pytest.importorskip("timm")
    config = compose(name)
    config.pretrained = False
    teacher = instantiate(config)
    assert teacher.name == name
    assert teacher.network(teacher.example()).shape == (1, teacher.num_classes)


@pytest.mark.parametrize("name", [n for n in NAMES if compose(n).source == "torchvision" and n != "resnet50_v1"])
def test_agrees_with_torchvisions_metadata(name: str):
    config = compose(name)
    weights: Any = torchvision.models.get_model_weights(config.architecture)[config.weights]
    presets = weights.transforms()
    assert config.stated_top1 == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert list(config.input_size) == [3, *presets.crop_size * 2]
    assert [config.resize] == presets.resize_size
    assert (list(config.mean), list(config.std)) == (presets.mean, presets.std)
    assert config.interpolation == presets.interpolation.value
    assert config.num_classes == len(weights.meta["categories"])


def test_agrees_with_timms_metadata():
    timm = pytest.importorskip("timm")
    config = compose("efficientnet_lite0")
    published = timm.get_pretrained_cfg(config.architecture)
    assert tuple(config.input_size) == published.input_size
    assert config.resize == int(published.input_size[1] / published.crop_pct)
    assert (tuple(config.mean), tuple(config.std)) == (published.mean, published.std)
    assert config.interpolation == published.interpolation


@pytest.mark.parametrize("name", [n for n in NAMES if compose(n).checkpoint])
def test_a_missing_checkpoint_names_the_file_and_its_source(name: str):
    config = compose(name)
    with pytest.raises(InstantiationException) as caught:  # Hydra's envelope around what was raised
        instantiate(config)
    assert isinstance(caught.value.__cause__, ValueError)
    message = str(caught.value.__cause__)
    assert f"no file at {config.checkpoint}; get it from {config.obtain}" in message
    assert "model.checkpoint=<file>" in message
