"""Learns a student's roundings and steps unit by unit, so that each unit's output meets the teacher's.

Block reconstruction: Li et al., "BRECQ", ICLR 2021, arXiv 2102.05426; random dropping of activation quantization:
Wei et al., "QDrop", ICLR 2022, arXiv 2203.05740; layer by layer: Nagel et al., "AdaRound", ICML 2020, arXiv
2004.10568. We deviate in the loss: error and regularizer do not depend on the unit's size (`UnitLoss`).

An epoch of the Trainer is one unit in one phase. The numbers are those of a plain loop over units with one Adam each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, fx

from quantizers.layer import quantizers_of
from quantizers.qdrop import qdrop
from reconstruction.activations import ActivationCache
from reconstruction.learnables import learnables_of
from reconstruction.measurement import Measurement, as_soft, relative, warn_of
from reconstruction.objectives import UnitLoss
from reconstruction.optimizer import adam_for_all, expect_rates, plan
from reconstruction.partition import Unit
from reconstruction.schedules import Epoch, Phase, index_batches, seed_of
from reconstruction.shares import epochs_of_share
from reconstruction.switches import Switches

LOG_EVERY = 50  # steps; a log line in every step would cost more than the step of a small unit


class BlockReconstructionModule(pl.LightningModule):
    """Automatic optimisation with one Adam for all units; `UnitActivations` enters each unit and brings its inputs.

    Attributes:
        has_work: whether anything can be learned; without it, skip the stage.
        results: a row for each finished epoch: `unit`, `phase`, errors as shares of the power of the unit's target
            (`error_nearest` at entry with every rounding to the nearest, `error_soft` as learned, `error_hard` as
            deployed; the same with `_holdout` where images are held out), `soft_fraction`, `seconds`.

    Args:
        student: the calibrated student.
        units: the chain from `partition(reference, ...)`.
        iterations: (phase, steps per unit) in their order.
        batch_size: images per step, shared among the processes.
        loss: objective, its normalisation, and the weight of the rounding regularizer.
        drop: probability of an element to stay float, in a unit's input and at its sites; 0 switches QDrop off.
        bias_rates: learning rate of the bias of each quantized layer, by its path; None leaves biases.
        rates_stated_for: steps that the learning rates are meant for; see `adam_for_all`.
        seed: of index batches, dropping and held-out images.
        parallel: whether every unit reads the float network's values (QDrop then mixes nothing into its input).
        share: (i, n): learn only every n-th unit from the i-th on, of those with something to learn; needs `parallel`.

    Raises:
        ValueError: if a number is out of its range.
    """

    stage = "reconstruction"

    def __init__(
        self,
        student: fx.GraphModule,
        units: Sequence[Unit],
        *,
        iterations: Sequence[tuple[Phase, int]],
        batch_size: int = 32,
        loss: UnitLoss | None = None,
        drop: float = 0.5,
        bias_rates: Mapping[str, float] | None = None,
        rates_stated_for: int | None = None,
        seed: int = 0,
        parallel: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1 image, got {batch_size}")
        self.student, self.units = student, list(units)
        self.batch_size, self.loss, self.drop, self.seed = batch_size, loss or UnitLoss(), drop, seed
        self.rates_stated_for, self.parallel, self.share = rates_stated_for, parallel, share
        self.learnables = learnables_of(student, self.units, bias_rates=bias_rates)
        expect_rates(self.learnables, rates_stated_for)
        self.epochs = epochs_of_share(plan(iterations, self.learnables), self.learnables, share, parallel=parallel)
        self.switches = Switches(student, self.learnables, drop)
        self.results: list[dict[str, Any]] = []
        self.entries: list[dict[str, float]] = []  # of each epoch begun: its errors before the first step
        self.entry_state: list[Tensor] = []  # the unit in work before the first step, where the objective looks at it
        self.current: int | None = None
        self.running = False
        self.student.eval()
        for epoch in self.epochs:
            for parameter in self.learnables[epoch.unit].parameters(epoch.phase):
                parameter.requires_grad_(True)

    @property
    def has_work(self) -> bool:
        """Whether anything can be learned."""
        return bool(self.epochs)

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return sum(epoch.iterations for epoch in self.epochs)

    @property
    def progress_label(self) -> str:
        """The unit in work."""
        if self.current is None:
            return ""
        epoch = self.epochs[self.current]
        return f"{self.units[epoch.unit].name} ({self.current + 1}/{len(self.epochs)})"

    def trainer_arguments(self) -> dict[str, Any]:
        """What a Trainer for this module needs: an epoch for each unit and phase, each with a loader of its own."""
        shortest = min((epoch.iterations for epoch in self.epochs), default=1)
        return {
            "max_epochs": len(self.epochs),
            "reload_dataloaders_every_n_epochs": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "log_every_n_steps": min(50, shortest),
        }

    def configure_optimizers(self) -> Any:
        """One Adam for all units; see `adam_for_all`."""
        optimizer, schedule = adam_for_all(self.epochs, self.learnables, rates_stated_for=self.rates_stated_for)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def enter(self, index: int, cache: ActivationCache, *, holdout: float = 0.0) -> None:
        """Make `index` the current epoch: earlier ones finished, its inputs cached, its quantizers ready to learn.

        Idempotent, and the only place where a unit is begun: Lightning calls no epoch hook when it resumes inside one.
        """
        self.cache = cache
        seed = seed_of(self.seed, "holdout")
        self.measurement = Measurement(self.loss, len(cache.images), holdout, seed=seed)
        self.finish_before(index)
        self._open(index)
        if not self.running:
            self.train()  # Lightning warns of modules in evaluation mode; `on_train_start` puts them back

    def finish_before(self, index: int) -> None:
        """Finish every epoch before `index` that was trained but whose end no hook has seen."""
        for earlier in range(len(self.results), index):
            self._open(earlier)
            self._finish(earlier)

    def on_train_start(self) -> None:
        """Put every module into evaluation mode, but for the sites that drop."""
        self.running = True
        self.switches.learn(self._epoch.phase, self._epoch.unit, self.generator)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss of step `batch_idx` of the current unit; its draws depend on (seed, phase, unit, step) only."""
        epoch, cache, index = self._epoch, self.cache, self.batches[batch_idx]
        inputs = cache.pick(cache.student_inputs, index)
        if self.drop > 0:
            self.generator.manual_seed(seed_of(self.seed, epoch.phase, epoch.unit, batch_idx, self.global_rank))
        if self.drop > 0 and not self.parallel:
            floats = cache.pick(cache.teacher_inputs, index)
            inputs = [qdrop(q, x, self.drop, self.generator) for q, x in zip(inputs, floats, strict=True)]
        outputs = cache.student_module(*inputs)
        loss = self.loss.objective.errors(cache, outputs, index).mean() / self.normalizer
        if epoch.phase != "activations":
            progress = batch_idx / epoch.iterations
            loss = loss + self.loss.regularizer_weight * self.learnables[epoch.unit].regularizer(progress)
        if batch_idx % LOG_EVERY == 0:
            self._log({"reconstruction/loss": float(loss.detach())})
        return loss

    def on_train_epoch_end(self) -> None:
        """Harden the unit, and report it."""
        assert self.current is not None
        self._finish(self.current)

    def on_train_end(self) -> None:
        """Leave a student that computes as it will be deployed."""
        self.finish_before(self.trainer.current_epoch)
        self.release()
        if len(self.results) == len(self.epochs) and self.share == (0, 1):
            self.harden()

    def release(self) -> None:
        """Undo what learning switched in the student: dropping, disabled sites, modes; also after an exception."""
        self.running = False
        self.current = None
        self.switches.deploy()

    def harden(self) -> None:
        """Make every decision in the student final, and nothing in it learnable."""
        for _, quantizer in quantizers_of(self.student):
            quantizer.harden()
        self.student.requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rows, and the errors at entry, which cannot be measured again."""
        facts = {"results": self.results, "entries": self.entries, "entry_state": self.entry_state}
        checkpoint["reconstruction"] = facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self.results = list(checkpoint["reconstruction"]["results"])
        self.entries = list(checkpoint["reconstruction"]["entries"])
        self.entry_state = list(checkpoint["reconstruction"]["entry_state"])

    @property
    def _share(self) -> dict[str, int]:
        return {"process": self.global_rank, "processes": self.trainer.world_size}

    @property
    def _epoch(self) -> Epoch:
        assert self.current is not None
        return self.epochs[self.current]

    def _open(self, index: int) -> None:
        if self.current == index:
            return
        self.current, self.started = index, time.monotonic()
        epoch = self._epoch
        for earlier in range(len(self.results)):
            self._freeze(self.epochs[earlier])
        self.switches.deploy(epoch.phase)
        self.cache.enter(epoch.unit, version=int(epoch.phase == "activations"))
        self._measure_entry(index)
        entry = self.entries[index]
        self.normalizer = self.loss.normalizer(entry_error=entry["error_nearest"], power=entry["power"])
        kept, seed = self.measurement.kept, seed_of(self.seed, epoch.phase, epoch.unit)
        order = index_batches(len(kept), self.batch_size, epoch.iterations, seed=seed, **self._share)
        self.batches = kept[order].to(self.cache.index_device)
        self.generator = torch.Generator(self.device)
        self.switches.learn(epoch.phase, epoch.unit, self.generator)

    def _measure_entry(self, index: int) -> None:
        """Errors before the first step, and what the objective keeps: of the unit as it was then, also on resuming."""
        learnables, weighted = self.learnables[self._epoch.unit], self.loss.objective.weighted
        first = len(self.entries) == index
        if first:
            self.entry_state = learnables.state() if weighted else []
        elif not weighted:
            return
        entry = self.measurement.entry(self.cache, learnables, self.entry_state or None)
        if first:
            self.entries.append(entry)

    def _finish(self, index: int) -> None:
        epoch, entry = self.epochs[index], self.entries[index]
        learnables = self.learnables[epoch.unit]
        self.switches.deploy(epoch.phase)
        soft_fraction = learnables.soft_fraction()
        soft = self.measurement.errors(self.cache, "soft") if soft_fraction else {}
        learnables.harden()
        hard = self.measurement.errors(self.cache, "hard")
        errors = entry | (soft or as_soft(hard)) | hard
        row = relative(errors) | {"soft_fraction": soft_fraction, "seconds": time.monotonic() - self.started}
        name = self.units[epoch.unit].name
        self._log({f"reconstruction/{name}/{key}": value for key, value in row.items()})
        warn_of(name, row)
        self.results.append({"unit": name, "phase": epoch.phase} | row)
        self._freeze(epoch)

    def _freeze(self, epoch: Epoch) -> None:
        for parameter in self.learnables[epoch.unit].parameters(epoch.phase):
            parameter.requires_grad_(False)
            parameter.grad = None
            for optimizer in self.trainer.optimizers:
                optimizer.state.pop(parameter, None)

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
