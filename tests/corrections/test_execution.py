"""What a walk over a network holds on its way."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, fx, nn

from corrections.execution import walk

LAYERS = 12


def chain() -> fx.GraphModule:
    """Layers one behind the other, each of which keeps the size of its input."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(LAYERS)]
    return fx.symbolic_trace(nn.Sequential(*layers))


def test_a_long_way_to_a_stop_holds_only_what_is_still_read() -> None:
    network, made, alive = chain(), list[weakref.ref[Tensor]](), list[int]()

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        made.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in made))

    for module in network.children():
        module.register_forward_hook(watch)
    images = torch.randn(2, 3, 8, 8)
    stops = [stop.path for stop in walk(network, [str(LAYERS - 1)], images, batch_size=1)]
    assert stops == [str(LAYERS - 1)]
    assert len(alive) == 2 * (LAYERS - 1)
    assert max(alive) <= 3  # the layer's input and output, and what an earlier batch left at the stop


def test_a_stop_sees_what_a_plain_loop_sees() -> None:
    network, images = chain(), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        for stop in walk(network, [str(k) for k in (3, 4, 9)], images, batch_size=2):
            x = images
            for k in range(int(stop.path) + 1):
                x = network.get_submodule(str(k))(x)
            moments = stop.moments()
            rows = x.transpose(0, 1).flatten(1).double()
            torch.testing.assert_close(moments.mean, rows.mean(1), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(moments.var, rows.var(1, unbiased=False), atol=1e-6, rtol=1e-5)
            network.get_submodule(stop.path).weight.mul_(0.5)  # later stops see it
