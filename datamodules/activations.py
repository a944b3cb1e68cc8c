"""The inputs and targets of the unit being reconstructed, as a datamodule."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytorch_lightning as pl
from torch import Tensor, fx

from datamodules.steps import Steps
from lightning_modules.block_reconstruction import BlockReconstructionModule
from reconstruction.activations import ActivationCache
from reconstruction.memory import Residency
from reconstruction.partition import Unit

log = logging.getLogger(__name__)


class UnitActivations(pl.LightningDataModule):
    """Enters the unit of an epoch when Lightning asks for that epoch's loader; the loader itself only counts.

    The Trainer has to reload loaders every epoch (`BlockReconstructionModule.trainer_arguments`).

    Args:
        reference: the float network.
        units: its partition.
        images: (N, C, H, W) calibration images.
        residency: where activations are kept; see `ActivationCache`.
        batch_size: images per forward between units; it changes no number but by float rounding.
        holdout: share of the images that is never learned from, for an honest error beside the learned one.
    """

    def __init__(
        self,
        reference: fx.GraphModule,
        units: Sequence[Unit],
        images: Tensor,
        *,
        residency: Residency = "auto",
        batch_size: int = 128,
        holdout: float = 0.0,
    ) -> None:
        super().__init__()
        self.reference, self.units, self.images = reference, list(units), images
        self.residency: Residency = residency
        self.batch_size, self.holdout = batch_size, holdout
        self.cache: ActivationCache | None = None

    @property
    def module(self) -> BlockReconstructionModule:
        """The module in training."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, BlockReconstructionModule)
        return module

    def train_dataloader(self) -> Steps:
        """Enter the current epoch's unit, and count its steps."""
        assert self.trainer is not None
        module, epoch = self.module, self.trainer.current_epoch
        module.enter(epoch, self.open_cache(module), holdout=self.holdout)
        return Steps(module.epochs[epoch].iterations)

    def open_cache(self, module: BlockReconstructionModule) -> ActivationCache:
        """The cache of the module's student, made at the first call; says how much it holds and where."""
        if self.cache is None:
            self.cache = ActivationCache(
                self.reference.to(module.device),
                module.student,
                units=self.units,
                images=self.images,
                residency=self.residency,
                batch_size=self.batch_size,
                device=module.device,
                parallel=module.parallel,
                weighted=module.loss.objective.weighted,
            )
            size = self.cache.bytes_expected / 2**20
            log.info("activations of %d images: %.0f MiB, kept on: %s", len(self.images), size, self.cache.residency)
        return self.cache

    def on_exception(self, exception: BaseException) -> None:
        """Leave the student without anything that learning switched."""
        self.module.release()
        self.teardown("fit")

    def teardown(self, stage: str) -> None:
        """Let go of the activations."""
        if self.cache is not None:
            self.cache.close()
        self.cache = None
