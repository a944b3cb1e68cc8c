"""Reconstruction as a plain loop over blocks, written apart from the product: what tests compare it with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from quantizers.adaround import AdaRound
from quantizers.convert import Conversion
from quantizers.layer import ActivationSite, QuantizedLayer, quantizers_of
from quantizers.qdrop import qdrop
from reconstruction.extract import extract
from reconstruction.partition import partition
from reconstruction.schedules import index_batches, seed_of


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """Summed over channels, averaged over positions and then over images."""
    return (y - target).square().sum(1).view(len(y), -1).mean(1).mean()


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
) -> None:
    """The oracle: blocks one after the other, an Adam and its schedules for each, nothing of Lightning."""
    x_q = x_fp = x
    generator = torch.Generator()
    units = partition(conversion.reference, "block")
    with torch.no_grad():
        logits = conversion.reference(x)
    for k, unit in enumerate(units):
        behind = [extract(conversion.reference, other) for other in units[k + 1 :]]
        student, teacher = extract(conversion.student, unit), extract(conversion.reference, unit)
        with torch.no_grad():
            target = teacher(x_fp)[0]

        def tail(z: Tensor, behind: list[fx.GraphModule] = behind) -> Tensor:
            for part in behind:
                (z,) = part(z)
            return z

        rounded = [m.weight_quantizer for m in student.modules() if isinstance(m, QuantizedLayer)]
        active = [m for m in student.modules() if isinstance(m, ActivationSite)]
        groups = [g for q in (*rounded, *(s.quantizer for s in active)) for g in q.parameter_groups()]
        if groups:
            nearest = copy.deepcopy(student)
            for _, quantizer in quantizers_of(nearest):
                quantizer.harden()
            with torch.no_grad():
                at_entry = nearest(x_q)[0]
            weights = fisher_weights(at_entry, tail, logits) if objective == "fisher" else torch.ones_like(target)

            def error_of(y: Tensor, index: Any, *, z: Tensor = target, w: Tensor = weights, tail: Any = tail) -> Tensor:
                if objective == "fisher":
                    return (w[index] * (y - z[index]).square()).sum(1).view(len(y), -1).mean(1).mean()
                if objective == "pd":
                    images = (y - z[index]).square().sum(1).view(len(y), -1).mean(1)
                    return (images + 10.0 * kl(logits[index], tail(y), 4.0)).mean()
                return squared_error(y, z[index])

            with torch.no_grad():
                entry = float(error_of(at_entry, slice(None)))
            optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["lr"]} for g in groups])
            cosine = [g["anneal"] == "cosine" for g in groups]
            factors = [(lambda t, c=c: 0.5 * (1 + math.cos(math.pi * t / iterations)) if c else 1.0) for c in cosine]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            soft = [q for q in rounded if isinstance(q, AdaRound)]
            sizes = [q.V.numel() for q in soft]
            for t, index in enumerate(index_batches(len(x), batch_size, iterations, seed=seed_of(seed, "joint", k))):
                inputs = x_q[index]
                if drop:
                    generator.manual_seed(seed_of(seed, "joint", k, t, 0))
                    inputs = inputs if parallel else qdrop(inputs, x_fp[index], drop, generator)
                    for site in active:
                        site.train()
                        site.drop, site.generator = drop, generator
                error = error_of(student(inputs)[0], index) / entry
                penalty = sum(n / sum(sizes) * q.regularizer(t / iterations) for q, n in zip(soft, sizes, strict=True))
                optimizer.zero_grad()
                (error + 0.1 * penalty).backward()
                optimizer.step()
                schedule.step()
            for quantizer in (*rounded, *(s.quantizer for s in active)):
                quantizer.harden()
            for site in active:
                site.eval()
                site.drop, site.generator = 0.0, None
        with torch.no_grad():
            x_q, x_fp = target if parallel else student(x_q)[0], target
