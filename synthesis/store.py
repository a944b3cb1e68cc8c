"""Synthetic images on disk, addressed by the hash of the recipe that made them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from synthesis.leases import POLL, Lease

log = logging.getLogger(__name__)


class SampleStore:
    """A folder of `<key>.safetensors`, safe for concurrent jobs, also on network file systems.

    An entry appears whole or not at all, whoever writes it, and is verified when it is read, so that none depends on a
    lock: locks save double work, and are leases that end with the jobs that hold them.

    Args:
        folder: created when first written to.
        patience: seconds to wait for another job that makes the same images.
        silence: seconds without a sign of life after which a job on another host counts as dead; see `Lease`.
    """

    def __init__(self, folder: Path, patience: float = 24 * 3600, silence: float = 600) -> None:
        self.folder = Path(folder)
        self.patience = patience
        self.silence = silence

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
            OSError, SafetensorError: if the folder cannot be written to.
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
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # where a network file system first says that its disk is full
            os.replace(temporary, path)  # noqa: PTH105  the one call that is documented as atomic
        finally:
            temporary.unlink(missing_ok=True)

    def get_or_make(self, recipe: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """Return the stored images, or make and store them; of concurrent jobs one makes and the others wait.

        Images that cannot be stored are returned all the same, and a warning says so.

        Raises:
            TimeoutError: if another job holds the lock longer than `patience`.
        """
        images = self.get(recipe)
        if images is not None:
            return images
        with self._lease(recipe).held(self.patience):
            images = self.get(recipe)
            if images is None:
                images = make().detach().cpu()
                self.keep(recipe, images)
        return images

    def get_or_gather(self, recipe: Mapping[str, Any], parts: int, make: Callable[[int], Tensor]) -> Tensor:
        """Return the stored images, or make them part by part; concurrent jobs each take parts that nobody has yet.

        Parts that cannot be stored are made by every job that needs them, and a warning says so.

        Args:
            recipe: of the whole, under which the parts end as one entry.
            parts: how many, in order.
            make: makes one part, given its number.

        Raises:
            TimeoutError: if other jobs hold the locks of all missing parts longer than `patience`.
        """
        recipes = [{**recipe, "part": part} for part in range(parts)]
        leases = [self._lease(each) for each in recipes]  # kept, for each times the silence of its owner
        made: dict[int, Tensor] = {}  # here
        idle_since, announced = time.monotonic(), False
        while (images := self.get(recipe)) is None:
            missing = [part for part in range(parts) if part not in made and not self.path(recipes[part]).exists()]
            taken = self._take_one(recipe, {part: leases[part] for part in missing}, make)
            if taken:
                made |= taken
                idle_since = time.monotonic()
            elif not missing:
                found = [made[part] if part in made else self.get(each) for part, each in enumerate(recipes)]
                complete = [part for part in found if part is not None]
                if len(complete) == parts:
                    images = torch.cat(complete)
                    if not self.keep(recipe, images):
                        return images
                else:
                    self._remove(each for each, part in zip(recipes, found, strict=True) if part is None)  # damaged
            elif time.monotonic() - idle_since > self.patience:
                raise leases[missing[0]].kept_too_long(self.patience)
            else:
                if not announced:
                    leases[missing[0]].announce()
                announced = True
                time.sleep(POLL)
        self._remove(recipes)
        return images

    def _take_one(
        self, whole: Mapping[str, Any], leases: Mapping[int, Lease], make: Callable[[int], Tensor]
    ) -> dict[int, Tensor]:
        """Make the first part that no other job is at; that part by its number, nothing if there was none to make."""
        for part, lease in leases.items():
            if not lease.acquire():
                continue
            try:
                recipe = {**whole, "part": part}
                # in this order: who has all parts stores the whole before removing them
                if self.path(recipe).exists() or self.get(whole) is not None:
                    return {}
                images = make(part).detach().cpu()
                self.keep(recipe, images)
                return {part: images}
            finally:
                lease.release()
        return {}

    def keep(self, recipe: Mapping[str, Any], images: Tensor) -> bool:
        """Store images if that can be done, and say whether: what is made shall not be lost to a full disk."""
        try:
            self.put(recipe, images)
        except (OSError, SafetensorError) as error:
            log.warning(
                "%s cannot be written to (%s): what was just made is used, but must be made again another time; "
                "free space there, or choose another folder with paths.store",
                self.folder,
                error,
            )
            return False
        return True

    def forget_dead(self) -> None:
        """Remove what killed jobs have left: locks that nobody holds any more, and files that were never finished."""
        for path in self.folder.glob("*.lock"):
            lease = Lease(path, self.silence)
            if lease.acquire():
                for unfinished in self.folder.glob(f".{path.stem}.*.tmp"):
                    unfinished.unlink(missing_ok=True)
                lease.release()
        for path in self.folder.glob(".*.tmp"):  # written without a lock
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > self.silence:
                    path.unlink()

    def _remove(self, recipes: Iterable[Mapping[str, Any]]) -> None:
        for recipe in recipes:
            with suppress(OSError):
                self.path(recipe).unlink()

    def _lease(self, recipe: Mapping[str, Any]) -> Lease:
        return Lease(self.path(recipe).with_suffix(".lock"), self.silence)


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
