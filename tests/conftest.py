"""Shared fixtures: one thread, no network, and the folder of real weights and images where there is one."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real weights and images; the test is skipped where CALIBRANT_DATA is not set."""
    folder = os.environ.get("CALIBRANT_DATA")
    if not folder:
        pytest.skip("needs real weights and images: set CALIBRANT_DATA to their folder")
    return Path(folder)


def pytest_collection_finish() -> None:
    """Leave imported code and collected tests out of garbage collections, of which each job makes one."""
    gc.collect()
    gc.freeze()
