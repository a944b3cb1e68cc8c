"""How W&B is used without waiting for it: it is never asked for a login, and has so many seconds for what is left."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable

import wandb

FINISH_S = 60  # for what is not uploaded when a run ends; the rest stays on disk, for `wandb sync`
HAND_OVER_S = 20.0  # for all of that when the job is to be requeued before its time limit


def mode(offline: bool) -> str:
    """Online, offline, disabled or what else the user's settings say; `offline` goes before them."""
    return "offline" if offline else str(wandb.setup().settings.mode)


def has_login() -> bool:
    """Whether a key or token is in the environment, the settings or netrc; asks nobody, and not the server either."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    known = getattr(wandb.api, "api_key", None)  # before wandb 0.31
    return bool(known or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))


def settings() -> wandb.Settings:
    """Of a run that only watches: standard output stays as it is, and an outage ends the wait for uploads."""
    chosen = wandb.Settings(console="off")
    if "finish_timeout" in wandb.Settings.model_fields and "WANDB_FINISH_TIMEOUT" not in os.environ:
        chosen.finish_timeout = FINISH_S
    return chosen


def within(seconds: float, work: Callable[[], None]) -> bool:
    """Whether the work was done in that time; what was not goes on in a thread that holds up no exit."""
    thread = threading.Thread(target=work, daemon=True, name="wandb-conclude")
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def short(error: Exception) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
