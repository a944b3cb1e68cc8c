"""Random generators that are a pure function of what they are for, so that a resumed run repeats every draw."""

from __future__ import annotations

import hashlib

import torch


def seeded(*keys: int | str) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of `keys`, for example `seeded(seed, "view", epoch, step)`."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def spawn(rng: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on `device` seeded by one draw from `rng`: large noise is drawn where it is used."""
    seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
    return torch.Generator(device).manual_seed(seed)
