"""To which block of the network a part of its graph belongs, from the paths and types of the modules that ran it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Scopes:
    """The module tree behind a traced graph, as far as the graph shows it.

    A path's type comes from the record that torch.fx keeps at each node. A path that was never called itself
    (a ModuleList, say) counts as a container.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.paths: dict[fx.Node, str] = {}
        self.types: dict[str, type | str] = {}
        for node in nodes:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            self.types.update({path: kind for path, kind in stack if path})
            path = str(node.target) if node.op == "call_module" else node.meta.get("scope")
            self.paths[node] = path if path is not None else (stack[-1][0] if stack else "")
        called = set(self.types) | {path for node, path in self.paths.items() if node.op == "call_module"}
        self.leaves = {path for path in called if not any(other.startswith(f"{path}.") for other in called)}
        self.children: dict[str, set[str]] = {}
        for path in called:
            self.children.setdefault(_parent(path), set()).add(path)

    def key(self, nodes: Sequence[fx.Node], *, stage: bool) -> str:
        """The path of the block that holds all `nodes`; with `stage` that of the container around the block.

        The block is the innermost module that its container holds several times (a residual block of a stage);
        if there is none, the outermost element of a container; else the innermost module that is no container and
        has children; else the layer itself.
        """
        prefix = _common_prefix([self.paths[node] for node in nodes])
        block = self._block(prefix)
        around = _parent(block)
        return around if stage and around and self.is_container(around) and not self.is_container(block) else block

    def is_container(self, path: str) -> bool:
        """Whether the module only holds others."""
        kind = self.types.get(path)
        if kind is None:
            return path != "" and path not in self.leaves
        return isinstance(kind, type) and issubclass(kind, CONTAINERS)

    def _block(self, prefix: str) -> str:
        modules = [path for path in _ancestors(prefix) if not self.is_container(path)]
        elements = [path for path in modules if self.is_container(_parent(path))]
        repeated = [path for path in elements if path not in self.leaves and self._siblings(path) > 1]
        if repeated:
            return repeated[-1]
        if elements:
            return elements[0]
        parents = [path for path in modules if path not in self.leaves]
        return parents[-1] if parents else prefix

    def _siblings(self, path: str) -> int:
        """How many elements of the same container have the same type, this one included."""
        kind = self.types.get(path)
        return sum(self.types.get(other) == kind for other in self.children.get(_parent(path), ()))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _ancestors(path: str) -> list[str]:
    """The path and all above it, outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _common_prefix(paths: Sequence[str]) -> str:
    parts = [path.split(".") if path else [] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
