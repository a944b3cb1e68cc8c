"""Preprocessing that differs from the publisher's is said before it costs accuracy."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from omegaconf import OmegaConf

from networks.published import disagreements, published_preprocessing
from networks.teachers import load_teacher
from tests.networks.test_teachers import IMAGENET

WEIGHTS = {"source": "torchvision", "architecture": "efficientnet_b3", "weights": "IMAGENET1K_V1"}


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b3", "inception_v3", "vit_b_16", "swin_v2_t"])
def test_torchvision_images_come_out_as_its_own_transform_makes_them(architecture: str) -> None:
    found = published_preprocessing("torchvision", architecture, "DEFAULT")
    assert found is not None
    preset: Any = torchvision.models.get_model_weights(architecture).__members__["DEFAULT"].transforms()
    made = preset(torch.ones(3, 600, 700))
    assert tuple(made.shape) == found["input_size"]
    mean, std = (torch.tensor(found[key]) for key in ("mean", "std"))
    torch.testing.assert_close(made[:, 0, 0], (1 - mean) / std)
    assert found["resize"] >= found["input_size"][1]


def test_timm_says_it_in_its_pretrained_configuration() -> None:
    timm = pytest.importorskip("timm")
    found = published_preprocessing("timm", "efficientnet_lite0", "DEFAULT")
    ours = OmegaConf.load(Path(__file__).parents[2] / "conf" / "model" / "efficientnet_lite0.yaml")
    assert found is not None
    assert disagreements(found, {key: tuple(v) if OmegaConf.is_list(v) else v for key, v in ours.items()}) == ""
    assert found["mean"] == timm.get_pretrained_cfg("efficientnet_lite0").mean


@pytest.mark.parametrize(
    "unknown", [{"source": "cifar"}, {"architecture": "resnet50_v1"}, {"weights": "IMAGENET1K_V9"}]
)
def test_what_nobody_publishes_is_not_compared(unknown: dict[str, Any]) -> None:
    assert published_preprocessing(**(WEIGHTS | unknown)) is None


def test_the_remedy_can_be_pasted() -> None:
    published = published_preprocessing(**WEIGHTS)  # type: ignore[arg-type]
    assert published is not None
    text = disagreements(published, published | {"input_size": (3, 224, 224), "resize": None})
    assert text.startswith("input_size [3,224,224] instead of [3,300,300], resize null instead of 320;")
    overrides = shlex.split(text.partition("publisher: ")[2])
    parsed = OmegaConf.from_dotlist(overrides).model
    assert OmegaConf.to_container(parsed) == {"input_size": [3, 300, 300], "resize": 320}


@pytest.mark.parametrize("own_weights", [False, True])
def test_a_teacher_that_differs_names_both_sides(
    own_weights: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("networks.teachers.published_weights", lambda *_: state)
    torch.save(state, tmp_path / "mine.pth")
    checkpoint = str(tmp_path / "mine.pth") if own_weights else None
    caplog.set_level(logging.INFO)
    load_teacher("squeezenet1_1", "torchvision", checkpoint=checkpoint, **IMAGENET)
    assert "otherwise than published" not in caplog.text
    changed = IMAGENET | {"resize": 224, "mean": [0.5, 0.5, 0.5]}
    load_teacher("squeezenet1_1", "torchvision", checkpoint=checkpoint, interpolation="bicubic", **changed)
    (record,) = [record for record in caplog.records if "otherwise than published" in record.message]
    assert record.levelno == (logging.INFO if own_weights else logging.WARNING)
    for side in (
        "resize 224 instead of 256",
        "interpolation bicubic instead of bilinear",
        "mean [0.5,0.5,0.5] instead",
    ):
        assert side in record.message
    assert ("unless the checkpoint" in record.message) == own_weights
