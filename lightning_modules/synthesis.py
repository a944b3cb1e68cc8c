"""Composition of a synthesis from the parts that `conf/generator` names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_modules.bn_alignment import BNAlignmentModule
from lightning_modules.generator import GeneratorModule, OptimizerFactory, ScheduleFactory
from quantizers.fold import fold
from synthesis.criteria import Criterion, LayerWeights
from synthesis.guidance import Guidance
from synthesis.labels import LabelSource
from synthesis.moments import Probe
from synthesis.priors import Prior
from synthesis.sources import SampleSource
from synthesis.statistics import device_of, execution_order
from synthesis.surgery import Surgery
from synthesis.targets import BNTargets, TargetSource
from synthesis.views import View
from synthesis.weight_statistics import WeightGaussian


def build_generator(
    network: nn.Module,
    input_size: tuple[int, int, int],
    *,
    count: int,
    seed: int,
    steps: int,
    batch_size: int | None,
    source: Callable[..., SampleSource],
    optimizer: OptimizerFactory,
    schedule: ScheduleFactory | None = None,
    probe: Probe | None = None,
    criterion: Criterion | None = None,
    layer_weights: LayerWeights | None = None,
    targets: TargetSource | None = None,
    slack: Callable[..., TargetSource] | None = None,
    input_weight: float = 0.0,
    view: View | None = None,
    priors: Mapping[str, Prior | None] | None = None,
    decorrelation: Callable[..., Prior] | None = None,
    guidance: Mapping[str, Guidance | None] | None = None,
    labels: LabelSource | None = None,
    surgery: Surgery | None = None,
    finalize: View | None = None,
    early_stop: int | None = None,
    first_batch: int = 0,
    fold_batch_norm: bool = False,
    channels_last: bool = False,
    compile: bool | str | Callable[..., Any] = False,
    student: Callable[[], nn.Module] | None = None,
) -> GeneratorModule:
    """Compose a generator of `count` images for `network`.

    `batch_size` None stands for L, the number of layers whose statistics are matched. `source` is called with (batch
    size, input size), `slack` with (targets, batch_size=, seed=), `decorrelation` with the weight 1 / L, `student`
    without arguments and only if a term compares with it. `fold_batch_norm` hides the stored statistics from the
    synthesis: it sees convolutions with BatchNorm folded into them. `channels_last` lays its weights out as NHWC, which
    some devices prefer, and `compile` has torch make one function of the pass through it (True: with its default
    backend): the same numbers but for rounding. None leaves a part out, also among `priors` and `guidance`; no targets
    and layer weights stand for BatchNorm's own and uniform ones.

    Raises:
        ValueError: if layer weights do not go with batch size or probe, a surgery is to be compiled, or the backend is
            unknown.
    """
    refuse_compiled_surgery(compile, surgery)
    if fold_batch_norm:
        network = fold(network, torch.zeros(1, *input_size, device=device_of(network))).graph_module
    if channels_last:
        network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    goal = BNTargets() if targets is None else targets
    layers = len(execution_order(network.eval(), input_size, goal.site))
    samples = layers if batch_size is None else batch_size
    if slack is not None:
        goal = slack(goal, batch_size=samples, seed=seed)
    terms = {name: prior for name, prior in (priors or {}).items() if prior is not None}
    if decorrelation is not None:
        terms["decorrelation"] = decorrelation(1 / layers)
    guides = {name: term for name, term in (guidance or {}).items() if term is not None}
    compares = student is not None and any(term.uses_student for term in guides.values())
    how: dict[str, Any] = {"probe": probe, "criterion": criterion, "layer_weights": layer_weights}
    alignment = BNAlignmentModule(network, input_size, targets=goal, input_weight=input_weight, **how)
    # asked here for what it refuses: the first step comes after the targets are measured
    alignment.layer_weights(samples, layers, alignment.probe.reduction, alignment.home)
    return GeneratorModule(
        alignment,
        source(samples, input_size),
        count=count,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        view=view,
        priors=terms,
        guidance=guides,
        labels=labels,
        student=student() if compares and student is not None else None,
        surgery=surgery,
        finalize=finalize,
        early_stop=early_stop,
        compile=("inductor" if compile is True else compile) or None,
        first_batch=first_batch,
        seed=seed,
    )


def refuse_compiled_surgery(compile: bool | str | Callable[..., Any], surgery: Surgery | None) -> None:
    """Raise for what `torch.compile` cannot do: a network that changes at every step, a backend it does not know."""
    if not compile:
        return
    if surgery is not None:
        raise ValueError(
            f"generator.compile, generator.surgery: expected at most one of them, got {compile!r} and "
            f"{type(surgery).__name__}, which changes the network at every step. Set generator.compile=false or "
            "generator.surgery=null"
        )
    if isinstance(compile, str) and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(
            f"generator.compile: expected true, false or a backend of torch.compile, one of {', '.join(known)}; got "
            f"{compile!r}"
        )


def build_dsg(
    network: nn.Module, input_size: tuple[int, int, int], *, sda: bool, lse: bool, sci: bool, **parts: Any
) -> GeneratorModule:
    """`build_generator` with each of DSG's three parts switched on or off.

    Args:
        network, input_size: as there.
        sda: slack distribution alignment: `slack`.
        lse: layer-wise sample enhancement: `layer_weights`; without it every layer counts the same.
        sci: spatial correlation inhibition: `decorrelation`.
        parts: further arguments of `build_generator`.
    """
    for on, name in ((sda, "slack"), (lse, "layer_weights"), (sci, "decorrelation")):
        if not on:
            parts[name] = None
        elif parts.get(name) is None:
            raise ValueError(f"generator.{name}: expected a part to switch on, got none; see conf/generator/dsg.yaml")
    return build_generator(network, input_size, **parts)


def build_noise(
    network: nn.Module, input_size: tuple[int, int, int], *, steps: int = 0, **parts: Any
) -> GeneratorModule:
    """`build_generator` with no step at all, whatever `steps` a sweep over generators sets for the others.

    Its targets are never looked at; those of the convolutions let it work on networks without BatchNorm too.
    """
    arguments: dict[str, Any] = {"targets": WeightGaussian(), **parts}
    return build_generator(network, input_size, steps=0, **arguments)
