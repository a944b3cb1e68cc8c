"""Sweeps made of records alone, for the tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

BYTES = {8: 262144, 4: 131072, 2: 65536}


def record(
    *,
    generator: str = "dsg",
    bits: int = 4,
    seed: int = 0,
    top1: float = 80.0,
    nearest: float | None = 50.0,
    status: str = "finished",
    **others: Any,
) -> dict[str, Any]:
    """A run's record as far as a report reads it."""
    metrics = {"test/float/top1": 90.0, "test/quantized/top1": top1, "test/quantized/agreement": 85.0}
    if nearest is not None:
        metrics["test/nearest/top1"] = nearest
    config = {
        "name": "study",
        "seed": seed,
        "protocol": {"name": "brecq"},
        "bits": {"weight": bits, "activation": bits},
        "generator": {"_target_": f"x.{generator}", "steps": 500 if generator == "dsg" else 200},
        "calibration": {"count": 128, "seed": seed},
        "paths": {"output": f"/runs/{generator}{bits}{seed}"},
    }
    facts = {
        "status": status,
        "started": f"2026-01-01T00:00:{bits:02}",
        "config": config,
        "config_hash": f"{generator}{bits}{seed}",
        "choices": {"generator": generator, "bits": f"w{bits}a{bits}", "protocol": "brecq", "hydra/launcher": "basic"},
        "overrides": [f"generator={generator}", f"bits=w{bits}a{bits}", f"seed={seed}"],
        "versions": {"torch": "2.8.0"},
        "machine": "a computer, 1 threads",
        "commit": "abc",
        "stages": {"images": {"seconds": 2.0, "peak_mib": 1.0}, "reconstruct": {"seconds": 3.0, "peak_mib": 2.0}},
        "error": None,
    }
    if status == "finished":
        facts |= {
            "metrics": metrics,
            "bytes": {"float": 1048576, "quantized": BYTES[bits]},
            "teacher": {"name": "resnet", "weights_hash": "0"},
            "images": {"origin": "synthetic", "count": 128, "digest": "1"},
            "allocation": {"name": "uniform", "average_weight_bits": bits, "average_activation_bits": bits},
            "row": {
                "network": "resnet",
                "protocol": "brecq",
                "w_bits": bits,
                "images": generator,
                "image_count": 128,
                "generator_steps": 500,
                "seed": seed,
                "top1": top1,
            },
        }
    return facts | others


def write(folder: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """The record as a run below `folder`, with a picture of its images."""
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(facts))
    Image.new("RGB", (900, 900), "gray").save(folder / name / "images.png")
    return folder / name
