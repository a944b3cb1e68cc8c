"""A loader that only counts, for training that needs no data but has epochs of a given length."""

from __future__ import annotations

from collections.abc import Iterator


class Steps:
    """Yields 0, 1, ..., count - 1, and resumes inside an epoch from its saved state.

    Raises:
        ValueError: unless `count` is at least 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1 step, got {count}")
        self.count = count
        self._next = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for step in range(self._next, self.count):
            # Advanced before the step runs: a checkpoint taken at its end names the step that follows.
            self._next = (step + 1) % self.count
            yield step

    def restart(self) -> None:
        """Let the next epoch start at 0 although this one was not taken to its end."""
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """Return the step that comes next."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the step that came next when `state` was saved."""
        self._next = state["next"] % self.count
