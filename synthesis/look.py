"""What one forward pass shows a synthesis: read with hooks, or as one function that a compiler can take whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from synthesis.features import ClassifierInput, pooled
from synthesis.moments import Moments, Probe, side_by_side
from synthesis.statistics import LayerStatistics, Site, observed


class Look(NamedTuple):
    """What one forward pass shows: moments of all layers and of the images, (rows, sum of C), the output (N, K), and if
    asked for the features (N, F) that enter the classifier."""

    moments: Moments
    logits: Tensor
    features: Tensor | None


def look_through(
    network: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    *,
    probe: Probe,
    site: Site,
    features: ClassifierInput | None = None,
) -> Look:
    """Return what a pass of `images` through `network` shows at `layers`."""
    with LayerStatistics(network, probe, site) as seen:
        if features is None:
            logits, found = network(images), None
        else:
            with features:
                logits = network(images)
            found = features.value
    parts = [*(seen[layer] for layer in layers), probe.measure(images)]
    return Look(side_by_side(parts), logits, found)


class WatchedNetwork(nn.Module):
    """Returns what `look_through` does, with layers that report by themselves instead of hooks.

    `torch.compile` does not notice when hooks come and go, as they do at every step; what modules hold it guards. The
    network's own modules stay as they are: it is copied, except for parameters and buffers, which both share.

    Args:
        network: on the device where it will run.
        layers: whose moments are read, in that order.
        probe: how.
        site: where.
        classifier: the module whose input is returned as features, if any.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], *, probe: Probe, site: Site, classifier: nn.Module | None
    ) -> None:
        super().__init__()
        memo: dict[int, Any] = {id(t): t for t in chain(network.parameters(), network.buffers())}
        twin = copy.deepcopy(network, memo)
        measured = [memo[id(network.get_submodule(name))] for name in layers]
        head = None if classifier is None else memo[id(classifier)]
        swaps: dict[nn.Module, nn.Module] = {
            layer: _WatchedLayer(layer, probe, site if layer in measured else None, is_head=layer is head)
            for layer in {*measured, *([] if head is None else [head])}
        }
        # a layer may stand in several places, and one inside another: find all before anything is exchanged
        places = [(*path.rpartition("."), part) for path, part in twin.named_modules(remove_duplicate=False) if path]
        found = [(twin.get_submodule(parent), name, swaps[part]) for parent, _, name, part in places if part in swaps]
        for parent, name, watched in found:
            setattr(parent, name, watched)
        self.network = swaps.get(twin, twin)
        self.probe = probe
        # plain tuples: the modules themselves belong to the network
        self._measured = tuple(swaps[layer] for layer in measured)
        self._head = (None if head is None else swaps[head],)

    def forward(self, images: Tensor) -> Look:  # (N, C, H, W)
        logits = self.network(images)
        parts = [*(layer.take_moments() for layer in self._measured), self.probe.measure(images)]  # type: ignore[operator]
        head = self._head[0]
        return Look(side_by_side(parts), logits, None if head is None else head.take_features())  # type: ignore[operator]


class _WatchedLayer(nn.Module):
    """A layer that keeps what it sees until it is taken.

    Args:
        layer: what is computed.
        probe: how moments are taken.
        site: where; None for none.
        is_head: whether its input are the features.
    """

    def __init__(self, layer: nn.Module, probe: Probe, site: Site | None, *, is_head: bool) -> None:
        super().__init__()
        self.layer = layer
        self.probe = probe
        self.site = site
        self.is_head = is_head
        self.seen: tuple[Moments, int] | None = None
        self.features: Tensor | None = None

    def forward(self, x: Tensor, *others: Any) -> Any:
        if self.is_head:
            self.features = pooled(x)
        if self.site == "bn_input":
            self.seen = observed(self.probe, x, self.seen)
        output = self.layer(x, *others)
        if self.site == "conv_output":
            self.seen = observed(self.probe, output, self.seen)
        return output

    def take_moments(self) -> Moments:
        """Return the moments of one pass, once."""
        assert self.seen is not None
        (found, _), self.seen = self.seen, None
        return found

    def take_features(self) -> Tensor:
        """Return the features of one pass, once."""
        assert self.features is not None
        found, self.features = self.features, None
        return found
