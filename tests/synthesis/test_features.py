"""The input of the classifier, whatever kind of layer it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.cifar_resnet import CifarResNet
from synthesis.features import ClassifierInput


def test_features_are_the_input_of_the_last_layer_that_runs() -> None:
    network = CifarResNet(8).eval()
    images = torch.randn(3, 3, 8, 8)
    found = ClassifierInput(network, (3, 8, 8))
    with found:
        logits = network(images)
    assert found.value is not None
    assert found.width == 64 == found.value.shape[1]
    torch.testing.assert_close(network.linear(found.value), logits)
    assert not network.linear._forward_pre_hooks


def test_a_convolutional_classifier_is_averaged_over_positions() -> None:
    # registered first, executed last
    network = nn.Module()
    network.classifier, network.body = nn.Conv2d(4, 5, 1), nn.Conv2d(3, 4, 3)
    network.forward = lambda x: network.classifier(network.body(x)).mean((2, 3))  # type: ignore[method-assign, union-attr, operator]
    found = ClassifierInput(network, (3, 6, 6))
    images = torch.randn(2, 3, 6, 6)
    with found:
        network(images)
    torch.testing.assert_close(found.value, network.body(images).mean((2, 3)))  # type: ignore[operator]


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear or Conv2d"):
        ClassifierInput(nn.ReLU(), (3, 4, 4))
