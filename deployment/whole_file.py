"""A file that appears whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expect_no_folder(path: Path) -> None:
    """Raises ValueError where a file is to be written over a folder."""
    if path.is_dir():
        raise ValueError(f"output: expected the name of a file, got {path}, which is a folder; name a file in it")


@contextmanager
def whole_file(path: Path, *, several: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it when the block ends well, removed when it fails.

    Args:
        path: of the file.
        several: processes may write it at a time: each gets a name of its own. Where one writes, as in the folder of a
            run, the name is always the same, so that what a kill leaves is written over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if several else f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what `several` processes that were killed left beside a file; where nobody writes it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)
