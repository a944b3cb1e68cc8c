"""Which layer of a student a tensor comes from, and how many layers of floats lie before it."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from quantizers.layer import WEIGHTED, ActivationSite, QuantizedLayer

LOGITS = "logits"  # what the student gives back


class Origin(NamedTuple):
    """`layer`: path of the last layer before a tensor; `layers`: since the last quantized tensor."""

    layer: str
    layers: int


def origins_of(student: fx.GraphModule) -> dict[str, Origin]:
    """Path of each quantized tensor's site, and `LOGITS` -> where it comes from; of several layers, the deepest."""
    behind: dict[fx.Node, Origin] = {}
    found: dict[str, Origin] = {}
    for node in student.graph.nodes:
        module = student.get_submodule(str(node.target)) if node.op == "call_module" else None
        before = [behind[source] for source in node.all_input_nodes]
        behind[node] = origin = max(before, key=lambda origin: origin.layers, default=Origin("", 0))
        if isinstance(module, ActivationSite) and module.enabled:
            found[str(node.target)], behind[node] = origin, Origin("", 0)
        elif isinstance(module, (QuantizedLayer, *WEIGHTED)):
            behind[node] = Origin(str(node.target), origin.layers + 1)
        elif node.op == "output":
            found[LOGITS] = origin
    return found
