"""GZSQ and our propagated moments on a CIFAR ResNet, from its weights alone: targets and losses as plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import norm as normal
from torch import Tensor, nn

from tests.contract.first_step import FirstStep, moments

Targets = dict[str, tuple[np.ndarray, np.ndarray]]  # mean and variance of what leaves a convolution, BatchNorm folded


def affine(network: nn.Module, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight (C', C, positions), and scale and shift of the BatchNorm behind it."""
    layer: Any = network.get_submodule(path)
    norm: Any = network.get_submodule(path.replace("conv", "bn"))
    gamma, beta, mean, var = (
        t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = gamma / np.sqrt(var + norm.eps)
    return layer.weight.detach().double().flatten(2).numpy(), scale, beta - mean * scale


def summed_gaussians(network: nn.Module, paths: list[str], channels: int) -> Targets:
    """mu(n+1) = mu_Wfold + b_fold + mu(n), s(n+1)^2 = s_Wfold^2 + s(n)^2; mean + min where the channels change."""
    mean, std = [0.0] * channels, [1.0] * channels
    found: Targets = {}
    for path in paths:
        weight, scale, shift = affine(network, path)
        if len(weight) != len(mean):
            mean, std = ([sum(v) / len(v) + min(v)] * len(weight) for v in (mean, std))
        filters = [(weight[c] * scale[c]).ravel() for c in range(len(weight))]
        mean = [f.mean() + b + m for f, b, m in zip(filters, shift, mean, strict=True)]
        std = [math.hypot(f.std(), s) for f, s in zip(filters, std, strict=True)]
        found[path] = np.array(mean), np.array(std) ** 2
    return found


def z_distance(x: Tensor, mu: np.ndarray, sigma2: np.ndarray) -> float:
    """|| (m - mu) / sqrt((s + eps)^2 + (sigma + eps)^2) ||_2 of one image."""
    mean, var, _ = (t.numpy() for t in moments(x))
    s, sigma = np.sqrt(var + 1e-6) + 1e-6, np.sqrt(sigma2 + 1e-6) + 1e-6
    return float(np.sqrt(np.sum((mean - mu) ** 2 / (s**2 + sigma**2))))


def gzsq(s: FirstStep) -> dict[str, float]:
    channels = s.images.shape[1]
    targets = summed_gaussians(s.teacher, list(s.convolutions), channels)
    layers = at_input = 0.0
    for image in range(len(s.images)):
        for path, x in s.convolutions.items():
            layers += z_distance(x[image : image + 1], *targets[path])
        at_input += z_distance(s.images[image : image + 1], np.zeros(channels), np.ones(channels))
    return {"alignment": layers / len(s.images), "input": at_input / len(s.images)}


def clipped(mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of ReLU(N(mean, var))."""
    std = np.sqrt(var)
    first = mean * normal.cdf(mean / std) + std * normal.pdf(mean / std)
    second = (mean**2 + var) * normal.cdf(mean / std) + mean * std * normal.pdf(mean / std)
    return first, second - first**2


def independent_moments(network: nn.Module, channels: int) -> Targets:
    """From N(0, 1) pixels through the stem and every residual block with its shortcut of zeros."""
    found: Targets = {}

    def layer(path: str, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight, scale, shift = affine(network, path)
        found[path] = weight.sum(2) @ mean * scale + shift, (weight**2).sum(2) @ var * scale**2
        return found[path]

    x = clipped(*layer("conv1", np.zeros(channels), np.ones(channels)))
    for stage in ("layer1", "layer2", "layer3"):
        blocks: Any = network.get_submodule(stage)
        for index in range(len(blocks)):
            inner = layer(f"{stage}.{index}.conv2", *clipped(*layer(f"{stage}.{index}.conv1", *x)))
            missing = (len(inner[0]) - len(x[0])) // 2
            mean, var = (a + np.pad(b, missing) for a, b in zip(inner, x, strict=True))
            x = clipped(mean, var)
    return found


def propagated(s: FirstStep) -> dict[str, float]:
    """sum_l [ ||m - mu||^2 + ||s - sigma||^2 ] / C_l, and the same at the image against N(0, 1)."""
    channels = s.images.shape[1]
    targets = independent_moments(s.teacher, channels)

    def squared(x: Tensor, mu: np.ndarray, sigma2: np.ndarray) -> float:
        mean, var, _ = (t.numpy() for t in moments(x))
        return float(np.mean((mean - mu) ** 2 + (np.sqrt(var + 1e-6) - np.sqrt(sigma2 + 1e-6)) ** 2))

    return {
        "alignment": sum(squared(x, *targets[path]) for path, x in s.convolutions.items()),
        "input": squared(s.images, np.zeros(channels), np.ones(channels)),
    }
