"""Building untrained networks by name, and fetching their published weights, from torchvision, timm or this package."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Literal

import torch
import torchvision.models as torchvision_models
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupResNet
from networks.resnet_v1 import resnet50_v1

Source = Literal["torchvision", "timm", "cifar", "embedded", "random"]
SOURCES = ("torchvision", "timm", "cifar", "embedded", "random")
CIFAR_NAME = re.compile(r"(fixup_)?resnet(\d+)")
# Published weights of these two expect the input rescaled inside the network; without heads, eval gives one tensor.
TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": False},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": False},
}


def build(
    source: Source, architecture: str, num_classes: int, in_channels: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build an untrained network.

    Args:
        source: whose network definition to use; "cifar", "embedded" and "random" all mean `CifarResNet` ("resnet20")
            or `FixupResNet` ("fixup_resnet20").
        architecture: the name within that source.
        num_classes: size of the output.
        in_channels: channels of the input.
        options: further arguments of the network's own constructor.

    Raises:
        ValueError: if the name is unknown (with close matches), timm is missing, or an option is refused.
    """
    if source == "torchvision":
        return _torchvision(architecture, num_classes, in_channels, options)
    if source == "timm":
        timm = import_timm()
        if not timm.is_model(architecture):
            raise unknown_architecture(architecture, source, timm.list_models())
        return timm.create_model(architecture, num_classes=num_classes, in_chans=in_channels, **options)
    match = CIFAR_NAME.fullmatch(architecture)
    if match is None:
        depths = (8, 20, 32, 44, 56, 110)
        raise unknown_architecture(
            architecture, source, [f"{kind}{n}" for kind in ("resnet", "fixup_resnet") for n in depths]
        )
    family = FixupResNet if match[1] else CifarResNet
    return family(int(match[2]), num_classes, in_channels)


def _torchvision(architecture: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    if in_channels != 3:
        raise ValueError(f"model.input_size: torchvision networks take 3 channels, got {in_channels}")
    if architecture == "resnet50_v1":
        return resnet50_v1(num_classes)
    names = torchvision_models.list_models(module=torchvision_models)
    if architecture not in names:
        raise unknown_architecture(architecture, "torchvision", [*names, "resnet50_v1"])
    arguments = {**TORCHVISION_ARGUMENTS.get(architecture, {}), **options}
    return torchvision_models.get_model(architecture, weights=None, num_classes=num_classes, **arguments)


def published_weights(source: Source, architecture: str, weights: str, obtain: str) -> dict[str, Tensor]:
    """Fetch the weights the source itself publishes, from its download cache or the network.

    Args:
        source: as in `build`.
        architecture: as in `build`.
        weights: which ones: torchvision's names ("DEFAULT", "IMAGENET1K_V1"), or the embedded file's name.
        obtain: where a checkpoint can be got, for sources that publish none.

    Raises:
        ValueError: if there are none, or they cannot be downloaded; says how to pass a file instead.
    """
    if source == "embedded":
        return _embedded(weights)
    if source == "timm":
        return _timm_weights(architecture)
    if source == "torchvision" and architecture != "resnet50_v1":
        return _torchvision_weights(architecture, weights)
    raise ValueError(
        f"model.checkpoint: no weights are published for {architecture} of source {source!r}; pass "
        f"model.checkpoint=<file>{f' (from {obtain})' if obtain else ''}, or model.pretrained=false for random weights"
    )


def _embedded(weights: str) -> dict[str, Tensor]:
    folder = resources.files("networks") / "weights"
    file = folder / f"{weights}.safetensors"
    if not file.is_file():
        entries = (entry.name for entry in folder.iterdir())
        names = sorted(name.removesuffix(".safetensors") for name in entries if name.endswith(".safetensors"))
        raise ValueError(f"model.weights: expected one of the embedded {', '.join(names) or '(none)'}, got {weights!r}")
    return load_safetensors(file.read_bytes())


def _torchvision_weights(architecture: str, weights: str) -> dict[str, Tensor]:
    members = torchvision_models.get_model_weights(architecture).__members__
    if weights not in members:
        raise ValueError(f"model.weights: expected one of {', '.join(members)} for {architecture}, got {weights!r}")
    choice = members[weights]
    try:
        return dict(choice.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ValueError(
            f"model.weights: could not download {choice.url} ({error}); on a machine without network fetch that file "
            f"elsewhere and put it into {folder}, or pass model.checkpoint=<file>"
        ) from error


def _timm_weights(architecture: str) -> dict[str, Tensor]:
    timm = import_timm()
    try:
        return timm.create_model(architecture, pretrained=True).state_dict()
    except Exception as error:  # the hub client has its own, changing, exceptions
        page = f"https://huggingface.co/timm (repository {architecture}...)"
        raise ValueError(
            f"model.architecture: could not download timm's {architecture} ({error}); on a machine without network "
            f"fetch model.safetensors from {page} and pass model.checkpoint=<file>"
        ) from error


def import_timm() -> Any:
    """The package timm, which is an extra; `ValueError` with the remedy where it is missing."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ValueError("model.source: timm is not installed; `pip install calibrant[timm]`") from error


def unknown_architecture(name: str, source: str, known: Iterable[str]) -> ValueError:
    """The error for a name nobody knows, with the names it may have meant."""
    close = difflib.get_close_matches(name, list(known), n=5)
    hint = f"close matches: {', '.join(close)}" if close else f"see the networks of {source}"
    return ValueError(f"model.architecture: no {name!r} in source {source!r}; {hint}")
