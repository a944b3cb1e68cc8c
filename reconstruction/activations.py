"""What goes into the unit being learned, and what should come out of it, for all calibration images.

Student values are those of the units before it as they will be deployed, weights and activations quantized (the
asymmetric reconstruction of Nagel et al., "AdaRound", ICML 2020, arXiv 2004.10568, eq. 25); targets are the float
network's on float inputs.
Going from one unit to the next costs one forward of that unit in either network. In the parallel schedule of Hubara et
al. (AdaQuant, arXiv 2006.10518) every unit reads the float network's values instead, so that none depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, fx

from reconstruction.extract import Cutter, tensor_name
from reconstruction.memory import Residency, choose_residency, estimate_bytes
from reconstruction.partition import Unit
from reconstruction.storage import Storage
from reconstruction.tail import Tail


class Piece(NamedTuple):
    """One unit of one of the two networks: the module, and the values it reads and returns by node name."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class ActivationCache:
    """Inputs and targets of one unit at a time; `enter(k)` moves it to unit `k`.

    Args:
        reference: the float network.
        student: its quantized copy; its units before the current one have to be final.
        units: the chain from `partition(reference, ...)`.
        images: (N, C, H, W) calibration images.
        residency: where values are kept: "device"; "cpu"; "disk" (memory-mapped files); "half" (float16 on the device,
            targets stay float32; the only choice that changes numbers); "auto": the first of device, cpu and disk
            that has room.
        batch_size: images per forward when going on to the next unit.
        device: where units run.
        parallel: whether student values are the float network's too.
        weighted: whether each target gets weights of its own size (`weights`), which have to find room.

    Attributes:
        weights: a weight for every number of `targets`, in their order, where the objective keeps some; dropped with
            the unit.

    Raises:
        ValueError: if there are no images, `batch_size` is not positive or the residency is unknown.
    """

    def __init__(
        self,
        reference: fx.GraphModule,
        student: fx.GraphModule,
        *,
        units: Sequence[Unit],
        images: Tensor,
        residency: Residency = "auto",
        batch_size: int = 128,
        device: torch.device | str = "cpu",
        parallel: bool = False,
        weighted: bool = False,
    ) -> None:
        if images.dim() < 2 or len(images) == 0:
            raise ValueError(f"images: expected (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
        self.units = list(units)
        self.cutters = {"student": Cutter(student), "teacher": Cutter(reference)}
        self.images = images
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.parallel = parallel
        self.bytes_expected = estimate_bytes(reference, self.units, len(images), parallel=parallel, weighted=weighted)
        self.residency = choose_residency(residency, self.bytes_expected, self.device)
        self.storage = Storage(self.residency, self.device)
        self.peak_bytes = 0
        self.version = 0
        self.position: int | None = None
        self._read: dict[str, dict[str, int]] = {"student": {}, "teacher": {}}
        self._values: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        self._pieces: tuple[int | None, dict[str, Piece]] = (None, {})
        self._tail: tuple[int | None, Tail | None] = (None, None)
        self._logits: Tensor | None = None
        self.weights: list[Tensor] = []
        for side, cutter in self.cutters.items():
            for k, unit in enumerate(self.units):
                self._read[side] |= dict.fromkeys(cutter.interface(unit).inputs, k)

    def enter(self, index: int, version: int = 0) -> None:
        """Make unit `index` the current one; nothing happens if it is already.

        Goes on from the unit before, or starts again from the images: when going back, and when `version` changes,
        which says that the student's earlier units do (another phase). Values depend on the weights alone, never on
        the way here, so a resumed run sees the same bits.

        Raises:
            ValueError: if there is no such unit.
        """
        if not 0 <= index < len(self.units):
            raise ValueError(f"index: expected a unit from 0 to {len(self.units) - 1}, got {index}")
        if version != self.version or self.position is None or index < self.position:
            self._restart(version)
        assert self.position is not None
        while self.position < index:
            self._leave(self.position)
            self._arrive(self.position + 1)

    @property
    def student_inputs(self) -> list[Tensor]:
        """The current unit's inputs in the student, each (N, ...), as they are kept."""
        if self.parallel:
            return self.teacher_inputs
        return [self._values["student"][name] for name in self._piece("student").inputs]

    @property
    def teacher_inputs(self) -> list[Tensor]:
        """The same tensors in the float network, in the same order."""
        nodes = self.cutters["student"].nodes
        names = [tensor_name(nodes[name]) for name in self._piece("student").inputs]
        return [self._values["teacher"][name] for name in names]

    @property
    def targets(self) -> list[Tensor]:
        """What the current unit returns in the float network."""
        return [self._values["teacher"][name] for name in self._piece("teacher").outputs]

    @property
    def student_input(self) -> Tensor:
        """The first of `student_inputs`; blocks have just one."""
        return self.student_inputs[0]

    @property
    def teacher_input(self) -> Tensor:
        """The first of `teacher_inputs`."""
        return self.teacher_inputs[0]

    @property
    def target(self) -> Tensor:
        """The first of `targets`."""
        return self.targets[0]

    @property
    def logits(self) -> Tensor:
        """What the float network returns, (N, classes); computed once for all units."""
        if self._logits is None:
            self._logits = self._compute_logits()
        return self._logits

    @property
    def tail(self) -> Tail:
        """The float network behind the current unit."""
        assert self.position is not None, "enter a unit first"
        place, tail = self._tail
        if tail is None or place != self.position:
            nodes = self.cutters["student"].nodes
            outputs = [tensor_name(nodes[name]) for name in self._piece("student").outputs]
            tail = Tail(self.cutters["teacher"], units=self.units, index=self.position, outputs=outputs)
            self._tail = (self.position, tail)
        return tail

    def tail_inputs(self, index: Tensor | slice) -> list[Tensor]:
        """Of some images, the student's values that the tail reads besides what the current unit returns."""
        if not self.tail.reads:
            return []
        side = "teacher" if self.parallel else "student"
        nodes = self.cutters[side].nodes
        # Of a tensor and its quantized copy the later one stands, which is what the student goes on with.
        values = {tensor_name(nodes[name]): value for name, value in self._values[side].items()}
        return self.pick((values[name] for name in self.tail.reads), index)

    @property
    def student_module(self) -> fx.GraphModule:
        """The current unit of the student, sharing its modules."""
        return self._piece("student").module

    @property
    def index_device(self) -> torch.device:
        """Where an index into the kept tensors has to be."""
        return self.storage.index_device

    def pick(self, tensors: Iterable[Tensor], index: Tensor | slice) -> list[Tensor]:
        """Float32 copies on the device of some images' values."""
        return [self.storage.pick(tensor, index) for tensor in tensors]

    def slices(self) -> list[slice]:
        """All images in batches, always cut alike."""
        edges = [*range(0, len(self.images), self.batch_size), len(self.images)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def close(self) -> None:
        """Let go of all values."""
        self._forget()
        self._logits = None

    def _piece(self, side: str) -> Piece:
        assert self.position is not None, "enter a unit first"
        if self._pieces[0] != self.position:
            unit = self.units[self.position]
            pieces = {side: Piece(c.extract(unit), *c.interface(unit)) for side, c in self.cutters.items()}
            self._pieces = (self.position, pieces)
        return self._pieces[1][side]

    def _restart(self, version: int) -> None:
        self._forget()
        self.version = version
        images = self._keep(self.images.to(self.index_device, torch.float32))
        (name,) = self.units[0].inputs
        self._values = {"student": {name: images}, "teacher": {name: images}}
        self._arrive(0)

    def _arrive(self, index: int) -> None:
        """Compute the targets of unit `index`, whose inputs are here."""
        self.position = index
        self._run("teacher")

    def _leave(self, index: int) -> None:
        """Compute what the student's unit returns, and drop what no later unit reads."""
        self.weights = []
        if not self.parallel:
            self._run("student")
        for side, values in self._values.items():
            alive = {n: v for n, v in values.items() if self._read[side].get(n, -1) > index}
            self._values[side] = {name: self._keep(value) for name, value in alive.items()}

    @torch.no_grad()
    def _run(self, side: str) -> None:
        piece, values = self._piece(side), self._values[side]
        inputs = [values[name] for name in piece.inputs]
        results = self._collect(piece.outputs, lambda part: piece.module(*self.pick(inputs, part)))
        values.update(zip(piece.outputs, results, strict=True))
        kept = {id(t): t.nbytes for side_values in self._values.values() for t in side_values.values()}
        self.peak_bytes = max(self.peak_bytes, sum(kept.values()))

    @torch.no_grad()
    def _compute_logits(self) -> Tensor:
        network = self.cutters["teacher"].graph_module
        (logits,) = self._collect(["logits"], lambda part: (network(*self.pick([self.images], part)),))
        return logits

    def _collect(self, names: Sequence[str], run: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
        """What `run` returns for all images, in batches."""
        results: list[Tensor] = []
        for part in self.slices():
            for i, (name, output) in enumerate(zip(names, run(part), strict=True)):
                if len(results) == i:
                    self._check(name, output, part)
                    results.append(self.storage.like(output, len(self.images)))
                results[i][part] = output
        return results

    def _check(self, name: str, output: Tensor, part: slice) -> None:
        if output.dim() == 0 or len(output) != part.stop - part.start:
            raise ValueError(
                f"granularity: the value {name!r} that leaves unit {self.units[self.position or 0].name!r} has shape "
                f"{tuple(output.shape)} for {part.stop - part.start} images; expected one row per image. "
                "Choose a coarser granularity (block, stage or network)."
            )

    def _forget(self) -> None:
        self.position = None
        self._values = {"student": {}, "teacher": {}}
        self._pieces, self._tail, self.weights = (None, {}), (None, None), []

    def _keep(self, value: Tensor) -> Tensor:
        return self.storage.keep(value, self.units[self.position or 0].name)
