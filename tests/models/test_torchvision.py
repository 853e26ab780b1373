"""Every family of torchvision's classifiers, one small member each: widths and depths are cut, the blocks are the family's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests.models.check import AFFORDABLE, images, trains_with_default_kfac

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")
M = torchvision.models
CLASSES = 5


def _alexnet() -> nn.Module:
    model = M.alexnet(num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[1], model.classifier[4], model.classifier[6] = nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)
    return model


def _vgg(features: list[int | str], *, batch_norm: bool) -> nn.Module:
    model = M.VGG(M.vgg.make_layers(features, batch_norm=batch_norm), num_classes=CLASSES)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0], model.classifier[3], model.classifier[6] = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)
    return model


def _convnext() -> nn.Module:
    setting = [M.convnext.CNBlockConfig(16, 32, 2), M.convnext.CNBlockConfig(32, None, 1)]
    return M.ConvNeXt(setting, stochastic_depth_prob=0.1, num_classes=CLASSES)


def _maxvit() -> nn.Module:
    return M.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1], head_dim=4,
        stochastic_depth_prob=0.1, num_classes=CLASSES,
    )  # fmt: skip


def _swin(version: int) -> nn.Module:
    swin = M.swin_transformer
    options = {} if version == 1 else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return M.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 2], stochastic_depth_prob=0.1,
        num_classes=CLASSES, **options,
    )  # fmt: skip


def _vit() -> nn.Module:
    return M.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES, dropout=0.1
    )


def _resnext() -> nn.Module:
    return M.ResNet(M.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4, num_classes=CLASSES)


QUICK: dict[str, Callable[[], nn.Module]] = {
    "vgg": partial(_vgg, [16, "M", 32, "M", 64, "M"], batch_norm=False),
    "convnext": _convnext,
    "swin": partial(_swin, 1),
    "vit": _vit,
    "squeezenet": partial(M.squeezenet1_1, num_classes=CLASSES),
}
SLOW: dict[str, Callable[[], nn.Module]] = {
    "alexnet": _alexnet,
    "vgg, batch norm": partial(_vgg, [16, "M", 32, "M", 64, "M"], batch_norm=True),
    "resnet": partial(M.resnet18, num_classes=CLASSES),
    "resnext": _resnext,
    "wide resnet": lambda: M.ResNet(M.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=128, num_classes=CLASSES),
    "densenet": lambda: M.DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=CLASSES),
    "efficientnet": partial(M.efficientnet_b0, num_classes=CLASSES),
    "efficientnet v2": partial(M.efficientnet_v2_s, num_classes=CLASSES),
    "googlenet": partial(M.googlenet, num_classes=CLASSES, aux_logits=False, init_weights=True),
    "inception": partial(M.inception_v3, num_classes=CLASSES, aux_logits=False, init_weights=True),
    "maxvit": _maxvit,
    "mnasnet": partial(M.mnasnet0_5, num_classes=CLASSES),
    "mobilenet v2": partial(M.mobilenet_v2, num_classes=CLASSES, width_mult=0.5),
    "mobilenet v3": partial(M.mobilenet_v3_small, num_classes=CLASSES),
    "regnet": partial(M.regnet_y_400mf, num_classes=CLASSES),
    "shufflenet": partial(M.shufflenet_v2_x0_5, num_classes=CLASSES),
    "swin v2": partial(_swin, 2),
}
# Where batch norm would see single places of four examples, random networks have gradients of 1e5 and no step is possible.
DATA = {
    "alexnet": (64, 4),
    "squeezenet": (64, 4),
    "googlenet": (64, 4),
    "densenet": (64, 4),
    "efficientnet v2": (64, 4),
    "mnasnet": (64, 16),
    "inception": (128, 8),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_classifier_of_every_family_trains(name):
    torch.manual_seed(0)
    model = {**QUICK, **SLOW}[name]()
    options = AFFORDABLE if name in SLOW else {}
    trains_with_default_kfac(model, *images(CLASSES, *DATA.get(name, (32, 4))), **options)
