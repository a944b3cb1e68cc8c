"""From an eager network to a graph: torch.fx on a copy, with the parts that cannot be traced kept as opaque leaves."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from quantizers.layer import WEIGHTED
from quantizers.normalize import normalize

log = logging.getLogger(__name__)
ROOT = "network"  # module path below which a network stands that could not be traced at all


class StoredNorm(NamedTuple):
    """What a batch normalisation says of its own output: mean `beta` and standard deviation `gamma`, both (C,).

    gamma is |weight| sqrt(var / (var + eps)): the weight itself would promise too much where the stored variance is
    as small as eps, in channels that died in training.
    """

    beta: Tensor
    gamma: Tensor


class Trace(NamedTuple):
    """`graph_module`: the network in evaluation mode, sharing nothing with the caller's; each node has in `meta`
    "scope" (path of the innermost module that ran it), "is_tensor" and "shape" (of the example; None if no tensor).
    `opaque`: path of every module that was left as a leaf because tracing it failed, with the reason. `norms`: what the
    normalisation stored that `fold` joined to the layer, or froze, at this path; empty before folding.
    """

    graph_module: fx.GraphModule
    opaque: dict[str, str]
    norms: dict[str, StoredNorm]


class ScopeTracer(fx.Tracer):
    """Records the module path of every node, and turns a module that cannot be traced into a leaf instead of failing.

    A module fails by itself only: its callees that fail become leaves first, so that the smallest part stays opaque.
    """

    def __init__(self, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.opaque: dict[str, str] = {}
        self.path = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.path[-1]
        return node

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        count, stack = len(self.graph.nodes), list(self.module_stack.items())
        self.path.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.is_leaf_module(m, path):
                raise
            for node in list(self.graph.nodes)[: count - 1 : -1]:  # what the failed attempt had recorded, last first
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self.opaque[path] = _reason(error)
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.path.pop()


class _Opaque(nn.Module):
    """Calls a network that could not be traced, so that it is one node of a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class _ShapePropagation(fx.Interpreter):
    """Records shapes; and which opaque layers (a convolution with its own padding) are plain in their weight."""

    def __init__(self, graph_module: fx.GraphModule, opaque: dict[str, str]) -> None:
        super().__init__(graph_module)
        self.opaque = opaque
        self.plain: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n.target in self.opaque:
            layer = self.fetch_attr(str(n.target))
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if isinstance(layer, WEIGHTED) and _linear_in_weight(layer, args, kwargs):
                self.plain.add(str(n.target))
        value = super().run_node(n)
        n.meta["is_tensor"] = isinstance(value, Tensor)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> Trace:
    """Traces a copy of `model` (evaluation mode, no dropout, nothing in place) and checks it against `model` itself.

    `example`: one batch (N, C, H, W) of the right shape; its values are not used. Raises ValueError when the network
    itself does not run on a batch of that shape.
    """
    network = _frozen_copy(model)
    device = next((t.device for t in (*network.parameters(), *network.buffers())), example.device)
    probe = torch.randn(example.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    probe = probe.to(device, example.dtype)
    try:
        # a clone each time: a network may begin with an operation in place
        expected = _tensors(network(probe.clone()))
    except Exception as error:
        raise ValueError(
            f"example: expected a batch that {type(model).__name__} accepts, got shape {tuple(example.shape)}, on "
            f"which it raises {_reason(error)}. Pass a batch of the network's own input size, on any device."
        ) from error
    try:
        traced = _trace(network, frozenset(), probe)
        if _agree(_tensors(traced.graph_module(probe.clone())), expected):
            return _reported(traced)
        reason = "the traced graph computes something else (an operation in place on a view?)"
    except Exception as error:
        reason = _reason(error)
    log.warning("%s cannot be traced: %s. Its layers are quantized in place.", type(model).__name__, reason)
    whole = _trace(_Opaque(_frozen_copy(model)), frozenset({ROOT}), probe)
    return Trace(whole.graph_module, {ROOT: reason}, {})


def _trace(network: nn.Module, leaves: frozenset[str], probe: Tensor) -> Trace:
    tracer = ScopeTracer(leaves)
    graph = tracer.trace(network, concrete_args=_defaults(network))
    graph_module = fx.GraphModule(network, graph, class_name=type(network).__name__)
    normalize(graph_module)
    propagation = _ShapePropagation(graph_module, tracer.opaque)
    propagation.run(probe.clone())
    called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"} - propagation.plain
    return Trace(graph_module, {path: why for path, why in tracer.opaque.items() if path in called}, {})


def _linear_in_weight(layer: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the output is the weight times something plus the bias: then the layer can be folded and quantized."""

    def call(factor: float) -> Tensor:
        return torch.func.functional_call(layer, {"weight": factor * layer.weight}, args, kwargs)

    zero, once, twice = call(0.0), call(1.0), call(2.0)
    return torch.allclose(twice - zero, 2 * (once - zero), rtol=1e-3, atol=1e-4 * float(once.abs().max()))


def _defaults(network: nn.Module) -> dict[str, Any] | None:
    """The optional arguments of `forward` after the image, with their defaults: `if mask is None` is then known."""
    arguments = list(inspect.signature(network.forward).parameters.values())[1:]
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty} or None


def _frozen_copy(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model).eval().requires_grad_(False)
    for module in [m for m in network.modules() if parametrize.is_parametrized(m)]:
        # by hand: remove_parametrizations changes the class, which the copy shares with the caller's module
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        kind = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = kind
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return network


def _reported(traced: Trace) -> Trace:
    for path, reason in traced.opaque.items():
        log.info("%s is kept as an opaque module: %s", path, reason)
    return traced


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def _agree(seen: list[Tensor], expected: list[Tensor]) -> bool:
    if [t.shape for t in seen] != [t.shape for t in expected]:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) if b.numel() else 0.0, equal_nan=True)
        for a, b in zip(seen, expected, strict=True)
    )
