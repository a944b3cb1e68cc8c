"""Views: shapes, ranges, reproducibility and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthesis.views import AllOf, AveragePool, Identity, InTurn, LowPass, RandomResizedCrop, RollFlip, View


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "view", [Identity(), RollFlip(2), RandomResizedCrop(probability=1.0), AveragePool(2), LowPass(70.0)]
)
def test_same_generator_same_view_and_a_gradient(view: View) -> None:
    images = torch.randn(4, 3, 8, 6, requires_grad=True)
    seen = view(images, rng())
    assert torch.equal(seen, view(images, rng()))
    (gradient,) = torch.autograd.grad(seen, images, torch.ones(seen.shape))
    assert gradient.isfinite().all()
    assert gradient.sum().item() > 0


def test_roll_keeps_all_pixels_and_one_offset_for_all() -> None:
    images = torch.randn(4, 3, 8, 8)
    seen = RollFlip(3, flip=0.0)(images, rng(1))
    offsets = [
        (down, right)
        for down in range(-3, 4)
        for right in range(-3, 4)
        if torch.equal(seen, images.roll((down, right), (2, 3)))
    ]
    assert len(offsets) == 1
    assert torch.equal(RollFlip(0, flip=1.0)(images, rng()), images.flip(3))


def test_crop_of_the_whole_image_is_the_image_or_its_mirror() -> None:
    images = torch.randn(16, 3, 8, 6)
    whole = RandomResizedCrop((1.0, 1.0), (1.0, 1.0), flip=0.0, probability=1.0)
    torch.testing.assert_close(whole(images, rng()), images, atol=1e-5, rtol=0)
    mirror = RandomResizedCrop((1.0, 1.0), (1.0, 1.0), flip=1.0, probability=1.0)
    torch.testing.assert_close(mirror(images, rng()), images.flip(3), atol=1e-5, rtol=0)


def test_crop_keeps_the_stated_share_and_differs_between_samples() -> None:
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)
    seen = RandomResizedCrop((0.25, 0.25), (1.0, 1.0), flip=0.5, probability=1.0)(ramp, rng())
    width = seen[:, 0, 0].amax(1) - seen[:, 0, 0].amin(1)  # of a unit ramp, so half of it
    torch.testing.assert_close(width, torch.full_like(width, 0.5), atol=0.03, rtol=0)
    middle = seen.mean((1, 2, 3))
    assert middle.min().item() < 0.3 < 0.7 < middle.max().item()
    mirrored = (seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).float().mean()
    assert 0.35 < mirrored.item() < 0.65


def test_crop_is_applied_with_its_probability() -> None:
    images = torch.randn(1, 1, 8, 8)
    view, generator = RandomResizedCrop((0.5, 0.5), probability=0.3), rng()
    changed = [not torch.equal(view(images, generator), images) for _ in range(300)]
    assert 0.2 < sum(changed) / 300 < 0.4


def test_average_pool() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(AveragePool(2)(images, rng()), F.avg_pool2d(images, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RollFlip(-1),
        lambda: RollFlip(1, flip=2),
        lambda: RandomResizedCrop((0, 1)),
        lambda: RandomResizedCrop(ratio=(2, 1)),
        lambda: RandomResizedCrop(probability=-1),
        lambda: AveragePool(0),
    ],
)
def test_wrong_arguments_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()  # type: ignore[operator]


def test_low_pass_multiplies_the_spectrum_by_a_gaussian() -> None:
    images = torch.randn(2, 3, 16, 16)
    spectrum, filtered = (np.fft.fft2(x.double().numpy()) for x in (images, LowPass(70.0)(images, rng())))
    limit = 70 * 16 / 224
    for y in range(16):
        for x in range(16):
            distance = min(y, 16 - y) ** 2 + min(x, 16 - x) ** 2
            gain = np.exp(-distance / (2 * limit**2))
            np.testing.assert_allclose(filtered[..., y, x], gain * spectrum[..., y, x], atol=1e-4)


def test_low_pass_means_the_same_share_at_every_size_and_keeps_the_mean() -> None:
    wave = torch.linspace(0, 1, 33)[:-1].mul(2 * torch.pi * 4).cos()  # 4 of 16 possible cycles
    small = wave.view(1, 1, 1, 32).expand(1, 1, 32, 32)
    large = small.repeat(1, 1, 2, 2)  # 8 of 32 possible cycles
    view = LowPass(30.0)
    torch.testing.assert_close(view(large, rng())[..., :32, :32], view(small, rng()))
    images = torch.randn(2, 3, 9, 12) + 5
    torch.testing.assert_close(view(images, rng()).mean((2, 3)), images.mean((2, 3)))


def test_views_in_turn_and_all_of_them() -> None:
    images = torch.randn(2, 3, 8, 8)
    view = InTurn([AveragePool(4), AveragePool(2), Identity()], [2, 3, 1])
    assert [view(images, rng(), step).shape[-1] for step in range(8)] == [2, 2, 4, 4, 4, 8, 8, 8]
    both = AllOf([AveragePool(2), RollFlip(0, flip=1.0)])
    assert torch.equal(both(images, rng()), F.avg_pool2d(images, 2).flip(3))
    with pytest.raises(ValueError, match="shares: expected a positive number for each of 2 views"):
        InTurn([Identity(), Identity()], [3])


def test_views_in_turn_keep_their_proportions() -> None:
    images = torch.randn(2, 3, 8, 8)
    view = AllOf([Identity(), InTurn([AveragePool(2), Identity()], [2000, 1000])])
    assert view.settled_from == 2000
    view.plan(9)
    assert [view(images, rng(), step).shape[-1] for step in range(10)] == 6 * [4] + 4 * [8]
    assert view.settled_from == 6
    assert RandomResizedCrop().settled_from == 0


@pytest.mark.parametrize(("height", "reach"), [(224, 30), (112, 15), (28, 4)])
def test_a_shift_means_the_same_share_of_every_height(height: int, reach: int) -> None:
    columns = torch.arange(height).expand(1, 1, height, height)
    offsets = set()
    for seed in range(600):
        first = int(RollFlip(30, 0.0, size=224)(columns, rng(seed))[0, 0, 0, 0])
        offsets.add((-first + height // 2) % height - height // 2)
    assert (min(offsets), max(offsets)) == (-reach, reach)
    with pytest.raises(ValueError, match="size: expected the height"):
        RollFlip(30, size=0)
