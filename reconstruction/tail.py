"""The float network behind a unit: what the unit's outputs, quantized, do to the network's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from reconstruction.extract import Cutter
from reconstruction.partition import Unit


class Tail:
    """Everything of the float network that runs after one unit; nothing for the last one.

    Where more is alive behind the unit than it returns (a skip connection around a layer), the tail reads those values
    as well, as the network in front of the unit gives them.

    Attributes:
        reads: names of the values besides the unit's outputs that are needed, in their order.

    Args:
        reference: cuts the float network.
        units: its chain.
        index: of the unit in front of the tail.
        outputs: what that unit returns, by node name of the reference.

    Raises:
        ValueError: if the network returns anything but one tensor.
    """

    def __init__(self, reference: Cutter, *, units: Sequence[Unit], index: int, outputs: Sequence[str]) -> None:
        (result,) = (node for node in reference.nodes.values() if node.op == "output")
        if len(result.all_input_nodes) != 1 or result.args[0] is not result.all_input_nodes[0]:
            raise ValueError(
                f"objective: expected a network that returns one tensor, the logits, got {result.args[0]}; "
                "use reconstruction.objectives.PowerError, which looks at units only"
            )
        self.result = result.all_input_nodes[0].name
        rest = units[index + 1 :]
        joined = Unit(
            "tail",
            nodes=tuple(chain.from_iterable(unit.nodes for unit in rest)),
            inputs=(),
            outputs=tuple(chain.from_iterable(unit.outputs for unit in rest)),
            layers=(),
        )
        self.outputs = list(outputs)
        self.needed = [] if self.result in self.outputs else list(reference.interface(joined).inputs)
        self.module = None if self.result in self.outputs else reference.extract(joined)
        self.reads = [name for name in self.needed if name not in self.outputs]

    def __call__(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """The network's output for a batch, from the unit's outputs and the values of `reads`; differentiable."""
        values: Mapping[str, Tensor] = dict(zip([*self.outputs, *self.reads], [*outputs, *others], strict=True))
        if self.module is None:
            return values[self.result]
        (logits,) = self.module(*(values[name] for name in self.needed))
        return logits


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax outputs for every image, (N, classes, *positions) twice -> (N,).

    Averaged over positions; float32 also under autocast. Both are divided by `temperature` first.

    Raises:
        ValueError: if there is no axis of at least two classes.
    """
    if teacher.dim() < 2 or teacher.shape[1] < 2:
        raise ValueError(
            f"objective: expected a network that returns logits (N, classes) of two classes or more, got "
            f"{tuple(teacher.shape)}; use reconstruction.objectives.PowerError, which looks at units only"
        )
    with torch.autocast(student.device.type, enabled=False):
        log_p = F.log_softmax(teacher.float() / temperature, 1)
        log_q = F.log_softmax(student.float() / temperature, 1)
        terms = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        return terms.flatten(1).mean(1) if terms.dim() > 1 else terms
