"""The ledger of real data: who opened what, when; the proof that a data-free run saw no image before it was scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Entry:
    """One set of real images that was opened.

    Attributes:
        stage: what it was opened for: "calibration", "evaluation", ...
        name: of the data, e.g. "cifar10".
        split: of the data, e.g. "test".
        count: images used.
        digest: fingerprint of what was used.
    """

    stage: str
    name: str
    split: str
    count: int
    digest: str


class DataLedger:
    """Records every set of real images that is opened; in a data-free run, refuses all but those for evaluation.

    Every reader asks `permit` before it touches a file and reports to `opened` once it knows what it read.
    """

    def __init__(self, data_free: bool) -> None:
        self.data_free = data_free
        self._entries: list[Entry] = []

    def permit(self, stage: str, name: str, split: str) -> None:
        """Ask before the first byte is read.

        Raises:
            RuntimeError: in a data-free run, unless the stage is "evaluation".
        """
        if self.data_free and stage != EVALUATION:
            raise RuntimeError(
                f"data-free run: stage {stage!r} asked for real images ({name}, {split}); only {EVALUATION!r} may. "
                "Choose calibration=real if real images are meant to be used"
            )

    def opened(self, stage: str, name: str, split: str, count: int, digest: str) -> None:
        """Record a set that was read.

        Raises:
            RuntimeError: as `permit`.
        """
        self.permit(stage, name, split)
        self._entries.append(Entry(stage, name, split, count, digest))

    @property
    def entries(self) -> list[dict[str, str | int]]:
        """What was opened, in order, as plain values for the record."""
        return [asdict(entry) for entry in self._entries]
