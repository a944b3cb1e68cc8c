"""The W&B run of a job: one, however often the job is stopped and goes on."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

FILE = "wandb_id"  # in the run's folder


def kept_identity(settings: DictConfig, folder: Path) -> dict[str, Any]:
    """Arguments that make a `WandbLogger` write to the run that this folder had before; none for other loggers.

    Offline, W&B writes a second file with the same id; `wandb sync` joins them.
    """
    if not str(settings.get("_target_", "")).endswith("WandbLogger") or settings.get("id"):
        return {}
    path = folder / FILE
    if path.exists():
        return {"id": path.read_text().strip(), "resume": "allow"}
    identity = secrets.token_hex(4)
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(identity + "\n")
    return {"id": identity}
