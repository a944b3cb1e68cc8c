"""Reconstruction as a plain loop over blocks, written apart from the product: what tests compare it with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from quantizers.adaround import AdaRound
from quantizers.convert import Conversion
from quantizers.genie_m import GenieM
from quantizers.layer import ActivationSite, QuantizedLayer, quantizers_of, sites
from quantizers.qdrop import qdrop
from reconstruction.extract import Cutter, extract, tensor_name
from reconstruction.partition import Granularity, partition
from reconstruction.schedules import Phase, index_batches, seed_of

Outputs = tuple[Tensor, ...]  # of a unit: as many as are read behind it


def error_power(difference: Tensor, objective: str) -> Tensor:
    """Of each element."""
    return difference.abs().pow(2.4) if objective == "lp" else difference.square()


def kl(teacher: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each image."""
    p, q = (teacher / temperature).log_softmax(1), (logits / temperature).log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def fisher_weights(z: Tensor, tail: Callable[[Tensor], Tensor], teacher: Tensor) -> Tensor:
    """Squared gradients of the divergence at `z`, of mean 1."""
    z = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(kl(teacher, tail(z), 1.0).sum(), z)
    mean = g.double().square().flatten(1).sum(1).mean() / g[0].numel()
    return (g / float(mean.sqrt())).square()


ANNEALED: dict[str, Callable[..., float]] = {
    "constant": lambda t, steps: 1.0,
    "cosine": lambda t, steps: 0.5 * (1 + math.cos(math.pi * t / steps)),
    "linear": lambda t, steps: 1 - t / steps,
}


def options_of(group: dict[str, Any], iterations: int, rates_stated_for: int | None) -> dict[str, Any]:
    """What Adam is told of a group: its rate for so many steps, and its own decays if it has any."""
    stated_for = group.get("stated_for") or rates_stated_for
    factor = 1.0 if stated_for is None else min(50.0, max(1.0, stated_for / iterations))
    lr = group["lr"] / iterations if group.get("over_steps") else factor * group["lr"]
    return {"params": group["params"], "lr": lr} | {key: group[key] for key in ("betas", "eps") if key in group}


def plain_loop(
    conversion: Conversion,
    x: Tensor,
    *,
    iterations: int,
    batch_size: int,
    drop: float,
    seed: int,
    objective: str = "mse",
    parallel: bool = False,
    granularity: Granularity = "block",
    merges: float = 1,
    bias_lr: float | None = None,
    rates_stated_for: int | None = None,
    phase: Phase = "joint",
) -> None:
    """The oracle: units one after the other, an Adam and its schedules for each, nothing of Lightning.

    Of two phases each is a call: the first with activations as they are, the second once all weights are rounded.
    """
    generator = torch.Generator()
    units = partition(conversion.reference, granularity, merges=merges)
    switched = [site for _, site in sites(conversion.student) if site.enabled] if phase == "weights" else []
    for site in switched:
        site.enabled = False
    cutters = Cutter(conversion.student), Cutter(conversion.reference)
    quantized, floats = ({units[0].inputs[0]: x} for _ in range(2))  # what has been computed, by the tensor's name
    with torch.no_grad():
        logits = conversion.reference(x)
    for k, unit in enumerate(units):
        behind = [extract(conversion.reference, other) for other in units[k + 1 :]]
        student, teacher = extract(conversion.student, unit), extract(conversion.reference, unit)
        x_q, x_fp = (
            [seen[tensor_name(cutter.nodes[name])] for name in cutter.interface(unit).inputs]
            for cutter, seen in zip(cutters, (quantized, floats), strict=True)
        )
        with torch.no_grad():
            target = teacher(*x_fp)

        def tail(z: Tensor, behind: list[fx.GraphModule] = behind) -> Tensor:
            for part in behind:
                (z,) = part(z)
            return z

        rounded = [m.weight_quantizer for m in student.modules() if isinstance(m, QuantizedLayer)]
        active = [m for m in student.modules() if isinstance(m, ActivationSite)]
        groups = [g for q in rounded for g in q.parameter_groups()] if phase != "activations" else []
        if bias_lr is not None:
            layers = [m for m in student.modules() if isinstance(m, QuantizedLayer) and m.bias is not None]
            groups += [{"params": [layer.bias.requires_grad_()], "lr": bias_lr, "anneal": "cosine"} for layer in layers]
        groups += [g for s in active for g in s.quantizer.parameter_groups()] if phase != "weights" else []
        if groups:
            nearest = copy.deepcopy(student)
            for _, quantizer in quantizers_of(nearest):
                quantizer.harden()
            with torch.no_grad():
                at_entry = nearest(*x_q)
            weights = fisher_weights(at_entry[0], tail, logits) if objective == "fisher" else None

            def error_of(
                ys: Outputs, index: Any, *, zs: Outputs = target, w: Tensor | None = weights, tail: Any = tail
            ) -> Tensor:
                y, z = ys[0], zs[0]
                if w is not None:
                    return (w[index] * (y - z[index]).square()).sum(1).view(len(y), -1).mean(1).mean()
                powers = [error_power(y - z[index], objective) for y, z in zip(ys, zs, strict=True)]
                images = [power.sum(1).view(len(y), -1).mean(1) for power in powers]
                if objective == "pd":
                    return (images[0] + 10.0 * kl(logits[index], tail(y), 4.0)).mean()
                return torch.stack(images).sum(0).mean()

            with torch.no_grad():
                entry = float(error_of(at_entry, slice(None)))
            optimizer = torch.optim.Adam([options_of(g, iterations, rates_stated_for) for g in groups])
            factors = [partial(ANNEALED[g["anneal"]], steps=iterations) for g in groups]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            soft = [q for q in rounded if isinstance(q, AdaRound | GenieM) and phase != "activations"]
            sizes = [q.V.numel() for q in soft]
            for t, index in enumerate(index_batches(len(x), batch_size, iterations, seed=seed_of(seed, phase, k))):
                inputs = [q[index] for q in x_q]
                if drop:
                    generator.manual_seed(seed_of(seed, phase, k, t, 0))
                    if not parallel:
                        inputs = [qdrop(q, z[index], drop, generator) for q, z in zip(inputs, x_fp, strict=True)]
                    for site in active:
                        site.train()
                        site.drop, site.generator = drop, generator
                error = error_of(student(*inputs), index) / entry
                penalty = sum(n / sum(sizes) * q.regularizer(t / iterations) for q, n in zip(soft, sizes, strict=True))
                optimizer.zero_grad()
                (error + 0.1 * penalty).backward()
                optimizer.step()
                for group in groups:
                    for parameter in group["params"] if "bounds" in group else ():
                        parameter.data.clamp_(*group["bounds"])
                schedule.step()
            for quantizer in (*rounded, *(s.quantizer for s in active if phase != "weights")):
                quantizer.harden()
            for site in active:
                site.eval()
                site.drop, site.generator = 0.0, None
        with torch.no_grad():
            floats |= zip(unit.outputs, target, strict=True)
            quantized |= zip(unit.outputs, target if parallel else student(*x_q), strict=True)
    for site in switched:
        site.enabled = True
