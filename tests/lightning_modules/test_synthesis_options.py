"""Options that change how synthesis runs, and by how much they may change what it makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_modules.generator import GeneratorModule
from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupResNet

SIZE = (3, 8, 8)
CONF = Path(__file__).parents[2] / "conf" / "generator"


@pytest.fixture
def network() -> CifarResNet:
    torch.manual_seed(0)
    network = CifarResNet(8)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, *SIZE))
    return network.eval()


def made(
    network: CifarResNet, preset: str, *, precision: Any = "32-true", accelerator: str = "cpu", **changes: Any
) -> GeneratorModule:
    cfg = OmegaConf.load(CONF / f"{preset}.yaml")
    assert not isinstance(cfg, list)
    cfg = OmegaConf.merge(cfg, {"batch_size": 4, "steps": 6, "schedule": None})
    module: GeneratorModule = instantiate(cfg)(
        network=copy.deepcopy(network), input_size=SIZE, seed=0, **({"count": 10} | changes)
    )
    trainer = pl.Trainer(
        max_epochs=module.batches,
        accelerator=accelerator,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module


@pytest.mark.parametrize("preset", ["zeroq", "genie", "propagated"])
def test_a_share_of_the_batches_is_bitwise_that_part_of_the_whole(network: CifarResNet, preset: str) -> None:
    whole = made(network, preset)
    assert whole.independent
    for part in range(whole.batches):
        count = min(4, 10 - 4 * part)
        share = made(network, preset, count=count, first_batch=part)
        assert torch.equal(share.images, whole.images[4 * part : 4 * part + count])


@pytest.mark.parametrize("preset", ["gdfq", "intraq_cifar10"])
def test_batches_that_depend_on_each_other_are_not_shared(network: CifarResNet, preset: str) -> None:
    module = instantiate(OmegaConf.load(CONF / f"{preset}.yaml"))(network=network, input_size=SIZE, seed=0, count=4)
    assert not module.independent


def test_noise_needs_no_batch_norm() -> None:
    build = instantiate(OmegaConf.load(CONF / "noise.yaml"))
    module = build(network=FixupResNet(8).eval(), input_size=SIZE, seed=0, count=4)
    module.render()
    assert bool(module.images.isfinite().all())


def test_channels_last_gives_the_same_images_within_rounding(network: CifarResNet) -> None:
    plain, other = made(network, "zeroq"), made(network, "zeroq", channels_last=True)
    assert other.alignment.network.get_submodule("layer1.0.conv1").weight.is_contiguous(
        memory_format=torch.channels_last
    )
    # Adam's first steps are signs of gradients, so that rounding may turn single pixels: compare what is optimised
    losses = [sum(float(t) for t in m.alignment(plain.images[:4]).values()) for m in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert float((other.images - plain.images).abs().mean()) < 1e-2


def test_bfloat16_ends_at_a_loss_within_five_per_cent(network: CifarResNet) -> None:
    plain, other = made(network, "zeroq"), made(network, "zeroq", precision="bf16-mixed")
    assert other.images.dtype == torch.float32
    losses = [sum(float(t) for t in plain.alignment(m.images[:4]).values()) for m in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_what_is_on_the_device_does_not_grow_with_the_number_of_images(network: CifarResNet) -> None:
    """Parameters, buffers and optimizer state are those of one batch; finished images stay on the CPU."""

    def held(count: int) -> int:
        module = made(network, "zeroq", count=count, steps=1)
        state = [t for group in module.optimizers().state.values() for t in group.values() if torch.is_tensor(t)]  # type: ignore[union-attr]
        moved = {id(t): t for t in (*module.parameters(), *module.buffers(), *state)}
        assert module.to("meta").images.device == torch.device("cpu")  # whatever the module moves to
        assert module.images.isfinite().all()
        return sum(t.numel() for t in moved.values())

    assert held(4) == held(20)


@pytest.mark.gpu
def test_peak_memory_of_the_device_does_not_grow_with_the_number_of_images(network: CifarResNet) -> None:
    def peak(count: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made(network, "zeroq", accelerator="gpu", count=count, steps=2)
        return torch.cuda.max_memory_allocated()

    peak(4)  # whatever the libraries allocate once
    assert peak(400) - peak(4) < 64 * 1024  # the further images themselves are 304,128 bytes
