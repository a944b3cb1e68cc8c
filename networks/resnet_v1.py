"""ResNets with the stride where the paper has it: on the first 1x1 convolution of a stage.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385. torchvision strides the 3x3
convolution instead ("v1.5"); weights trained with either placement lose most of their accuracy in the other.
"""

from __future__ import annotations

from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck, resnet50


def stride_on_first_convolution(network: ResNet) -> ResNet:
    """Move the stride of stages two to four from the 3x3 to the first 1x1 convolution, in place; same keys.

    Raises:
        ValueError: if the network is not built of bottleneck blocks.
    """
    for stage in (network.layer2, network.layer3, network.layer4):
        block = stage[0]
        if not isinstance(block, Bottleneck):
            raise ValueError(f"network: expected bottleneck blocks (ResNet-50 and deeper), got {type(block).__name__}")
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return network


def resnet50_v1(num_classes: int = 1000) -> ResNet:
    """ResNet-50 as published in 2015, with torchvision's key names and random weights."""
    return stride_on_first_convolution(resnet50(weights=None, num_classes=num_classes))
