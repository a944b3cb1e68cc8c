"""Packages that only export needs, imported when they are first needed: quantizing does without them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

EXTRAS = {"openvino": "openvino"}  # package -> what brings it, where that is not `export`
KEPT_OUT = {"openvino"}  # of this process: `deployment.openvino_process` imports it


def require(package: str) -> Any:
    """The package `onnx` or `onnxruntime`, or a module of theirs.

    Raises:
        ValueError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(package, error) from error


def expect_installed(package: str) -> None:
    """Import the package, or, if it is to be kept out of this process, look whether it is there.

    Raises:
        ValueError: if it is not, with the command that installs it.
    """
    if package not in KEPT_OUT:
        require(package)
    elif importlib.util.find_spec(package) is None:
        raise missing(package, f"No module named {package!r}")


def missing(package: str, reason: object) -> ValueError:
    """What is raised where a package cannot be imported."""
    return ValueError(
        f"export: expected the package {package}, which cannot be imported ({reason}); "
        f"pip install calibrant[{EXTRAS.get(package, 'export')}]"
    )
