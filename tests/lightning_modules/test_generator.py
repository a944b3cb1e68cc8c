"""Synthesis runs: the loss falls, seeds decide, images are the last parameters, and a resumed run is the same run."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from datamodules.steps import Steps
from lightning_modules.generator import GeneratorModule
from lightning_modules.synthesis import build_generator
from networks.cifar_resnet import CifarResNet
from synthesis.criteria import LayerwiseEnhancement
from synthesis.decorrelation import Decorrelation
from synthesis.moments import Probe
from synthesis.priors import TotalVariation
from synthesis.rates import Rates, WarmCosine
from synthesis.seeding import seeded
from synthesis.sources import Pixels
from synthesis.targets import Slack
from synthesis.views import AveragePool, Identity, InTurn, RandomResizedCrop, RollFlip
from tests.lightning_modules.training import Interrupt, InterruptAt

SIZE = (3, 8, 8)
CONF = Path(__file__).parents[2] / "conf" / "generator"
PLATEAU = functools.partial(ReduceLROnPlateau, patience=1, factor=0.5, threshold=0.05)


@pytest.fixture
def network() -> CifarResNet:
    torch.manual_seed(0)
    network = CifarResNet(8)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, *SIZE))
    return network.eval()


def build(network: CifarResNet, **changes: Any) -> GeneratorModule:
    arguments: dict[str, Any] = {
        "count": 10,
        "seed": 0,
        "steps": 6,
        "batch_size": 4,
        "source": Pixels,
        "optimizer": functools.partial(torch.optim.Adam, lr=0.1),
        "schedule": PLATEAU,
        "probe": Probe("sample", unbiased=True),
        "input_weight": 1.0,
    }
    return build_generator(network, SIZE, **(arguments | changes))


def trainer(module: GeneratorModule, **changes: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "max_epochs": module.batches,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(arguments | changes))


def make(network: CifarResNet, **changes: Any) -> GeneratorModule:
    module = build(network, **changes)
    trainer(module).fit(module)
    return module


class Record(Callback):
    """Keeps loss, learning rate and pixels of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.pixels: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.pixels.append(pl_module.source.pixels.detach().clone())


def test_agrees_with_a_plain_loop(network: CifarResNet) -> None:
    module = make(network, count=8)
    expected = []
    for epoch in range(2):
        pixels = torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=0.1)
        schedule = PLATEAU(optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            loss = torch.stack(list(module.alignment(pixels).values())).sum()
            loss.backward()
            optimizer.step()
            schedule.step(loss.item())
        expected.append(pixels.detach())
    assert torch.equal(module.images, torch.cat(expected))


def test_loss_falls_in_every_batch_and_rates_restart(network: CifarResNet) -> None:
    module, record = build(network, steps=30, count=8), Record()
    trainer(module, callbacks=[record]).fit(module)
    for epoch in range(2):
        losses = record.losses[30 * epoch : 30 * (epoch + 1)]
        assert losses[-1] < 0.5 * losses[0]
    assert record.rates[0] == record.rates[30] == 0.1
    assert record.rates[29] < 0.1


def test_images_are_the_parameters_after_the_last_step_and_the_last_batch_is_truncated(network: CifarResNet) -> None:
    module, record = build(network), Record()
    trainer(module, callbacks=[record]).fit(module)
    assert module.batches == 3
    assert torch.equal(module.images, torch.cat(record.pixels[5::6])[:10])


def test_seed_decides(network: CifarResNet) -> None:
    first = make(network, view=RandomResizedCrop())
    torch.manual_seed(99)
    assert torch.equal(make(network, view=RandomResizedCrop()).images, first.images)
    other = make(network, view=RandomResizedCrop(), seed=1)
    assert not torch.isclose(other.images, first.images).any(dim=0).all()
    assert not torch.equal(first.images[:4], first.images[4:8])


def everything(network: CifarResNet) -> GeneratorModule:
    return build(
        network,
        probe=Probe("all"),
        slack=functools.partial(Slack, images=8),
        source=functools.partial(Pixels, clamp=(-1.5, 1.5)),
        view=RandomResizedCrop(probability=0.5),
        priors={"total_variation": TotalVariation(0.01, RollFlip(2)), "none": None},
        decorrelation=Decorrelation,
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", [1, 4, 6, 7, 11, 12, 17])
def test_resumed_run_is_bitwise_the_uninterrupted_run(network: CifarResNet, tmp_path: Path, step: int) -> None:
    whole, record = everything(network), Record()
    trainer(whole, callbacks=[record]).fit(whole)

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    stopped = everything(network)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], **keep).fit(stopped)

    resumed, rest = everything(network), Record()
    path = tmp_path / f"step={step}.ckpt"
    trainer(resumed, callbacks=[checkpoint, rest], **keep).fit(resumed, ckpt_path=path)
    assert rest.losses == record.losses[step:]
    assert rest.rates == record.rates[step:]
    assert all(torch.equal(a, b) for a, b in zip(rest.pixels, record.pixels[step:], strict=True))
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_stopped_by_max_steps_and_resumed(network: CifarResNet, tmp_path: Path) -> None:
    cosine = {"schedule": functools.partial(CosineAnnealingLR, T_max=6)}
    whole, stopped, resumed, late = (build(network, **cosine) for _ in range(4))
    trainer(whole).fit(whole)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=9, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    first = trainer(stopped, max_epochs=None, max_steps=9, **keep)
    first.fit(stopped)
    assert stopped.images[:4].isfinite().all()
    assert stopped.images[4:].isnan().all()
    trainer(resumed, **keep).fit(resumed, ckpt_path=tmp_path / "step=9.ckpt")
    assert torch.equal(resumed.images, whole.images)
    # after the fit Lightning has counted the epoch as done: better refused than images that were never made
    first.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.raises(RuntimeError, match="expected batch 1 to be finished before batch 2"):
        trainer(late, **keep).fit(late, ckpt_path=tmp_path / "late.ckpt")


