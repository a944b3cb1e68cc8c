"""The choice of a file to export: what to write, and how closely a runtime has to follow the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from deployment.containers import Container, check_container
from deployment.onnx_export import Exported, export_onnx

FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """container: see `deployment.containers`. `opset`: None is the lowest that has the container's types.

    `compared`: images on which every tensor is compared with the student; 0 compares nothing. `tolerance`: points
    by which top-1 of runtime and student may be apart (see `expect_same_top1`). `threads`: of the runtime.

    Raises:
        ValueError: for an unknown container, an opset that lacks its types, or a number out of its range.
    """

    container: Container = "auto"
    opset: int | None = None
    compared: int = 16
    tolerance: float = 0.1
    threads: int = 1

    def __post_init__(self) -> None:
        check_container(self.container, self.opset)
        if self.compared < 0:
            raise ValueError(f"export.compared: expected a number of images, 0 or more, got {self.compared}")
        if self.tolerance < 0:
            raise ValueError(f"export.tolerance: expected points of top-1, 0 or more, got {self.tolerance}")
        if self.threads < 1:
            raise ValueError(f"export.threads: expected at least 1, got {self.threads}")

    def write(
        self, student: fx.GraphModule, input_size: tuple[int, ...], path: Path, facts: Mapping[str, str]
    ) -> Exported:
        """Write the file; see `export_onnx`."""
        exported = export_onnx(student, input_size, container=self.container, opset=self.opset, facts=facts)
        exported.save(path)
        return exported
