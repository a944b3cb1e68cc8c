"""A job of no time at all, for tests of sweepers and launchers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

DEFAULTS = {
    "x": 0,
    "y": 0.0,
    "log": None,  # file that takes a line a run
    "fails": None,  # the x that raises
    "kill": None,  # the x at which the process dies, once, while the file `armed` exists
    "armed": None,
    "effort": "full",
    "several": False,
}
ConfigStore.instance().store("toy", node=DEFAULTS)


@hydra.main(version_base="1.3", config_path=None, config_name="toy")
def main(cfg: DictConfig) -> float | list[float]:
    """(x - 3)² + y², and y beside it where several are wanted."""
    if cfg.log is not None:
        with Path(cfg.log).open("a") as file:
            file.write(f"{cfg.x} {cfg.y} {cfg.effort}\n")
    if cfg.x == cfg.fails:
        raise ValueError(f"x: expected another, got {cfg.x}")
    if cfg.x == cfg.kill and Path(cfg.armed).exists():
        Path(cfg.armed).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    loss = (cfg.x - 3) ** 2 + cfg.y**2
    return [loss, cfg.y] if cfg.several else loss


if __name__ == "__main__":
    main()
