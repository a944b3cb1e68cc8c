"""A file that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expect_no_folder(path: Path) -> None:
    """Raises ValueError where a file is to be written over a folder."""
    if path.is_dir():
        raise ValueError(f"output: expected the name of a file, got {path}, which is a folder; name a file in it")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it when the block ends well, removed when it fails.

    Raises:
        ValueError: if `path` is a folder; nothing is written then.
    """
    expect_no_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
