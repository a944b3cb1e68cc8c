"""Synthetic images on disk, addressed by the hash of the recipe that made them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)


class SampleStore:
    """A folder of `<key>.safetensors`, safe for concurrent jobs, also on network file systems.

    Args:
        folder: created when first written to.
        patience: seconds to wait for another job that makes the same images.
    """

    def __init__(self, folder: Path, patience: float = 24 * 3600) -> None:
        self.folder = Path(folder)
        self.patience = patience

    def key(self, recipe: Mapping[str, Any]) -> str:
        """Return the sha256 of the canonical JSON of `recipe`, as hex.

        Raises:
            ValueError: if the recipe holds anything that JSON does not.
        """
        return hashlib.sha256(_canonical(recipe).encode()).hexdigest()

    def path(self, recipe: Mapping[str, Any]) -> Path:
        """Return where the images of `recipe` stand, or would stand."""
        return self.folder / f"{self.key(recipe)}.safetensors"

    def get(self, recipe: Mapping[str, Any]) -> Tensor | None:
        """Return the stored images, or None if there are none or the file is damaged (which is logged)."""
        path = self.path(recipe)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata, images = file.metadata() or {}, file.get_tensor("images")
        except (SafetensorError, OSError) as error:
            log.warning("%s is unreadable and will be made again: %s", path, error)
            return None
        if metadata.get("recipe") != _canonical(recipe) or metadata.get("digest") != digest(images):
            log.warning("%s does not hold what its recipe and digest say and will be made again", path)
            return None
        return images

    def put(self, recipe: Mapping[str, Any], images: Tensor) -> None:
        """Store `images`; the file appears whole or not at all.

        Raises:
            ValueError: if any pixel is not finite.
        """
        if not images.isfinite().all():
            raise ValueError(
                "images: expected finite pixels, got NaN or infinity; the synthesis diverged or was stopped before all "
                "images were made. Run it to its end before storing them"
            )
        path = self.path(recipe)
        self.folder.mkdir(parents=True, exist_ok=True)
        images = images.detach().cpu().contiguous()
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            save_file({"images": images}, temporary, {"recipe": _canonical(recipe), "digest": digest(images)})
            os.replace(temporary, path)  # noqa: PTH105  the one call that is documented as atomic
        finally:
            temporary.unlink(missing_ok=True)

    def get_or_make(self, recipe: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """Return the stored images, or make and store them; of concurrent jobs one makes and the others wait.

        Raises:
            TimeoutError: if another job holds the lock longer than `patience`.
        """
        images = self.get(recipe)
        if images is not None:
            return images
        with self._locked(recipe):
            images = self.get(recipe)
            if images is None:
                images = make().detach().cpu()
                self.put(recipe, images)
        return images

    def get_or_gather(self, recipe: Mapping[str, Any], parts: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return the stored images, or make them part by part; concurrent jobs each take parts that nobody has yet.

        Args:
            recipe: of the whole, under which the parts end as one entry.
            parts: how many, in order.
            make: makes one part, given its number.

        Raises:
            TimeoutError: if other jobs hold the locks of all missing parts longer than `patience`.
        """
        recipes = [{**recipe, "part": part} for part in range(parts)]
        idle_since = time.monotonic()
        while (images := self.get(recipe)) is None:
            missing = [part for part in range(parts) if not self.path(recipes[part]).exists()]
            if any(self._take(recipes[part], functools.partial(make, part)) for part in missing):
                idle_since = time.monotonic()
                continue
            found = [self.get(each) for each in recipes]
            images = [part for part in found if part is not None]
            if len(images) == parts:
                self.put(recipe, torch.cat(images))
                for each in recipes:
                    self.path(each).unlink(missing_ok=True)
            elif not missing:
                for each, part in zip(recipes, found, strict=True):
                    if part is None:  # damaged
                        self.path(each).unlink(missing_ok=True)
            elif time.monotonic() - idle_since > self.patience:
                raise self._held_too_long(self.path(recipes[missing[0]]).with_suffix(".lock"))
            else:
                time.sleep(0.2)
        return images

    def _take(self, recipe: Mapping[str, Any], make: Callable[[], Tensor]) -> bool:
        """Make what is missing unless another job is at it; whether it was made here."""
        try:
            with self._locked(recipe, patience=0):
                if self.path(recipe).exists():
                    return False
                self.put(recipe, make())
                return True
        except TimeoutError:
            return False

    def _held_too_long(self, lock: Path) -> TimeoutError:
        return TimeoutError(
            f"{lock}: expected the job that holds this lock to finish within {self.patience:g} s, it did not; "
            "if no job is making these images (one was killed), delete the lock file"
        )

    @contextmanager
    def _locked(self, recipe: Mapping[str, Any], patience: float | None = None) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.path(recipe).with_suffix(".lock")
        timeout = self.patience if patience is None else patience
        try:
            holder = SoftFileLock(lock, timeout=timeout).acquire(poll_interval=0.2)
        except Timeout as error:
            raise self._held_too_long(lock) from error
        with holder:
            yield


def digest(images: Tensor) -> str:
    """Return the sha256 over dtype, shape and bytes of a tensor, as hex."""
    images = images.detach().cpu().contiguous()
    found = hashlib.sha256(f"{images.dtype}{tuple(images.shape)}".encode())
    found.update(images.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _canonical(recipe: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"recipe: expected plain JSON values (text, finite numbers, booleans, null, lists, mappings), got "
            f"something else: {error}. Convert paths and configs to plain values first"
        ) from error
