"""The nets of the studies on the Fisher matrix; importing this adds them to ``build_model``'s names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.models import MODELS


class ToColour32(nn.Module):
    """Images as three channels of 32 × 32: 8 × 8 enlarged, 28 × 28 with a border of zeros; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] <= 16:
            x = F.interpolate(x, size=(32, 32), mode="nearest")
        border = (32 - x.shape[-1]) // 2
        x = F.pad(x, (border, border, border, border))
        return x if x.shape[1] == 3 else x.repeat(1, 3, 1, 1)


def spectrum_cnn(num_classes: int = 10) -> nn.Module:
    """The CNN of the spectrum study by Ishii and Yokota, 1952 parameters: two convolutions, three linear layers."""
    return nn.Sequential(
        ToColour32(),
        nn.Conv2d(3, 4, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(150, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, num_classes),
    )


def conv4_fc3(in_channels: int = 3, image_size: int = 32, width: int = 16, num_classes: int = 10) -> nn.Module:
    """Four 3×3 convolutions with two poolings, and three linear layers, as in the gradient study's CIFAR-10 net."""
    reduced = image_size // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * reduced * reduced, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


MODELS["spectrum_cnn"] = spectrum_cnn
MODELS["conv4_fc3"] = conv4_fc3
