"""Options that change how synthesis runs, and by how much they may change what it makes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_modules.generator import GeneratorModule
from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupResNet
from synthesis.guidance import Answer, CrossEntropy
from synthesis.priors import L2Norm
from tests.configuration import CONF
from tests.lightning_modules.synthesis_runs import SIZE

# torch looks at .grad of what enters a compiled function and hides the warning, but not from those who raise it:
# torch._dynamo.variables.builder.safe_has_grad
COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs["loss"])


def made(
    network: CifarResNet,
    preset: str,
    *,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    losses: Losses | None = None,
    **changes: Any,
) -> GeneratorModule:
    cfg = OmegaConf.load(CONF / "generator" / f"{preset}.yaml")
    assert not isinstance(cfg, list)
    cfg = OmegaConf.merge(cfg, {"batch_size": 4, "steps": 6, "schedule": None})
    if cfg.get("lse"):
        cfg.batch_size = None
    if cfg.get("slack") is not None:
        cfg.slack.images = 8
    if "valid" in cfg.source:
        cfg.source.valid = None  # the model's, which there is none of here
    module: GeneratorModule = instantiate(cfg)(
        network=copy.deepcopy(network), input_size=SIZE, **({"count": 10, "seed": 0} | changes)
    )
    trainer = pl.Trainer(
        max_epochs=module.batches,
        accelerator=accelerator,
        precision=precision,
        callbacks=[] if losses is None else [losses],
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
    module = instantiate(OmegaConf.load(CONF / "generator" / f"{preset}.yaml"))(
        network=network, input_size=SIZE, seed=0, count=4
    )
    assert not module.independent


def test_batches_are_shared_where_the_margin_is_off(network: CifarResNet) -> None:
    """IntraQ as released for ImageNet: every batch stands alone, and no features are asked for."""
    module = instantiate(OmegaConf.load(CONF / "generator" / "intraq.yaml"))(
        network=network, input_size=SIZE, seed=0, count=4
    )
    assert module.independent
    assert module._features is None


def test_noise_needs_no_batch_norm() -> None:
    build = instantiate(OmegaConf.load(CONF / "generator" / "noise.yaml"))
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


def final_loss(judge: GeneratorModule, module: GeneratorModule) -> float:
    """Of a module's first images, in the precision of `judge`."""
    return sum(float(term) for term in judge.alignment(module.images[: judge.source.batch_size]).values())


@pytest.mark.parametrize("preset", ["zeroq", "genie"])
def test_bfloat16_ends_at_a_loss_within_five_per_cent(network: CifarResNet, preset: str) -> None:
    plain, other = (made(network, preset, precision=p) for p in ("32-true", "bf16-mixed"))
    assert other.images.dtype == torch.float32
    losses = [final_loss(plain, module) for module in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_bfloat16_learns_a_generator_to_a_loss_within_five_per_cent(network: CifarResNet) -> None:
    """At a tenth of the published rate: at that one, another number of threads alone moves the end by 4 %."""
    settings = {"steps": 40, "batch_size": 16, "count": 16, "optimizer": partial(torch.optim.Adam, lr=1e-4)}
    start = made(network, "gdfq", steps=1, batch_size=16, count=16)
    losses = []
    for seed in (0, 1):
        plain, other = (made(network, "gdfq", precision=p, seed=seed, **settings) for p in ("32-true", "bf16-mixed"))
        assert other.images.dtype == torch.float32
        losses.append([final_loss(plain, module) for module in (plain, other)])
        assert losses[-1][0] != losses[-1][1]
        assert max(losses[-1]) < 0.8 * final_loss(plain, start)
    exact, rounded = (sum(column) for column in zip(*losses, strict=True))
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("preset", ["zeroq", "dsg_journal", "genie", "gdfq", "intraq_cifar10"])
def test_losses_are_float32_where_the_network_is_not(network: CifarResNet, preset: str) -> None:
    losses = Losses()
    module = made(network, preset, precision="bf16-mixed", losses=losses, steps=2, count=8)
    assert len(losses.seen) == 2 * module.batches
    assert all(loss.dtype == torch.float32 and bool(loss.isfinite()) for loss in losses.seen)


class WatchedCrossEntropy(CrossEntropy):
    """Keeps in what precision it is asked."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: list[Any] = []

    def penalty(self, answer: Answer) -> torch.Tensor:
        self.seen.append((answer.logits.dtype, torch.is_autocast_enabled("cpu")))
        return super().penalty(answer)


class WatchedPrior(L2Norm):
    """Keeps in what precision it is asked."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: list[Any] = []

    def penalty(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        self.seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
        return super().penalty(images, rng)


@pytest.mark.parametrize("preset", ["zeroq", "genie"])
def test_terms_see_float32_and_compute_in_it(network: CifarResNet, preset: str) -> None:
    term, prior = WatchedCrossEntropy(), WatchedPrior()
    made(network, preset, precision="bf16-mixed", steps=2, count=4, guidance={"term": term}, priors={"prior": prior})
    assert term.seen == prior.seen == [(torch.float32, False)] * 2


def test_terms_under_autocast_are_bitwise_those_without(network: CifarResNet) -> None:
    alignment = made(network, "zeroq").alignment
    look = alignment.look(torch.randn(4, *SIZE))
    expected = alignment.terms(look.moments, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment.terms(look.moments, 4)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Counter:
    """A backend that runs what it is given as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        self.graphs += 1
        return graph.forward


@COMPILED
@pytest.mark.parametrize(("preset", "precision"), [("zeroq", "32-true"), ("intraq_cifar10", "bf16-mixed")])
def test_the_pass_through_the_network_is_compiled_once_and_whole(
    network: CifarResNet, preset: str, precision: str
) -> None:
    plain, counter = made(network, preset, precision=precision), Counter()
    other = made(network, preset, precision=precision, compile=counter)
    assert counter.graphs == 1  # three batches, crops now and then, one pass that nothing breaks in two
    assert torch.equal(other.images, plain.images)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in other.alignment.network.modules())


@COMPILED
def test_every_fit_of_a_sweep_is_compiled(network: CifarResNet) -> None:
    """Beyond its limit (eight, here one) torch would go on uncompiled with no more than a line in its log."""
    counter = Counter()
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            made(network, "zeroq", steps=1, count=1, batch_size=1, compile=counter)
    assert counter.graphs == 2


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_gives_the_same_images_within_rounding(network: CifarResNet, precision: str) -> None:
    plain, other = (made(network, "zeroq", precision=precision, compile=on) for on in (False, True))
    losses = [sum(float(t) for t in plain.alignment(m.images[:4]).values()) for m in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "32-true" else 1e-2)


def test_what_cannot_be_compiled_is_refused(network: CifarResNet) -> None:
    with pytest.raises(ValueError, match=r"generator\.compile, generator\.surgery: .* SwingConvolution"):
        made(network, "genie", compile=True)
    with pytest.raises(
        ValueError, match=r"generator\.compile: expected true, false or a backend of .*, eager, .* got 'typo'"
    ):
        made(network, "zeroq", compile="typo")


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
