"""Which quantizers move together, and between which widths each group may choose.

Layers that read the same quantized tensor share its width, and with it their group: a block's first convolution and its
shortcut (the tie of HAWQ-V3, Yao et al., ICML 2021, arXiv 2011.10680), branches of a concatenation, tensors that are
quantized before they are added.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from allocation.hardware import Hardware, Pair, kind_of
from quantizers.convert import SITES, Conversion
from quantizers.layer import ActivationSite, QuantizedLayer
from quantizers.operators import Operators
from quantizers.placement import BitWidths, plan, weighted_layers
from quantizers.protocol import FLOAT, Protocol

log = logging.getLogger(__name__)
Bits = dict[str, Pair]  # layer -> (weight bits, activation bits): what conversion takes


@dataclass(frozen=True, kw_only=True)
class Group:
    """Quantizers with one decision.

    Attributes:
        name: path of the first layer.
        layers: paths in order of execution.
        reads: for each of them the sites that quantize what it reads, by their path in the student; none for a float
            input.
        nodes: the nodes of the student's graph at which the group acts.
    """

    name: str
    layers: tuple[str, ...]
    reads: tuple[tuple[str, ...], ...]
    nodes: tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of all its sites, each once."""
        return tuple(dict.fromkeys(site for own in self.reads for site in own))


class Choice(NamedTuple):
    """One option of a group. `pair`: what to ask conversion for; `layers`: (weight bits, activation bits) that each
    layer then computes with, in the group's order; `sites`: bits of each site. Protocols may hold some of them fixed.
    """

    pair: Pair
    layers: tuple[Pair, ...]
    sites: tuple[int, ...]


def find_groups(conversion: Conversion) -> list[Group]:
    """The groups of a student in order of execution; every layer with a weight stands in exactly one."""
    reference, student = conversion.reference, conversion.student
    operators = Operators(reference, conversion.opaque)
    heavy = {node.name for node in reference.graph.nodes if operators.is_heavy(node)}
    known = {
        id(layer): path
        for path, layer, _ in weighted_layers(reference, conversion.opaque)
        if path not in conversion.left_float
    }
    reads: dict[str, dict[str, None]] = {}
    nodes: dict[str, list[str]] = {}
    for node in student.graph.nodes:
        if node.op != "call_module":
            continue
        for path, layer in reference.get_submodule(str(node.target)).named_modules() if _is_own(node) else ():
            found = known.get(id(layer))
            if found is None:
                continue
            inside = _input_site(student, f"{node.target}.{path}" if path else str(node.target))
            sites = {} if path else _sites_before(student, node, heavy)
            reads.setdefault(found, {}).update(inside | {str(site.target): None for site in sites})
            nodes.setdefault(found, []).extend([node.name, *(site.name for site in sites)])
    return [_group(together, reads, nodes) for together in _tied(reads)]


def _is_own(node: fx.Node) -> bool:
    return not str(node.target).startswith(f"{SITES}.")


def _input_site(student: fx.GraphModule, path: str) -> dict[str, None]:
    """The site inside a layer that has no node of its own."""
    module = student.get_submodule(path)
    if isinstance(module, QuantizedLayer) and module.input_site is not None:
        return {f"{path}.input_site": None}
    if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], ActivationSite):
        return {f"{path}.0": None}
    return {}


def _sites_before(student: fx.GraphModule, node: fx.Node, heavy: set[str]) -> dict[fx.Node, None]:
    """The sites whose values a layer reads, as they are or through operators without weights."""
    found: dict[fx.Node, None] = {}
    seen, left = {node}, [node]
    while left:
        for source in left.pop().all_input_nodes:
            if source.op == "call_module" and not _is_own(source):
                found[source] = None
            elif source not in seen and source.name not in heavy:
                seen.add(source)
                left.append(source)
    return found


def _tied(reads: dict[str, dict[str, None]]) -> list[list[str]]:
    """Layers that share sites, directly or through others, in order of the first."""
    groups: list[tuple[list[str], set[str]]] = []
    for path, sites in reads.items():
        joined = [group for group in groups if group[1] & set(sites)]
        rest = [group for group in groups if group not in joined]
        layers = [layer for group in joined for layer in group[0]] + [path]
        groups = [*rest, (layers, set(sites).union(*(group[1] for group in joined)))]
    order = {path: i for i, path in enumerate(reads)}
    return sorted((sorted(layers, key=order.__getitem__) for layers, _ in groups), key=lambda g: order[g[0]])


