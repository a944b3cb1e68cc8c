"""The network that runs of synthesis look at."""

from __future__ import annotations

import pytest

from networks.cifar_resnet import CifarResNet
from tests.lightning_modules.synthesis_runs import trained


@pytest.fixture
def network() -> CifarResNet:
    """A small trained network, new for each test."""
    return trained()