def test_a_new_fit_after_an_interrupted_one_starts_afresh(network: CifarResNet) -> None:
    module = build(network)
    with pytest.raises(Interrupt):
        trainer(module, callbacks=[InterruptAt(3)]).fit(module)
    trainer(module).fit(module)
    assert torch.equal(module.images, make(network).images)


def test_checkpoints_hold_no_weights_of_the_network(network: CifarResNet, tmp_path: Path) -> None:
    module = build(network, count=4)
    run = trainer(module)
    run.fit(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    keys = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"].keys()
    assert not any("conv" in key for key in keys)


def test_checkpoints_hold_the_finished_images_and_no_others(network: CifarResNet, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = build(network)
    trainer(whole, callbacks=[checkpoint], enable_checkpointing=True).fit(whole)
    for step, finished in ((5, 0), (10, 4), (15, 8)):
        file = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert torch.equal(file["finished_images"], whole.images[:finished])
        stored = [*file["state_dict"].values(), file["finished_images"]]
        pixels = [t for t in stored if t.shape[1:] == SIZE]
        assert sum(t.untyped_storage().nbytes() for t in pixels) == 4 * (finished + 4) * math.prod(SIZE)


def test_network_is_left_as_it_was(network: CifarResNet) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make(network, count=4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert not network.training


def test_divergence_names_step_and_place(network: CifarResNet) -> None:
    with pytest.raises(RuntimeError, match=r"batch 0; it began at step 1 .* not finite: the images"):
        make(network, optimizer=functools.partial(torch.optim.SGD, lr=1e30), schedule=None)
    with torch.no_grad():
        network.layer2[0].conv1.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"at step 0 .* layer 'layer2\.0\.bn1'"):
        make(network)


class Poison(Callback):
    """Spoils what one layer answers in step `step` of batch `epoch`, and in no other."""

    def __init__(self, layer: torch.nn.Module, epoch: int, step: int) -> None:
        self.when, self.armed = (epoch, step), False
        layer.register_forward_hook(lambda module, inputs, output: output * math.nan if self.armed else None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = (trainer.current_epoch, batch_idx) == self.when


def test_divergence_between_two_looks_names_the_step_and_layer_where_it_began(network: CifarResNet) -> None:
    poison = Poison(network.layer2[0].conv1, epoch=1, step=7)  # type: ignore[union-attr, arg-type]
    module = build(network, steps=60)
    with pytest.raises(RuntimeError, match=r"nan in batch 1; it began at step 7 .* layer 'layer2\.0\.bn1'"):
        trainer(module, callbacks=[poison]).fit(module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_where_divergence_began_survives_a_resume(network: CifarResNet, tmp_path: Path) -> None:
    poison = Poison(network.layer3[0].conv1, epoch=0, step=3)  # type: ignore[union-attr, arg-type]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    stopped, resumed = build(network, steps=60), build(network, steps=60)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[poison, checkpoint, InterruptAt(5)], enable_checkpointing=True).fit(stopped)
    with pytest.raises(RuntimeError, match=r"it began at step 3 .* layer 'layer3\.0\.bn1'"):
        trainer(resumed, callbacks=[checkpoint], enable_checkpointing=True).fit(
            resumed, ckpt_path=tmp_path / "step=5.ckpt"
        )


def test_images_that_only_the_last_step_spoils_are_refused(network: CifarResNet) -> None:
    class Last(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 5:
                pl_module.source.pixels.grad.fill_(math.nan)

    module = build(network)
    with pytest.raises(RuntimeError, match=r"it began at step 5 .* not finite: the images after it"):
        trainer(module, callbacks=[Last()]).fit(module)


def test_metrics_are_logged_at_the_trainers_rhythm(network: CifarResNet) -> None:
    class Memory(Logger):
        name, version = "test", 0  # type: ignore[assignment]

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen.append((step or 0, metrics))

        def log_hyperparams(self, *arguments: Any, **named: Any) -> None: ...

    module, logger = everything(network), Memory()
    trainer(module, logger=logger, log_every_n_steps=4).fit(module)
    assert [step for step, _ in logger.seen] == [3, 7, 11, 15]
    names = {"loss", "lr", "alignment", "total_variation", "decorrelation"}
    assert {f"synthesis/{name}" for name in names} <= logger.seen[0][1].keys()


@pytest.mark.parametrize("preset", ["zeroq", "dsg", "dsg_journal"])
def test_presets_run(network: CifarResNet, preset: str) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{preset}.yaml"), {"steps": 2})
    if config.slack is not None:
        config.slack.images = 8
    module = instantiate(config)(network=network, input_size=SIZE, count=9, seed=0)
    trainer(module).fit(module)
    assert module.images.shape == (9, *SIZE)
    assert module.images.isfinite().all()
    assert module.source.batch_size == {"zeroq": 64, "dsg": 7, "dsg_journal": 7}[preset]
    parts = (type(module.alignment.targets).__name__, type(module.alignment.layer_weights).__name__, *module.priors)
    assert (
        parts
        == {
            "zeroq": ("BNTargets", "Uniform"),
            "dsg": ("Slack", "LayerwiseEnhancement"),
            "dsg_journal": ("Slack", "LayerwiseEnhancement", "total_variation", "l2", "decorrelation"),
        }[preset]
    )


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("dsg", {"sda": False}),
        ("dsg", {"lse": False, "batch_size": 3}),
        ("dsg_journal", {"sci": False, "priors": {"l2": None}}),
        ("dsg_journal", {"lse": False, "batch_size": 40}),
    ],
)
def test_parts_can_be_switched_off(network: CifarResNet, preset: str, change: dict[str, Any]) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{preset}.yaml"), change)
    module = instantiate(config)(network=network, input_size=SIZE, count=3, seed=0)
    assert ("decorrelation" in module.priors) == config.sci
    assert not set(change.get("priors", {})) & set(module.priors)
    assert (type(module.alignment.targets).__name__ == "Slack") == config.sda
    assert (type(module.alignment.layer_weights).__name__ == "LayerwiseEnhancement") == config.lse


def test_a_part_that_is_not_there_cannot_be_switched_on(network: CifarResNet) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / "dsg.yaml"), {"slack": None})
    with pytest.raises(ValueError, match=r"generator\.slack: expected a part"):
        instantiate(config)(network=network, input_size=SIZE, count=3, seed=0)


class GlimpseOf(Callback):
    """Keeps the number of steps that each epoch took."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += [0] * (trainer.current_epoch + 1 - len(self.steps))
        self.steps[trainer.current_epoch] += 1


def test_early_stop_ends_a_batch_without_progress_and_keeps_its_images(network: CifarResNet) -> None:
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 8, "steps": 200}
    module, glimpse = build(network, early_stop=50, **still), GlimpseOf()
    trainer(module, callbacks=[glimpse]).fit(module)
    assert glimpse.steps == [51, 51]  # looked at after 1, 26 and 51 steps
    expected = torch.cat([torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)) for epoch in range(2)])
    assert torch.equal(module.images, expected)
    patient, whole = build(network, **still), GlimpseOf()
    trainer(patient, callbacks=[whole]).fit(patient)
    assert whole.steps == [200, 200]


def coarse_first() -> InTurn:
    return InTurn([AveragePool(2), Identity()], [2, 1])


def test_early_stop_leaves_no_coarse_stage_unfinished(network: CifarResNet) -> None:
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 8, "steps": 210}
    module, glimpse = build(network, early_stop=25, view=coarse_first(), **still), GlimpseOf()
    trainer(module, callbacks=[glimpse]).fit(module)
    assert glimpse.steps == [176, 176]  # fine from 140 on, so looked at after 151 and 176 steps


class SaveAtEpochEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path / "epoch.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("place", ["step=26", "epoch", "step=29"])
def test_a_batch_after_one_that_ended_early_is_whole_also_when_resumed(
    network: CifarResNet, tmp_path: Path, place: str
) -> None:
    """The first batch stands still and ends after 26 of 30 steps; so does each other one, and none is left unmade."""
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 12, "steps": 30}
    module, glimpse = build(network, early_stop=25, **still), GlimpseOf()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    trainer(module, callbacks=[glimpse, checkpoint, SaveAtEpochEnd(tmp_path)], **keep).fit(module)
    assert glimpse.steps == [26, 26, 26]
    expected = torch.cat([torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)) for epoch in range(3)])
    assert torch.equal(module.images, expected)
    resumed = build(network, early_stop=25, **still)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / f"{place}.ckpt")
    assert torch.equal(resumed.images, expected)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", [1, 4, 5])
def test_resumed_on_either_side_of_a_stage_is_bitwise_the_uninterrupted_run(
    network: CifarResNet, tmp_path: Path, step: int
) -> None:
    def compose() -> GeneratorModule:
        rates = functools.partial(Rates, rates=[WarmCosine([2000, 1000])])
        return build(network, view=coarse_first(), schedule=rates, early_stop=25, count=4)

    whole, stopped, resumed = (compose() for _ in range(3))
    trainer(whole).fit(whole)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], enable_checkpointing=True).fit(stopped)
    path = tmp_path / f"step={step}.ckpt"
    trainer(resumed, callbacks=[checkpoint], enable_checkpointing=True).fit(resumed, ckpt_path=path)
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_early_stop_resumes_where_it_was(network: CifarResNet, tmp_path: Path) -> None:
    slow = {"optimizer": functools.partial(torch.optim.SGD, lr=1e-5), "schedule": None, "count": 4, "steps": 90}
    whole, stopped, resumed = (build(network, early_stop=25, **slow) for _ in range(3))
    glimpse = GlimpseOf()
    trainer(whole, callbacks=[glimpse]).fit(whole)
    assert glimpse.steps == [26]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(1)], **keep).fit(stopped)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / "step=1.ckpt")
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("preset", ["intraq_cifar10", "genie", "qimera"])
def test_generators_labels_and_margins_resume_bitwise(network: CifarResNet, tmp_path: Path, preset: str) -> None:
    def compose() -> GeneratorModule:
        config = OmegaConf.merge(OmegaConf.load(CONF / f"{preset}.yaml"), {"steps": 4, "batch_size": 4})
        return instantiate(config)(network=network, input_size=SIZE, count=10, seed=0)

    whole = compose()
    trainer(whole).fit(whole)
    step = 6 if whole.batches > 1 else 2
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    stopped, resumed = compose(), compose()
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], **keep).fit(stopped)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({}, r"batch_size: layer-wise enhancement .* \(7\), got 4\. Set generator\.batch_size=null"),
        (
            {"batch_size": None, "probe": Probe("batch")},
            r"reduction: layer-wise .* Set generator\.probe\.reduction=sample",
        ),
    ],
)
def test_enhancement_that_cannot_be_is_refused_before_anything_is_measured(
    network: CifarResNet, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], remedy: str
) -> None:
    monkeypatch.setattr("synthesis.targets.Slack.targets", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(ValueError, match=remedy):
        build(network, layer_weights=LayerwiseEnhancement(), slack=Slack, **change)


def test_steps_count_and_resume() -> None:
    steps = Steps(4)
    assert list(steps) == list(steps) == [0, 1, 2, 3]
    taken = iter(steps)
    assert [next(taken), next(taken)] == [0, 1]
    other = Steps(4)
    other.load_state_dict(steps.state_dict())
    assert list(other) == [2, 3]
    assert list(other) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="count"):
        Steps(0)
