"""Rewrites a traced graph to a plain one: nothing in place, no identities, every weighted operator a module."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

_OUT_OF_PLACE: dict[Callable, Callable] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}
_IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_BUILDERS: dict[Callable, type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
    F.linear: nn.Linear,
}


def normalize(graph_module: fx.GraphModule) -> None:
    """Rewrites in place; every node that stays keeps its name. The network has to be in evaluation mode."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none"):
            graph.erase_node(node)  # a check of the input's shape or of an optional argument, which the example passed
        else:
            _out_of_place(graph_module, node)
    for node in list(graph.nodes):
        if _is_identity(graph_module, node):
            source = node.args[0] if node.args else node.kwargs["input"]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _weights_to_modules(graph_module)
    _eliminate_dead_code(graph)
    for node in list(graph.nodes)[1:]:
        if node.op == "placeholder" and not node.users:  # optional arguments, which kept their default
            graph.erase_node(node)
    graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _eliminate_dead_code(graph: fx.Graph) -> None:
    def kept(node: fx.Node) -> bool:
        changes = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
        return node.op in ("placeholder", "output") or changes or node.target is operator.setitem

    graph.eliminate_dead_code(is_impure_node=kept)


def _out_of_place(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Makes one operator leave its argument alone; later readers of the argument are sent to the result.

    In the eager network they would have read the changed tensor: the rewritten graph computes the same.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        changes = isinstance(getattr(module, "inplace", None), bool) and bool(module.inplace)
        if not changes:
            return
        for part in module.modules():
            if isinstance(getattr(part, "inplace", None), bool):
                part.inplace = False  # type: ignore[assignment]
    elif node.op == "call_method" and str(node.target).endswith("_") and hasattr(Tensor, str(node.target)[:-1]):
        if str(node.target).endswith("__"):
            return
        node.target = str(node.target)[:-1]
    elif node.op == "call_function" and (node.target in _OUT_OF_PLACE or _twin(node.target) is not None):
        node.target = _OUT_OF_PLACE.get(node.target) or _twin(node.target)  # type: ignore[assignment, arg-type]
    elif not (node.op == "call_function" and _clear_inplace(node)):
        return
    source = node.args[0] if node.args else node.kwargs.get("input")
    if isinstance(source, fx.Node):
        _redirect_later_readers(source, node)


def _redirect_later_readers(source: fx.Node, result: fx.Node) -> None:
    for user in list(source.users):
        if result < user:  # order of execution
            user.replace_input_with(source, result)


def _twin(function: Any) -> Callable | None:
    """torch.relu for torch.relu_, F.elu for F.elu_; None for functions that are not named so."""
    name = getattr(function, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(F, name[:-1], None) or getattr(torch, name[:-1], None)


def _clear_inplace(node: fx.Node) -> bool:
    """Sets inplace=False in a call such as F.relu(x, inplace=True); whether it was set."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def _is_identity(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _IDENTITIES)
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if name == "stochastic_depth":  # torchvision.ops
        training = node.kwargs.get("training", node.args[3] if len(node.args) > 3 else True)
    elif name in _DROPOUTS and (node.args or "input" in node.kwargs):
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    else:
        return False
    return training is False


def _weights_to_modules(graph_module: fx.GraphModule) -> None:
    """Replaces F.conv2d(x, self.weight, ...) and its kin by modules, so that they are folded and quantized like others.

    The weight may be computed from parameters (weight standardisation): it is evaluated once.
    """
    graph, built = graph_module.graph, []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _BUILDERS:
            continue
        module = _build(graph_module, node)
        if module is None:
            continue
        source = node.args[0] if node.args else node.kwargs["input"]
        same = next(
            (path for path, scope, other in built if scope == node.meta["scope"] and _equal(module, other)), None
        )
        path = same or ".".join(filter(None, (node.meta["scope"], node.name)))
        if same is None:
            graph_module.add_submodule(path, module)
            built.append((path, node.meta["scope"], module))
        node.op, node.target, node.args, node.kwargs = "call_module", path, (source,), {}
    _eliminate_dead_code(graph)
    for path, scope, module in built:
        _rename(graph_module, path, scope, module)


def _rename(graph_module: fx.GraphModule, path: str, scope: str, module: nn.Module) -> None:
    """Moves a built module to the path of the module that it came from, where nothing else lives there."""
    taken = any(
        node.target != path and (str(node.target) == scope or str(node.target).startswith(f"{scope}."))
        for node in graph_module.graph.nodes
        if node.op in ("call_module", "get_attr")
    )
    if not scope or taken:
        return
    graph_module.add_submodule(scope, module)
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target == path:
            node.target = scope


def _build(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if node.target in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
        names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    values = [
        constant(graph_module, given[k]) if isinstance(given.get(k), fx.Node) else None for k in ("weight", "bias")
    ]
    weight, bias = values
    if weight is None or (isinstance(given.get("bias"), fx.Node) and bias is None):
        return None  # computed from the input: no weight in our sense
    if any(isinstance(a, fx.Node) for v in options.values() for a in (v if isinstance(v, tuple | list) else (v,))):
        return None
    builder = _BUILDERS[node.target]  # type: ignore[index]
    if builder is nn.Linear:
        if weight.ndim != 2:
            return None
        module: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        groups, transposed = int(options.get("groups", 1)), "output_padding" in names
        inputs, outputs = weight.shape[:2] if transposed else (weight.shape[1], weight.shape[0])
        channels = (inputs, outputs * groups) if transposed else (inputs * groups, outputs)
        module = builder(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module.eval()


def _equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return repr(a) == repr(b) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def constant(graph_module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on parameters and buffers only; None if it depends on the network's input."""
    values: dict[fx.Node, Any] = {}

    def evaluate(n: fx.Node) -> Any:
        if n not in values:
            if n.op in ("placeholder", "output"):
                raise LookupError(n.name)
            arguments = map_arg((n.args, n.kwargs), evaluate)
            interpreter = fx.Interpreter(graph_module)
            values[n] = getattr(interpreter, n.op)(n.target, *arguments)
        return values[n]

    try:
        value = evaluate(node)
    except LookupError:
        return None
    return value if isinstance(value, Tensor) else None
