"""Weight files: reading them without running code, unwrapping them, and loading them with errors one can act on."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")
AUXILIARY = re.compile(r"^(aux\d|AuxLogits)\.")
# torchvision's DenseNet files still hold the names of its first release, with a dot inside "norm1".
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
LISTED = 8


def read_checkpoint(path: str | Path, obtain: str = "") -> dict[str, Tensor]:
    """Read the tensors of a weight file, `.safetensors` or anything `torch.load(weights_only=True)` accepts.

    Args:
        path: the file.
        obtain: where the file can be got; ends the message when it is missing.

    Raises:
        ValueError: if the file is missing, corrupt, holds pickled objects, or holds no tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        remedy = f"get it from {obtain} and put it there" if obtain else "correct the path"
        raise ValueError(f"model.checkpoint: no file at {path}; {remedy}, or pass model.checkpoint=<file>")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"model.checkpoint: {path} is not a plain file of tensors (corrupt, or it holds pickled Python objects, "
            "which are refused because unpickling runs code); save network.state_dict() alone, as .pth or .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, UserWarning) as error:
        raise ValueError(f"model.checkpoint: {path} cannot be read as weights ({error}); fetch it again") from error
    return unwrap(content, str(path))


def unwrap(content: Any, origin: str) -> dict[str, Tensor]:
    """Take the state dict out of the usual wrappings: a "state_dict" entry, a "module." before every key.

    Raises:
        ValueError: if what remains is not a mapping from names to tensors.
    """
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            log.info("%s: the weights are its entry %r", origin, key)
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"model.checkpoint: expected names and tensors in {origin}, got {type(content).__name__}")
    strangers = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(
            f"model.checkpoint: expected only tensors in {origin}, got others under {_listing(strangers)}; "
            "save network.state_dict() alone"
        )
    state = {str(key): value for key, value in content.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            log.info("%s: %r stripped from every key", origin, prefix)
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_weights(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy a state dict into a network in place, in the network's own precision.

    Auxiliary training heads the network does not have are dropped; BatchNorm's `num_batches_tracked`, which old
    files lack, may be missing.

    Raises:
        ValueError: listing every missing, unexpected and misshapen key.
    """
    own = network.state_dict()
    state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    dropped = [key for key in state if AUXILIARY.match(key) and key not in own]
    if dropped:
        log.info("%s: %d tensors of auxiliary training heads dropped", origin, len(dropped))
    for key in dropped:
        del state[key]
    for key in own.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = own[key]
    _check_keys(own, state, origin)
    if any(value.dtype in (torch.float16, torch.bfloat16) for value in state.values()):
        log.info("%s: half precision weights widened to the network's precision", origin)
    # The network's own dictionary knows the versions of its layout, which plain dictionaries have lost and without
    # which some networks (MNASNet) load nothing.
    own.update(state)
    network.load_state_dict(own, strict=True)


def _check_keys(own: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str) -> None:
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"{len(missing)} missing: {_listing(missing)}")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"{len(unexpected)} unexpected: {_listing(unexpected)}")
    misshapen = [
        f"{key} (expected {tuple(own[key].shape)}, got {tuple(value.shape)})"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {_listing(misshapen)}")
    if problems:
        raise ValueError(
            f"model.checkpoint: {origin} does not fit the network; keys {'; '.join(problems)}. "
            "Likely another architecture or another number of classes: check model.architecture and model.num_classes"
        )


def _listing(names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
