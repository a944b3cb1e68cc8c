"""The choice of a file to export: what to write, how closely a runtime has to follow, and what becomes of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from deployment.containers import Container, check_container
from deployment.onnx_export import Exported, export_onnx
from deployment.parity import ParityError
from deployment.runtime import Runtime, runtimes
from deployment.whole_file import expect_no_folder

FILE = "model.onnx"
PARITY: dict[Runtime, str] = {"onnxruntime": "parity.csv", "openvino": "parity_openvino.csv"}  # a row for each tensor


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """container: see `deployment.containers`. `opset`: None is the lowest that has the container's types.

    `compared`: images on which every tensor is compared with the student; None: all there are, 0: none. `tolerance`:
    points by which top-1 of runtime and student may be apart, each computing by itself; None only reports it.
    `threads`: of the runtime. `openvino`: whether OpenVINO, besides onnxruntime, has to follow as closely.

    Raises:
        ValueError: for an unknown container, an opset that lacks its types, or a number out of its range.
    """

    container: Container = "auto"
    opset: int | None = None
    compared: int | None = 256
    tolerance: float | None = None
    threads: int = 1
    openvino: bool = False

    def __post_init__(self) -> None:
        check_container(self.container, self.opset)
        if self.compared is not None and self.compared < 0:
            raise ValueError(f"export.compared: expected a number of images, or null for all, got {self.compared}")
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"export.tolerance: expected points of top-1, or null for any, got {self.tolerance}")
        if not isinstance(self.openvino, bool):
            raise ValueError(f"export.openvino: expected true or false, got {self.openvino!r}")
        if self.openvino and self.compared == 0:
            raise ValueError(
                "export.openvino (--openvino): expected images to compare on, got export.compared=0 (--compared 0); "
                "choose 256, or leave OpenVINO out"
            )
        if self.threads < 1:
            raise ValueError(f"export.threads: expected at least 1, got {self.threads}")

    @property
    def runtimes(self) -> list[Runtime]:
        """What has to follow the student; onnxruntime first."""
        return runtimes(openvino=self.openvino)

    def make(
        self, student: fx.GraphModule, input_size: tuple[int, ...], facts: Mapping[str, str] | None = None
    ) -> Exported:
        """The model in memory; see `export_onnx`."""
        return export_onnx(student, input_size, container=self.container, opset=self.opset, facts=facts)


def failed(path: Path) -> Path:
    """Where a model goes that a runtime computes otherwise: `model.failed.onnx` for `model.onnx`."""
    return path.with_name(f"{path.stem}.failed{path.suffix}")


@contextmanager
def written_if_alike(exported: Exported, path: Path) -> Iterator[None]:
    """Saves the model to `path` when the block, which compares it, ends well.

    Raises:
        ValueError: if `path` is a folder.
        ParityError: the block's own, with the name of the file that the model is kept in instead; what lay at `path`
            before stays as it was.
    """
    expect_no_folder(path)
    try:
        yield
    except ParityError as error:
        raise ParityError(f"{error}; the file is kept as {exported.save(failed(path))}, not as {path.name}") from error
    exported.save(path)
    failed(path).unlink(missing_ok=True)
