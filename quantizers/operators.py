"""What an operator of a traced graph does to a quantized tensor: activation, mere rearrangement, sign of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, fx, nn

from quantizers.layer import WEIGHTED
from quantizers.normalize import constant


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names without underscores and capitals, so that nn.MaxPool2d, F.max_pool2d and Tensor methods read alike.
ACTIVATIONS = _names(
    "relu relu6 leakyrelu prelu rrelu elu selu celu gelu silu mish hardswish hardtanh tanh softplus softsign "
    "threshold logsigmoid tanhshrink softshrink hardshrink swish quickgelu"
)
TRANSPARENT = _names(
    "maxpool1d maxpool2d maxpool3d avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d "
    "adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d mean amax flatten unflatten view viewas reshape reshapeas "
    "permute transpose swapaxes movedim t contiguous squeeze unsqueeze expand expandas chunk split tensorsplit unbind "
    "narrow getitem select roll flip dropout identity stochasticdepth clone detach to float channelshuffle "
    "channelgather pixelshuffle pixelunshuffle upsample upsamplingnearest2d upsamplingbilinear2d interpolate pad "
    "zeropad2d"
)
# Every value they give is one they were given, or a zero: on the grid if its input is.
REARRANGING = TRANSPARENT - _names(
    "avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d mean upsample interpolate "
    "upsamplingbilinear2d"
)
CLIPS = _names("relu relu6 hardtanh clamp clip clampmin")  # runtimes join them to the operator before
_SEVERAL = _names("chunk split tensorsplit unbind")  # give a tuple of parts of their input
_NON_NEGATIVE = _names("relu relu6 sigmoid hardsigmoid softmax softmax2d softplus abs exp square sqrt rsqrt")
_ELEMENTWISE = _names(
    "add sub rsub mul truediv div cat concat stack where batchnorm layernorm groupnorm instancenorm rmsnorm prelu "
    "getrelativepositionbias expand getitem pow maximum minimum gather indexselect scaleddotproductattention"
)


class Operators:
    """Answers questions about the nodes of one graph; `opaque` are paths of leaves that must not be looked through."""

    def __init__(self, graph_module: fx.GraphModule, opaque: Iterable[str] = ()) -> None:
        self.graph_module = graph_module
        self.opaque = frozenset(opaque)
        self._signs: dict[fx.Node, bool] = {}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """Lower case without underscores: "adaptiveavgpool2d" for the module, the function and the method."""
        if node.op == "call_module":
            name = type(self.module(node)).__name__
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target))
        else:
            name = str(node.target) if node.op == "call_method" else node.op
        return name.replace("_", "").lower()

    def is_weighted(self, node: fx.Node) -> bool:
        """A convolution or linear layer with a node of its own."""
        return isinstance(self.module(node), WEIGHTED) and node.target not in self.opaque

    def is_heavy(self, node: fx.Node) -> bool:
        """Multiplies its input with learned weights, whether these can be quantized here or not."""
        if node.op == "call_module":
            module = self.module(node)
            assert module is not None
            return self.is_weighted(node) or any(p.ndim > 1 for p in module.parameters())
        return bool(self.weights_passed(node))

    def weights_passed(self, node: fx.Node) -> list[str]:
        """Parameter matrices that a function gets as arguments, such as those of torchvision's window attention."""
        if node.op not in ("call_function", "call_method") or self.name(node) in _ELEMENTWISE | TRANSPARENT:
            return []
        sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
        if len(sources) == len(node.all_input_nodes):
            return []
        tensors = {str(n.target): constant(self.graph_module, n) for n in sources}
        return [name for name, value in tensors.items() if isinstance(value, nn.Parameter) and value.ndim > 1]

    def is_activation(self, node: fx.Node) -> bool:
        """A non-linearity that follows a layer; gates (sigmoid, hardsigmoid) and softmax are not counted."""
        if self.name(node) in ACTIVATIONS:
            return node.target not in self.opaque
        if self.name(node) != "mul" or len(node.all_input_nodes) != 2:
            return False
        a, b = node.all_input_nodes  # x * sigmoid(x) is the swish function
        return any(self.name(g) == "sigmoid" and g.all_input_nodes == [x] for g, x in ((a, b), (b, a)))

    def producer(self, node: fx.Node) -> fx.Node:
        """The node whose values `node` passes on: walks back through pooling, reshaping, splitting, padding."""
        while self.name(node) in TRANSPARENT and node.target not in self.opaque:
            source = _first_input(node)
            if source is None or (not source.meta["is_tensor"] and self.name(source) not in _SEVERAL):
                break
            node = source
        return node

    def source(self, node: fx.Node) -> fx.Node:
        """The node whose values `node` holds in another place: walks back through rearranging alone."""
        while (source := self.rearranged(node)) is not None:
            node = source
        return node

    def rearranged(self, node: fx.Node) -> fx.Node | None:
        """What `node` only rearranges, or None if it computes something."""
        if self.name(node) not in REARRANGING or node.target in self.opaque or _pads_with_other_values(node):
            return None
        source = _first_input(node)
        tensor = source is not None and (source.meta["is_tensor"] or self.name(source) in _SEVERAL)
        return source if tensor else None

    def computes(self, node: fx.Node) -> bool:
        """Whether it makes new values of tensors, other than by clipping: what runtimes have a kernel for."""
        if node.op in ("placeholder", "get_attr", "output") or not node.meta["is_tensor"]:
            return False
        return self.rearranged(node) is None and (self.name(node) not in CLIPS or node.target in self.opaque)

    def non_negative(self, node: fx.Node) -> bool:
        """Whether the operators alone make sure that no value is below zero."""
        if node not in self._signs:
            self._signs[node] = self._non_negative(node)
        return self._signs[node]

    def _non_negative(self, node: fx.Node) -> bool:
        name = self.name(node)
        if node.op == "get_attr":
            value = constant(self.graph_module, node)
            return isinstance(value, Tensor) and bool((value >= 0).all())
        if node.target in self.opaque or node.op in ("placeholder", "output"):
            return False
        if name in _NON_NEGATIVE:
            return True
        if name in ("hardtanh", "clamp", "clip", "clampmin"):
            return _lower_bound(node, self.module(node)) >= 0
        if name in ("add", "mul", "truediv", "div", "cat", "concat", "stack", "maximum"):
            return self._all_non_negative(node, any if name == "maximum" else all)
        if name in TRANSPARENT:
            source = _first_input(node)
            return source is not None and self.non_negative(source) and not _pads_below_zero(node)
        return False

    def _all_non_negative(self, node: fx.Node, quantifier: Callable[[Iterable[bool]], bool]) -> bool:
        operands = node.args[0] if isinstance(node.args[0], tuple | list) else node.args[:2]
        assert isinstance(operands, tuple | list)
        return quantifier(
            self.non_negative(v) if isinstance(v, fx.Node) else isinstance(v, int | float) and v >= 0 for v in operands
        )


def _first_input(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _lower_bound(node: fx.Node, module: nn.Module | None) -> float:
    if module is not None:
        return float(getattr(module, "min_val", -1.0))
    bound = next((node.kwargs[k] for k in ("min", "min_val") if k in node.kwargs), (*node.args, None, None)[1])
    return float(bound) if isinstance(bound, int | float) else -1.0


def _pads_with_other_values(node: fx.Node) -> bool:
    if "pad" not in str(getattr(node.target, "__name__", node.target)):
        return False
    mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    zeros = value is None or (isinstance(value, int | float) and float(value) == 0.0)
    return str(mode) == "constant" and not zeros


def _pads_below_zero(node: fx.Node) -> bool:
    """F.pad(input, pad, mode, value) with a negative value."""
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 and node.op == "call_function" else None)
    return isinstance(value, int | float) and value < 0
