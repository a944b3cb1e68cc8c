"""One short name for the contents of tensors: sixteen hexadecimal digits of a SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

DIGITS = 16


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of the names; layout and device do not matter.

    Returns:
        The first 16 hexadecimal digits of the SHA-256.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        # A scalar has no last dimension to reinterpret as bytes.
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:DIGITS]
