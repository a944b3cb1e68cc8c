"""Where the widths of a job's layers come from: the same everywhere, a file, or a search under budgets.

Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv 2006.10518.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from allocation.groups import Bits, bits_of
from allocation.monotone import Measured
from allocation.resources import Solution
from callbacks import report
from callbacks.allocation_plot import save_allocation
from datamodules.calibration import CalibrationImages
from deployment.whole_file import whole_file
from lightning_modules.run_folders import read_yaml
from networks.teachers import Teacher
from quantizers.convert import Conversion

if TYPE_CHECKING:
    from lightning_modules.job import Job
    from lightning_modules.stored_sensitivity import Bench

FILE = "allocation.yaml"


class Allocation(ABC):
    """A choice of how widths are found. `name`: stands in the results; `searches`: whether it needs images."""

    name: str
    searches = False

    @abstractmethod
    def known(self) -> Bits | None:
        """The widths, where they are known before any work; None: those of the job, or still to be found."""

    def find(self, job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> Bits:
        """The widths; a search leaves `allocation.yaml`, its tables and its picture in the job's folder."""
        return self.known() or {}

    def expect_images(self, origin: str) -> None:
        """Refuse, before any work is done, a search without images to measure on."""
        if self.searches and origin == "none":
            raise ValueError(
                f"allocation: expected uniform or from_file with calibration=none, which gives no images to measure "
                f"on, got {self.name}; choose calibration=synthetic"
            )


class Uniform(Allocation):
    """The job's own widths for all layers but those that the protocol exempts."""

    name = "uniform"

    def known(self) -> Bits | None:
        """None: the job's."""
        return None


class FromFile(Allocation):
    """The widths that an earlier run chose.

    Args:
        path: its `allocation.yaml`.
    """

    name = "from_file"

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def known(self) -> Bits:
        """See `read_bits`."""
        if self.path is None:
            raise ValueError("allocation.path: expected the allocation.yaml of an earlier run, got none")
        return read_bits(Path(self.path))


def read_bits(path: Path) -> Bits:
    """The widths in an allocation file.

    Raises:
        ValueError: if the file is missing or holds anything else than two widths for each layer.
    """
    if not path.is_file():
        raise ValueError(f"allocation.path: expected the allocation.yaml of an earlier run, got {path}")
    loaded = OmegaConf.to_container(read_yaml(path, "allocation.path"))
    bits = loaded.get("bits") if isinstance(loaded, dict) else None
    if not isinstance(bits, dict) or not bits:
        raise ValueError(f"allocation.path: expected `bits`, a list of layers with their widths, in {path}")
    for layer, pair in bits.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(width, int) for width in pair)):
            raise ValueError(
                f"allocation.path: expected [weight bits, activation bits] of {layer}, got {pair} in {path}"
            )
    return {str(layer): (pair[0], pair[1]) for layer, pair in bits.items()}


def write_bits(path: Path, bits: Bits, facts: Mapping[str, Any]) -> Path:
    """Write an allocation file, by a temporary name and a rename; `facts` say how it was found."""
    content = {"bits": {layer: list(pair) for layer, pair in bits.items()}, "found": dict(facts)}
    with whole_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return path


def known_bits(job: Job) -> Bits | None:
    """Widths that need no search: those of the finished or killed run that this one goes on with come first."""
    folder = job.cfg.evaluate or job.cfg.resume
    if folder and (Path(folder) / FILE).exists():
        return read_bits(Path(folder) / FILE)
    return job.allocation.known()


def leave(job: Job, bench: Bench, measured: Sequence[Measured], solution: Solution, facts: Mapping[str, Any]) -> Bits:
    """Write the allocation, the sensitivities of all options and a picture; the chosen widths."""
    groups, choices = bench.groups, bench.choices
    chosen = [own[i] for own, i in zip(choices, solution.chosen, strict=True)]
    bits = bits_of(groups, chosen)
    options = [
        {
            "group": group.name,
            "layers": len(group.layers),
            "weight": choice.layers[0][0],
            "activation": choice.layers[0][1],
            "sensitivity": float(found.values[i]),
            "deviation": float(found.deviation[i]),
            "chosen": i == picked,
        }
        for group, own, found, picked in zip(groups, choices, measured, solution.chosen, strict=True)
        for i, choice in enumerate(own)
    ]
    picked = [row for row in options if row["chosen"]]
    if job.is_main:
        write_bits(job.folder / FILE, bits, facts)
        save_allocation(picked, job.folder / "allocation.png")
    path = job.folder / "sensitivities.csv" if job.is_main else None
    report.show_rows("sensitivities", options, show=False, path=path)
    report.show_rows(
        "allocation", [{k: v for k, v in r.items() if k != "chosen"} for r in picked], show=job.cfg.show.units
    )
    return bits
