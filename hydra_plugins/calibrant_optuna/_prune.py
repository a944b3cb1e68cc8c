"""Pruning by a cheap run: what is among the worse there is not run in full.

The rule of the median (Golovin et al., "Google Vizier", KDD 2017), with another run in place of an early step of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class Prune:
    """Which trials go on, by the first number that a cheap run of each returns.

    Args:
        overrides: what makes a run cheap, such as `pipeline=light`; they replace the trial's own of the same key.
        without: keys that the cheap run does not have.
        keep: the share of the best that go on; 0.5: the better half.
        startup: earlier trials before any is pruned.
    """

    def __init__(
        self, *, overrides: Sequence[str], without: Sequence[str] = (), keep: float = 0.5, startup: int = 5
    ) -> None:
        if not overrides:
            raise ValueError("prune.overrides: expected what makes a run cheap, such as [pipeline=light], got none")
        if not 0 < keep <= 1 or startup < 1:
            raise ValueError(f"prune.keep, startup: expected a share in (0, 1] and at least 1, got {keep}, {startup}")
        self.cheap = dict(text.split("=", 1) for text in overrides)
        self.without = set(without)
        self.keep = keep
        self.startup = startup

    def overrides(self, own: Mapping[str, str]) -> dict[str, str]:
        """Those of the cheap run of a trial that overrides `own`."""
        return {key: value for key, value in own.items() if key not in self.without} | self.cheap

    def is_hopeless(self, score: float, earlier: Sequence[float], direction: str) -> bool:
        """Whether the score is worse than those of the best `keep` of the earlier trials."""
        if len(earlier) < self.startup:
            return False
        sign = 1.0 if direction == "minimize" else -1.0
        return sign * score > float(np.quantile(sign * np.asarray(earlier), self.keep))
