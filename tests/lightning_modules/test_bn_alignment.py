"""The alignment loss against plain loops over layers, and its scores of an image set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.bn_alignment import BNAlignmentModule
from networks.cifar_resnet import CifarResNet
from synthesis.criteria import LayerwiseEnhancement, SquaredL2
from synthesis.moments import Moments, Probe
from synthesis.seeding import seeded
from synthesis.statistics import LayerStatistics
from synthesis.targets import BNTargets, Slack
from synthesis.weight_statistics import PropagatedMoments, WeightGaussian

SIZE = (3, 8, 8)


@pytest.fixture
def network() -> CifarResNet:
    torch.manual_seed(0)
    network = CifarResNet(8)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, *SIZE) + 0.3)  # gives every layer its running statistics
    return network.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(7, *SIZE, generator=torch.Generator().manual_seed(1))


def layer_losses(network: nn.Module, images: Tensor) -> Tensor:
    """Return ||m - mu||^2 + ||s - sigma||^2 for each sample and layer, with torch's own variance."""
    inputs: dict[str, Tensor] = {}
    names = {module: name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}

    def keep(module: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs[names[module]] = arguments[0]  # type: ignore[index]

    handles = [module.register_forward_pre_hook(keep) for module in names]
    network(images)
    for handle in handles:
        handle.remove()
    losses = []
    for name, x in inputs.items():
        bn = network.get_submodule(name)
        var, mean = torch.var_mean(x, (2, 3), correction=1)
        gap = (var + 1e-6).sqrt() - (bn.running_var + 1e-6).sqrt()  # type: ignore[operator]
        losses.append((mean - bn.running_mean).square().sum(1) + gap.square().sum(1))  # type: ignore[operator]
    return torch.stack(losses, 1)


@pytest.mark.parametrize("criterion", [SquaredL2("sum"), SquaredL2("mean")])
def test_loss_of_zeroq_written_out(network: CifarResNet, images: Tensor, criterion: SquaredL2) -> None:
    module = BNAlignmentModule(
        network, SIZE, probe=Probe("sample", unbiased=True), criterion=criterion, input_weight=1.0
    )
    terms = module(images)
    expected = layer_losses(network, images)
    var, mean = torch.var_mean(images, (2, 3), correction=1)
    at_input = mean.square().sum(1) + ((var + 1e-6).sqrt() - (1 + 1e-6) ** 0.5).square().sum(1)
    if criterion.channels == "mean":
        widths = [len(network.get_submodule(name).running_mean) for name in module.layers]  # type: ignore[arg-type]
        expected, at_input = expected / torch.tensor(widths), at_input / 3
    torch.testing.assert_close(terms["alignment"], expected.sum(1).mean())
    torch.testing.assert_close(terms["input"], at_input.mean())


def test_zero_if_and_only_if_the_moments_agree(network: CifarResNet, images: Tensor) -> None:
    probe = Probe("batch", moment="var")
    with torch.no_grad(), LayerStatistics(network, probe) as seen:
        network(images)
    for name, part in seen.items():
        network.get_submodule(name).running_mean.copy_(part.mean)  # type: ignore[operator, union-attr]
        network.get_submodule(name).running_var.copy_(part.var)  # type: ignore[operator, union-attr]
    # the first layer alone: its new statistics change what the later ones see
    module = BNAlignmentModule(network, SIZE, probe=probe)
    module.prepare()
    losses = module._losses(probe.statistics(module.moments(images)))
    assert losses[0, 0].item() == pytest.approx(0, abs=1e-9)
    assert module._losses(probe.statistics(module.moments(2 * images)))[0, 0].item() > 0.1


def test_enhancement_doubles_the_gradient_of_sample_i_from_layer_i(network: CifarResNet, images: Tensor) -> None:
    probe = Probe("sample", unbiased=True)
    x = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(BNAlignmentModule(network, SIZE, probe=probe)(x)["alignment"], x)
    enhanced = BNAlignmentModule(network, SIZE, probe=probe, layer_weights=LayerwiseEnhancement())
    (twice,) = torch.autograd.grad(enhanced(x)["alignment"], x)
    losses = layer_losses(network, x)
    (own,) = torch.autograd.grad(losses.diag().sum() / len(x), x)
    torch.testing.assert_close(twice, plain + own, rtol=1e-4, atol=1e-5)


def test_slack_that_covers_every_gap_leaves_no_loss_and_no_gradient(network: CifarResNet) -> None:
    probe = Probe("sample")
    slack = Slack(BNTargets(), percentile=1.0, images=8, batch_size=8, seed=5)
    module = BNAlignmentModule(network, SIZE, targets=slack, probe=probe)
    module.prepare()
    noise = torch.randn(8, *SIZE, generator=seeded(5, "slack")).requires_grad_()
    loss = module(noise)["alignment"]
    (gradient,) = torch.autograd.grad(loss, noise)
    assert loss.item() == 0
    assert gradient.abs().max().item() == 0
    assert module(3 * noise)["alignment"].item() > 0


def test_all_images_reduction_equals_one_large_batch(network: CifarResNet) -> None:
    images = torch.randn(9, *SIZE)
    module = BNAlignmentModule(network, SIZE, probe=Probe("all"), input_weight=1.0)
    module.remember(images[:3])
    module.remember(images[3:5])
    last = images[5:].clone().requires_grad_()
    terms = module(last)
    expected = BNAlignmentModule(network, SIZE, probe=Probe("batch"), input_weight=1.0)(images)
    torch.testing.assert_close(terms, expected)
    assert torch.autograd.grad(terms["alignment"], last)[0].abs().sum().item() > 0
    module.forget()
    torch.testing.assert_close(module(images), expected)


def test_no_weight_gradients_no_hooks_and_no_change_of_the_network(network: CifarResNet, images: Tensor) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = BNAlignmentModule(network, SIZE, input_weight=1.0).train()
    sum(module(images.requires_grad_()).values()).backward()  # type: ignore[union-attr]
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(key.startswith(("network", "_network")) for key in module.state_dict())


def test_first_non_finite_layer_is_named(network: CifarResNet, images: Tensor) -> None:
    module = BNAlignmentModule(network, SIZE)

    def place() -> str | None:
        return module.place_of(int(module.first_non_finite(module.moments(images))))

    assert place() is None
    with torch.no_grad():
        network.layer2[0].conv2.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    assert place() == "layer 'layer2.0.bn2'"
    images /= 0
    assert place() == "the images"


@pytest.mark.parametrize("probe", [Probe("sample"), Probe("batch")])
def test_every_place_has_its_name(network: CifarResNet, images: Tensor, probe: Probe) -> None:
    module = BNAlignmentModule(network, SIZE, probe=probe)
    clean = module.moments(images)
    names = [name for name, size in zip([*module.layers, "input"], module.sizes, strict=True) for _ in range(size)]
    for value in (math.nan, math.inf, -math.inf):
        for channel, name in enumerate(names):
            moments = Moments(clean.mean.clone(), clean.var.clone())
            moments[channel % 2][-1, channel] = value
            expected = "the images" if name == "input" else f"layer {name!r}"
            assert module.place_of(int(module.first_non_finite(moments))) == expected


@pytest.mark.parametrize("labelled", [False, True])
def test_validation_logs_the_gaps_of_every_layer(network: CifarResNet, images: Tensor, labelled: bool) -> None:
    module = BNAlignmentModule(network, SIZE, probe=Probe("sample", unbiased=True))
    items: Any = [(image, 0) for image in images] if labelled else list(images)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.validate(module, DataLoader(items, batch_size=3), verbose=False)
    torch.testing.assert_close(
        torch.tensor(metrics["alignment/total"]), layer_losses(network, images).sum(1).mean(), rtol=1e-5, atol=0
    )
    x = network.conv1(images)
    gap = (x.mean((2, 3)) - network.bn1.running_mean).abs().mean()  # type: ignore[operator]
    assert metrics["alignment/bn1/mean_gap"] == pytest.approx(gap.item(), rel=1e-5)
    for name in (*module.layers, "input"):
        assert {f"alignment/{name}/mean_gap", f"alignment/{name}/std_gap"} <= metrics.keys()


def test_several_sets_are_told_apart_and_their_diversity_logged(network: CifarResNet, images: Tensor) -> None:
    module = BNAlignmentModule(network, SIZE, probe=Probe("batch"))
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    sets = [DataLoader(list(images), batch_size=4), DataLoader([images[0]] * 4, batch_size=2)]
    found = trainer.validate(module, sets, verbose=False)
    first = second = {name: value for part in found for name, value in part.items()}
    assert second["alignment/feature_similarity/dataloader_idx_1"] == pytest.approx(1, abs=1e-5)
    assert first["alignment/feature_similarity/dataloader_idx_0"] < 0.9999
    x = network.conv1(images)
    bn = network.bn1
    spread = ((x.mean((2, 3)) - bn.running_mean) / (bn.running_var + 1e-6).sqrt()).square().mean().sqrt()  # type: ignore[operator]
    assert first["alignment/bn1/mean_spread/dataloader_idx_0"] == pytest.approx(spread.item(), rel=1e-4)


def test_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="real images or on noise"):
        BNAlignmentModule(nn.Conv2d(3, 4, 3), SIZE)


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.3), ([0.1, 0.2, 0.3], [1.0, 2.0, 0.5])])
def test_images_are_drawn_to_the_colours_that_the_targets_were_propagated_from(
    network: CifarResNet, mean: Any, std: Any, relaxed: bool
) -> None:
    targets: Any = PropagatedMoments(mean, std)
    if relaxed:
        targets = Slack(targets, images=4, batch_size=4)
    module = BNAlignmentModule(network, SIZE, targets=targets, probe=Probe("batch"), input_weight=2.0)
    noise = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(0))
    var, average = torch.var_mean(noise, (0, 2, 3), correction=0, keepdim=True)
    wanted_mean, wanted_std = (torch.as_tensor(v).expand(3).view(3, 1, 1) for v in (mean, std))
    coloured = (noise - average) / var.sqrt() * wanted_std + wanted_mean
    assert module(coloured)["input"].item() == pytest.approx(0, abs=1e-8)
    at_normal = module((noise - average) / var.sqrt())["input"].item()
    gaps = wanted_mean.square() + (wanted_std - 1).square()
    assert at_normal == pytest.approx(2 * gaps.sum().item(), rel=1e-4)


def test_other_sources_draw_images_to_standard_normal_pixels() -> None:
    for source in (BNTargets(), WeightGaussian(), Slack(BNTargets())):
        mean, var = source.input_moments()
        assert (mean.item(), var.item()) == (0, 1)
