"""Tuning is a plain loop, needs no labels, moves only what it may, and resumes bit by bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_modules.tuning import TuningModule
from quantizers.convert import Conversion
from quantizers.layer import quantized_layers, sites
from quantizers.lsq import LSQ
from quantizers.ranges import MinMax
from reconstruction.schedules import index_batches, seed_of
from tests.lightning_modules.training import Interrupt, InterruptAt, quiet_trainer
from tests.reconstruction.students import images, resnet8, student_of

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
POLISH: dict[str, Any] = {
    "learn": ["biases", "activation_scales", "weight_scales", "norms"],
    "optimizer": ADAM,
    "last_layer": True,
    "schedule": "cosine",
    "scale_lr": 0.01,
}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return resnet8()


def converted(teacher: nn.Module) -> Conversion:
    return student_of(teacher, images(13), bits=(3, 4))


def build(teacher: nn.Module, conversion: Conversion | None = None, **changes: Any) -> TuningModule:
    arguments: dict[str, Any] = {"learn": ["biases"], "optimizer": SGD, "steps": 6, "batch_size": 5, "seed": 3}
    return TuningModule(conversion or converted(teacher), teacher, images=images(13), **(arguments | changes))


def trainer(module: TuningModule, **changes: Any) -> pl.Trainer:
    return quiet_trainer(**(module.trainer_arguments() | changes))


def fitted(teacher: nn.Module, **changes: Any) -> TuningModule:
    module = build(teacher, **changes)
    trainer(module).fit(module)
    return module


def state(module: TuningModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.student.state_dict().items()}


def test_agrees_with_a_plain_loop(teacher: nn.Module) -> None:
    module = fitted(teacher)
    student = converted(teacher).student
    for _, layer in quantized_layers(student):
        layer.weight_quantizer.harden()
    student.requires_grad_(False)
    biases = [layer.bias.requires_grad_() for path, layer in quantized_layers(student) if path != "linear"]  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(biases, lr=0.1)
    with torch.no_grad():
        targets = teacher(images(13)).log_softmax(1)
    for index in index_batches(13, 5, 6, seed=seed_of(3, "tuning")):
        optimizer.zero_grad()
        logits = student(images(13)[index]).log_softmax(1)
        # the mean over images and classes of p (log p - log q)
        (targets[index].exp() * (targets[index] - logits)).mean().backward()
        optimizer.step()
    for key, value in state(module).items():
        torch.testing.assert_close(value, student.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_loss_over_all_images_falls(teacher: nn.Module, loss: Any) -> None:
    facts = fitted(teacher, loss=loss, steps=60, optimizer=ADAM).facts
    assert facts["loss_after"] < 0.8 * facts["loss_before"]
    assert facts["steps"] == 60


def test_only_biases_but_the_last_move(teacher: nn.Module) -> None:
    module = build(teacher)
    before = state(module)
    trainer(module).fit(module)
    moved = {key for key, value in state(module).items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.endswith("layer.bias") for key in moved)
    assert "linear.layer.bias" not in moved
    assert module.facts["tuned"] == sum(before[key].numel() for key in before if key.endswith("bias")) - 10
    assert not any(p.requires_grad for p in module.student.parameters())


def test_polish_moves_scales_biases_and_norms_but_no_integer(teacher: nn.Module) -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    conversion = student_of(network, images(13), activation=functools.partial(LSQ, range=MinMax()))
    before = {key: value.clone() for key, value in conversion.student.state_dict().items()}
    integers = {path: q.weight_quantizer.integers(q.weight)[0] for path, q in quantized_layers(conversion.student)}
    module = build(network, conversion, **POLISH)
    trainer(module).fit(module)
    moved = {key for key, value in state(module).items() if not torch.equal(value, before[key])}
    assert {"0.scale", "0.shift", "1.layer.bias", "4.layer.bias", "1.weight_quantizer.scale"} <= moved
    assert {key for key in moved if "activation_sites" in key} == {
        f"{path}.quantizer.scale" for path, _ in sites(conversion.student)
    }
    for path, layer in quantized_layers(module.student):
        assert torch.equal(layer.weight_quantizer.integers(layer.weight)[0], integers[path])


def test_weight_scales_are_learned_as_in_a_plain_loop_and_integers_stay(teacher: nn.Module) -> None:
    conversion = converted(teacher)
    integers = {path: q.weight_quantizer.integers(q.weight)[0] for path, q in quantized_layers(conversion.student)}
    module = build(teacher, conversion, learn=["weight_scales"], optimizer=ADAM, scale_lr=0.01, steps=4)
    trainer(module).fit(module)

    student = converted(teacher).student.requires_grad_(False)
    gains = {path: torch.ones_like(q.weight_quantizer.scale).requires_grad_() for path, q in quantized_layers(student)}
    for _, layer in quantized_layers(student):
        layer.weight_quantizer.harden()
    rounded = {f"{path}.layer.weight": layer.quantized_weight() for path, layer in quantized_layers(student)}
    for _, layer in quantized_layers(student):
        layer.enabled = False  # the quantized weights stand in the float ones' places
    optimizer = torch.optim.Adam(gains.values(), lr=0.01)
    targets = teacher(images(13)).log_softmax(1).detach()
    for index in index_batches(13, 5, 4, seed=seed_of(3, "tuning")):
        weights = {key: w * gains[key.removesuffix(".layer.weight")] for key, w in rounded.items()}
        logits = torch.func.functional_call(student, weights, (images(13)[index],)).log_softmax(1)
        optimizer.zero_grad()
        (targets[index].exp() * (targets[index] - logits)).mean().backward()
        optimizer.step()

    for path, layer in quantized_layers(module.student):
        assert torch.equal(layer.weight_quantizer.integers(layer.weight)[0], integers[path])
        expected = rounded[f"{path}.layer.weight"] * gains[path].detach()
        torch.testing.assert_close(layer.quantized_weight(), expected, rtol=1e-4, atol=1e-6)
    assert module.facts["tuned"] == sum(gain.numel() for gain in gains.values())


def test_targets_are_found_by_image_not_by_class(teacher: nn.Module) -> None:
    """The released code looks outputs up by label, which mixes up images of one class."""
    module = fitted(teacher, steps=1)
    with torch.no_grad():
        expected = teacher(images(13))
    assert len(expected.argmax(1).unique()) < 13
    torch.testing.assert_close(module.targets, expected)


def test_seed_decides_and_nothing_else(teacher: nn.Module) -> None:
    first = state(fitted(teacher))
    torch.manual_seed(99)
    assert all(torch.equal(value, first[key]) for key, value in state(fitted(teacher)).items())
    assert any(not torch.equal(value, first[key]) for key, value in state(fitted(teacher, seed=4)).items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("step", "changes"), [(4, {}), (1, POLISH), (4, POLISH)])
def test_resumed_run_is_bitwise_the_uninterrupted_run(
    teacher: nn.Module, tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    whole = fitted(teacher, **changes)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    stopped, resumed = build(teacher, **changes), build(teacher, **changes)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], **keep).fit(stopped)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    expected = state(whole)
    assert all(torch.equal(value, expected[key]) for key, value in state(resumed).items())
    assert resumed.facts == whole.facts


def test_checkpoints_hold_neither_teacher_nor_images(teacher: nn.Module) -> None:
    module = fitted(teacher)
    own = {f"student.{key}" for key in module.student.state_dict()}
    assert set(module.state_dict()) == own | {"entry_loss"}


def test_divergence_is_named(teacher: nn.Module) -> None:
    # quantized activations clip whatever biases do, the last layer's bias is in the logits
    module = build(teacher, loss="mse", last_layer=True, optimizer=functools.partial(torch.optim.SGD, lr=1e38))
    with pytest.raises(RuntimeError, match="tuning: expected a finite loss after 6 steps"):
        trainer(module).fit(module)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": []}, "learn: expected some of"),
        ({"learn": ["weights"]}, "learn: expected some of"),
        ({"learn": ["norms"]}, "got a student without norms"),
        ({"loss": "ce"}, "loss: expected one of"),
        ({"schedule": "step"}, "anneal"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"images": torch.zeros(0, 1, 8, 8)}, "images: expected at least one"),
    ],
)
def test_bad_arguments_are_named(teacher: nn.Module, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"learn": ["biases"], "optimizer": SGD, "images": images(4)}
    with pytest.raises(ValueError, match=message):
        TuningModule(converted(teacher), teacher, **(arguments | changes))
