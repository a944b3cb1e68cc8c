"""From `conf/reconstruction/*.yaml` to the module and the datamodule of the reconstruction stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from corrections.execution import output_moments
from datamodules.activations import UnitActivations
from lightning_modules.block_reconstruction import BlockReconstructionModule
from quantizers.convert import Conversion
from quantizers.hessian import ClosedForm
from quantizers.layer import quantized_layers
from reconstruction.activations import ActivationCache
from reconstruction.closed_form import solve_units
from reconstruction.measurement import Measurement
from reconstruction.memory import Residency
from reconstruction.objectives import Normalization, Objective, PowerError, UnitLoss
from reconstruction.partition import Granularity, Unit, partition
from reconstruction.schedules import Phase, seed_of

Phases = Literal["joint", "weights_then_activations", "closed_form", "none"]
Schedule = Literal["sequential", "parallel"]


def build_reconstruction(
    *,
    conversion: Conversion,
    images: Tensor,
    seed: int,
    granularity: Granularity = "block",
    merges: float = 0.25,
    schedule: Schedule = "sequential",
    phases: Phases = "joint",
    iterations: int = 20000,
    activation_iterations: int | None = None,
    batch_size: int = 32,
    drop: float = 0.5,
    regularizer_weight: float = 100.0,
    normalization: Normalization = "entry_error",
    objective: Objective | None = None,
    bias_lr: float | None = None,
    bias_relative: bool = True,
    rates_stated_for: int | None = None,
    holdout: float = 0.0,
    residency: Residency = "auto",
    forward_batch_size: int = 128,
    share: tuple[int, int] = (0, 1),
) -> tuple[BlockReconstructionModule, UnitActivations]:
    """The module and its datamodule; the Trainer needs `module.trainer_arguments()`.

    Where nothing is learned (`module.has_work` is false) the student is hardened here, and the stage is to be skipped;
    roundings in closed form are solved here too, and `module.results` has their rows.

    Args:
        conversion: student with calibrated ranges, and reference.
        images: (N, C, H, W) calibration images, normalised.
        seed: of batches, dropping and held-out images.
        granularity: layer, block, merged, stage or network.
        merges: for "merged", how many pairs of neighbouring blocks are learned jointly; below 1 a share of all pairs.
        schedule: "sequential": a unit reads what the quantized units before it give; "parallel": what the float ones
            give, so that units do not depend on each other.
        phases: "joint": weights and activation steps together; "weights_then_activations": the weights of all units
            with float activations, then the activation steps of all units; "closed_form": roundings that are solved
            for (GPTQ, OBQ), unit by unit, activation steps as calibrated; "none": nothing is learned.
        iterations: steps per unit for the weights, or jointly.
        activation_iterations: steps per unit of the second phase; None: a quarter of `iterations`, as BRECQ.
        batch_size: images per step.
        drop: QDrop's probability of an element to stay float; 0 switches it off.
        regularizer_weight: of the mean rounding penalty, against an error that starts near 1.
        normalization: see `UnitLoss`.
        objective: the error of a unit; None: the squared error.
        bias_lr: learning rate of biases; None leaves them.
        bias_relative: whether it is a share of the deviation of the layer's float outputs, measured on the first
            `forward_batch_size` images; otherwise it is in their unit.
        rates_stated_for: steps that learning rates are meant for, but for quantizers that say so themselves; with fewer
            they are raised.
        holdout: share of the images that is never learned from.
        residency: where activations are kept: auto, device, cpu, half or disk.
        forward_batch_size: images per forward between units.
        share: (i, n): the i-th of n shares of the units, with schedule "parallel".

    Raises:
        ValueError: if a choice is unknown or a number out of its range, or if roundings that are solved in closed form
            meet other phases, or the other way round, or if roundings that start open meet no regularizer.
    """
    second = max(1, iterations // 4) if activation_iterations is None else activation_iterations
    plans: dict[str, list[tuple[Phase, int]]] = {
        "joint": [("joint", iterations)],
        "weights_then_activations": [("weights", iterations), ("activations", second)],
        "closed_form": [],
        "none": [],
    }
    if phases not in plans:
        raise ValueError(f"phases: expected one of {get_args(Phases)}, got {phases!r}")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: expected one of {get_args(Schedule)}, got {schedule!r}")
    if forward_batch_size < 1:
        raise ValueError(f"forward_batch_size: expected at least 1 image, got {forward_batch_size}")
    _expect_a_rounding_for(phases, conversion, regularizer_weight)
    units = partition(conversion.reference, granularity, merges=merges)
    measured = images[:forward_batch_size] if bias_relative else None
    module = BlockReconstructionModule(
        conversion.student,
        units,
        iterations=plans[phases],
        batch_size=batch_size,
        loss=UnitLoss(regularizer_weight, normalization, objective or PowerError()),
        drop=drop,
        bias_rates=None if bias_lr is None else _bias_rates(bias_lr, conversion, measured),
        rates_stated_for=rates_stated_for,
        seed=seed,
        parallel=schedule == "parallel",
        share=share,
    )
    if phases == "closed_form":
        cache = _cache(
            conversion,
            units,
            images,
            residency=residency,
            batch_size=forward_batch_size,
            parallel=schedule == "parallel",
        )
        measurement = Measurement(module.loss, len(images), holdout, seed=seed_of(seed, "holdout"))
        module.results = solve_units(cache, measurement)
    if not module.has_work and share == (0, 1):
        module.harden()
    datamodule = UnitActivations(
        conversion.reference, units, images, residency=residency, batch_size=forward_batch_size, holdout=holdout
    )
    return module, datamodule


def _bias_rates(lr: float, conversion: Conversion, images: Tensor | None) -> dict[str, float]:
    """The rate of every layer's bias: `lr`, or with images `lr` of the deviation of its float outputs on these."""
    layers = [path for path, _ in quantized_layers(conversion.student)]
    if images is None:
        return dict.fromkeys(layers, lr)
    moments = output_moments(conversion.reference, layers, images, len(images))
    # a layer whose module is never called (its weight is read elsewhere) has no outputs, and keeps its bias
    return {path: lr * float(m.var.mean().sqrt()) if m.count else 0.0 for path, m in moments.items()}


