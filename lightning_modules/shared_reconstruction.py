"""A parallel reconstruction whose units several jobs learn between them, merged into equal students.

The parallel schedule of Hubara et al. (AdaQuant), arXiv 2006.10518: units that read the float network's values do not
depend on each other. Every job that asks for the same reconstruction takes shares that nobody has yet, and ends with
all of them; the bits are those of one process that learns every unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from datamodules.activations import UnitActivations
from lightning_modules.block_reconstruction import BlockReconstructionModule
from quantizers.convert import Conversion
from reconstruction.shares import pack, units_of_share, unpack
from synthesis.store import SampleStore, digest

RECIPE_VERSION = 1  # raise it when the same settings learn other units than before
Build = Callable[..., tuple[BlockReconstructionModule, UnitActivations]]
Fit = Callable[[BlockReconstructionModule, UnitActivations], None]


def learn_in_shares(
    build: Build, fit: Fit, *, shares: int, store: SampleStore, recipe: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Learn shares of the units, or find them in the store, until the student has all; then make it final.

    Args:
        build: `build_reconstruction` with everything but `share`, always for the same student.
        fit: trains what `build` returns.
        shares: among how many the units are dealt out; as many jobs can help each other.
        store: where learned shares are put.
        recipe: names this reconstruction; see `recipe_of`.

    Returns:
        The rows of the units that were learned here.

    Raises:
        ValueError: if `shares` is not positive, or the units depend on each other.
        TimeoutError: if another job holds a share longer than the store's patience.
    """
    if shares < 1:
        raise ValueError(f"share_reconstruction: expected at least 1 share, got {shares}")
    whole, _ = build()
    units = units_of_share(whole.epochs, (0, 1))
    if not units:
        return whole.results  # of roundings that were solved for; none where nothing is learned
    shares = min(shares, len(units))
    start = {unit: whole.learnables[unit].state() for unit in units}
    rows: list[dict[str, Any]] = []

    def learn(part: int) -> Tensor:
        own = units_of_share(whole.epochs, (part, shares))
        for unit in own:  # a share that was damaged in the store is learned again from its beginning
            whole.learnables[unit].restore(start[unit])
        module, datamodule = build(share=(part, shares))
        module.stage = f"{module.stage}_{part}"  # a checkpoint of its own, so that a killed job goes on in its share
        fit(module, datamodule)
        rows.extend(module.results)
        return pack(module.learnables, own)

    packed = store.get_or_gather({**recipe, "shares": shares}, shares, learn)
    dealt = [unit for part in range(shares) for unit in units_of_share(whole.epochs, (part, shares))]
    unpack(packed, whole.learnables, dealt)
    whole.harden()
    return rows


def recipe_of(conversion: Conversion, images: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a reconstruction depends on: both networks as they are now, the images, and plain `settings`."""
    networks = {"student": conversion.student, "reference": conversion.reference}
    hashes = {name: _state_digest(network) for name, network in networks.items()}
    return {"units": RECIPE_VERSION, **hashes, "images": digest(images), "settings": dict(settings)}


def _state_digest(network: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(f"{name} {digest(value)} ".encode())
    return found.hexdigest()