def _group(layers: list[str], reads: dict[str, dict[str, None]], nodes: dict[str, list[str]]) -> Group:
    names = dict.fromkeys(name for layer in layers for name in nodes[layer])
    return Group(
        name=layers[0],
        layers=tuple(layers),
        reads=tuple(tuple(reads[layer]) for layer in layers),
        nodes=tuple(names),
    )


def choices_of(
    groups: Sequence[Group],
    conversion: Conversion,
    protocol: Protocol,
    bits: BitWidths,
    *,
    pairs: Iterable[Pair],
    hardware: Hardware,
) -> list[list[Choice]]:
    """For each group its options, in order of the widths, each different in what it computes.

    Args:
        groups: of the conversion.
        conversion: with `protocol` and `bits`, whatever its allocation.
        protocol: may hold widths fixed, of the ends of the network above all.
        bits: the job's.
        pairs: (weight bits, activation bits) to choose between.
        hardware: which of them each operator supports; what the protocol holds fixed is not asked for.

    Raises:
        ValueError: if the hardware supports none of a group's options.
    """
    reference = conversion.reference
    layers = [path for group in groups for path in group.layers]
    found: list[list[Choice]] = [[] for _ in groups]
    for pair in sorted(set(pairs)):
        decided = plan(reference, protocol, bits, dict.fromkeys(layers, pair), conversion.opaque)
        weights = {p.path: p.bits for p in decided.layers}
        sites = {f"{SITES}.{tensor.node.name}": tensor.bits for tensor in decided.tensors}
        inside = {p.path: p.input_bits for p in decided.layers if p.input_bits is not None}
        for group, options in zip(groups, found, strict=True):
            choice = _choice(group, pair, weights, sites, inside)
            if all(choice[1:] != option[1:] for option in options):
                options.append(choice)
    kinds = {path: kind_of(reference.get_submodule(path)) for path in layers}
    return [
        _legal(g, options, [kinds[path] for path in g.layers], hardware)
        for g, options in zip(groups, found, strict=True)
    ]


def _choice(group: Group, pair: Pair, weights: dict[str, int], sites: dict[str, int], inside: dict[str, int]) -> Choice:
    own: dict[str, int] = {}
    for layer, reads in zip(group.layers, group.reads, strict=True):
        own |= {site: sites[site] if site in sites else inside[layer] for site in reads}
    computed = tuple(
        (weights.get(layer, FLOAT), max((own[site] for site in reads), default=FLOAT))
        for layer, reads in zip(group.layers, group.reads, strict=True)
    )
    widths = {w for w, _ in computed}, set(own.values()) or {FLOAT}
    # what is asked for is what is computed, where that is one number: it then says the same without the protocol
    asked = tuple(next(iter(w)) if len(w) == 1 else bits for w, bits in zip(widths, pair, strict=True))
    return Choice((asked[0], asked[1]), computed, tuple(own.values()))


def _legal(group: Group, options: list[Choice], kinds: list[str], hardware: Hardware) -> list[Choice]:
    legal = [
        option
        for option in options
        if all(hardware.allows(kind, *pair) for kind, pair in zip(kinds, option.layers, strict=True))
    ]
    if legal:
        return legal
    if len(options) == 1:
        log.warning("%s: the protocol wants %s, which %s does not list", group.name, options[0].layers, hardware.name)
        return options
    raise ValueError(
        f"allocation: expected widths for {group.name} that hardware={hardware.name} supports, got "
        f"{[option.pair for option in options]} (weight, activation); change allocation.weight_bits, "
        "allocation.activation_bits or bits.activation, or choose hardware=any"
    )


def bits_of(groups: Sequence[Group], chosen: Sequence[Choice]) -> Bits:
    """The allocation to convert with."""
    return {layer: choice.pair for group, choice in zip(groups, chosen, strict=True) for layer in group.layers}