def _expect_a_rounding_for(phases: Phases, conversion: Conversion, regularizer_weight: float) -> None:
    """Refuse roundings that would be left at the nearest, or undecided, so that no result bears the wrong name."""
    for path, layer in quantized_layers(conversion.student):
        kind = type(layer.weight_quantizer).__name__
        if isinstance(layer.weight_quantizer, ClosedForm) and phases != "closed_form":
            raise ValueError(
                f"phases: expected 'closed_form' for {kind}, whose roundings are solved and not learned, got "
                f"{phases!r} (layer {path!r}); add reconstruction=closed_form, or choose weight=nearest"
            )
        if not isinstance(layer.weight_quantizer, ClosedForm) and phases == "closed_form":
            raise ValueError(
                f"phases: 'closed_form' expects a rounding that can be solved for, such as weight=gptq or weight=obq, "
                f"got {kind} (layer {path!r}); choose one of these, or another reconstruction"
            )
        learned = phases in ("joint", "weights_then_activations")
        if learned and regularizer_weight == 0 and layer.weight_quantizer.soft_fraction() > 0:
            raise ValueError(
                f"regularizer_weight: expected more than 0 for {kind}, whose roundings nothing else decides, got 0 "
                f"(layer {path!r}); set reconstruction.regularizer_weight=100, or choose a rounding that goes straight "
                "through, such as weight=adaquant or weight=flexround"
            )


def _cache(
    conversion: Conversion,
    units: Sequence[Unit],
    images: Tensor,
    *,
    residency: Residency,
    batch_size: int,
    parallel: bool,
) -> ActivationCache:
    student, reference = conversion.student, conversion.reference
    device = next((t.device for t in (*student.parameters(), *student.buffers())), images.device)
    return ActivationCache(
        reference.to(device),
        student,
        units=units,
        images=images,
        residency=residency,
        batch_size=batch_size,
        device=device,
        parallel=parallel,
    )
