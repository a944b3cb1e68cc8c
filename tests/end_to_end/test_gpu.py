"""The main job on a CUDA device: the numbers of the CPU, and every stage in its place. Run with `-m gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from run import run_job
from tests.configuration import SMALL, composed

pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # the comparison with the CPU wants that
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(folder: Path, trainer: str, *overrides: str) -> dict[str, float]:
    return run_job(composed([*SMALL, f"trainer={trainer}", *overrides], folder))


def test_the_main_job_gives_the_accuracy_of_the_cpu(tmp_path: Path) -> None:
    """Of 64 images an untrained network may decide a few otherwise: rounding differs, and near-ties are many."""
    real = ["calibration=real", "calibration.count=32", "bits=w8a8"]
    on_cpu, on_gpu = (run(tmp_path / trainer, trainer, *real) for trainer in ("cpu", "gpu"))
    for network in ("float", "nearest", "quantized"):
        key = f"test/{network}/top1"
        assert on_gpu[key] == pytest.approx(on_cpu[key], abs=5.0)
    assert on_gpu["test/nearest/kl"] == pytest.approx(on_cpu["test/nearest/kl"], rel=0.3, abs=1e-4)


@pytest.mark.parametrize("generator", ["zeroq", "genie"])
def test_images_are_synthesised_on_the_device(generator: str, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    run(tmp_path, "gpu", f"generator={generator}", "reconstruction=none")
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["images"]["count"] == 8
    assert facts["stages"]["images"]["peak_gpu_mib"] > 0


@pytest.mark.parametrize("reconstruction", ["qdrop", "brecq", "adaround"])
@pytest.mark.parametrize("residency", ["device", "cpu", "half"])
def test_units_are_learned_on_the_device(reconstruction: str, residency: str, tmp_path: Path) -> None:
    overrides = [f"reconstruction={reconstruction}", f"reconstruction.residency={residency}", "calibration=noise"]
    metrics = run(tmp_path, "gpu", *overrides)
    assert 0 <= metrics["test/quantized/top1"] <= 100
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["stages"]["reconstruct"]["peak_gpu_mib"] > 0
