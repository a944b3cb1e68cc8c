"""Where values of all calibration images are kept, and how batches of them get there and back."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reconstruction.memory import Residency


class Storage:
    """One place for tensors with a row per image.

    Args:
        residency: anything but "auto"; see `ActivationCache`.
        device: where batches are needed.
    """

    def __init__(self, residency: Residency, device: torch.device) -> None:
        assert residency != "auto"
        self.residency, self.device = residency, device

    @property
    def index_device(self) -> torch.device:
        """Where an index into the kept tensors has to be."""
        return self.device if self.residency in ("device", "half") else torch.device("cpu")

    def like(self, batch: Tensor, count: int) -> Tensor:
        """Float32 memory for the values of `count` images, in the memory order of one batch of them.

        A channels-last tensor has to stay one: convolutions would sum in another order.
        """
        order = sorted(range(batch.dim()), key=batch.stride, reverse=True)
        shape = [(count, *batch.shape[1:])[axis] for axis in order]
        return self._empty(shape).permute([order.index(axis) for axis in range(batch.dim())])

    def keep(self, value: Tensor, place: str) -> Tensor:
        """The value in the precision in which unit inputs are kept.

        Raises:
            ValueError: if float16 cannot hold it; `place` says where the value stands.
        """
        if self.residency != "half" or value.dtype == torch.float16:
            return value
        half = value.half()
        if not bool(torch.isfinite(half).all()):
            raise ValueError(
                f"residency: 'half' holds numbers up to 65504, but a value in front of unit "
                f"{place!r} reaches {float(value.abs().max()):.3g}; use 'cpu' or 'disk'"
            )
        return half

    def pick(self, value: Tensor, index: Tensor | slice) -> Tensor:
        """A float32 copy on the device of some images' values."""
        chosen = value[index].to(self.device, torch.float32)
        # A slice is a view; a module that works in place must not reach what is kept.
        return chosen.clone() if isinstance(index, slice) and chosen.dtype == value.dtype else chosen

    def _empty(self, shape: Sequence[int]) -> Tensor:
        if self.residency != "disk":
            return torch.empty(shape, device=self.index_device)
        with tempfile.TemporaryDirectory(prefix="calibrant-activations-") as folder:
            # The mapping outlives its directory entry: the file goes when the tensor does, also after a crash.
            path = str(Path(folder) / "values.bin")
            return torch.from_file(path, shared=True, size=torch.Size(shape).numel()).view(shape)
