"""What is known of the float network: found again for the same question, and for no other."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_modules.float_reference as module
from lightning_modules.float_reference import FloatReference
from synthesis.store import SampleStore

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"architecture": "resnet20", "mean": [0.5], "checkpoint": "a.pth", "stated_top1": 90.0},
    "data": {"limit": None, "root": "/here", "batch_size": 500},
}
ANSWERS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def reference(folder: Path, *, digest: str = "d", teacher: str = "t", machine: str = "m", **settings: Any) -> Any:
    parts = {group: part | settings.get(group, {}) for group, part in SETTINGS.items()}
    data: Any = SimpleNamespace(digest=digest)
    computed = {"machine": machine}
    return FloatReference(SampleStore(folder), data, teacher=teacher, settings=parts, computed=computed)


def test_found_again_bit_by_bit_wherever_the_files_lie(tmp_path: Path) -> None:
    assert reference(tmp_path).known_top1() is None
    assert reference(tmp_path).answers() is None
    reference(tmp_path).keep(ANSWERS, 66.7)
    moved = {"model": {"checkpoint": "b.pth", "stated_top1": 10.0}, "data": {"root": "/there"}}
    again = reference(tmp_path, **moved)
    assert again.known_top1() == 66.7
    assert torch.equal(again.answers(), ANSWERS)


@pytest.mark.parametrize(
    "other",
    [{"teacher": "u"}, {"model": {"mean": [0.4]}}, {"model": {"architecture": "resnet32"}}, {"data": {"limit": 10}}],
)
def test_another_question_is_not_answered(tmp_path: Path, other: dict[str, Any]) -> None:
    reference(tmp_path).keep(ANSWERS, 66.7)
    assert reference(tmp_path, **other).known_top1() is None
    assert reference(tmp_path, **other).answers() is None


@pytest.mark.parametrize("other", [{"digest": "e"}, {"machine": "n"}])
def test_answers_belong_to_images_and_machine_and_accuracy_does_not(tmp_path: Path, other: dict[str, Any]) -> None:
    reference(tmp_path).keep(ANSWERS, 66.7)
    assert reference(tmp_path, **other).known_top1() == 66.7
    assert reference(tmp_path, **other).answers() is None


@pytest.mark.parametrize("spoilt", ["large", "not finite"])
def test_answers_that_are_not_kept_serve_their_own_run(
    tmp_path: Path, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ANSWERS.clone()
    if spoilt == "large":
        monkeypatch.setattr(module, "LARGEST", ANSWERS.numel() * 4 - 1)
    else:
        answers[2, 1] = math.nan
    own = reference(tmp_path)
    own.keep(answers, 66.7)
    assert own.answers() is not None
    assert reference(tmp_path).known_top1() == 66.7
    assert reference(tmp_path).answers() is None
