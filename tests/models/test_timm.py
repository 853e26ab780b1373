"""Families of timm: normalized weights, layers that act in place, layer scales that start near zero, attention of all sorts."""

from __future__ import annotations

import pytest
import torch

from tests.models.check import AFFORDABLE, images, trains_with_default_kfac

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:KFAC"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CLASSES = 5
FAMILIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "resnet": ("resnet10t", 32, {"channels": (16, 32, 64, 64)}),
    "resnet v2": ("resnetv2_50", 32, {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 64), "stem_chs": 16}),
    "normalizer-free": ("nf_regnet_b0", 32, {}),
    "efficientnet": ("efficientnet_b0", 64, {}),
    "mobilenet v3": ("mobilenetv3_small_050", 64, {}),
    "mobilenet v4": ("mobilenetv4_conv_small", 64, {}),
    "regnet": ("regnety_002", 32, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "dla": ("dla46_c", 64, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}),
    "selective kernel": ("skresnet18", 32, {"channels": (16, 32, 64, 64)}),
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "resmlp": ("resmlp_12_224", 32, {"img_size": 32}),
    "gmlp": ("gmlp_ti16_224", 32, {"img_size": 32}),
    "poolformer": ("poolformer_s12", 32, {}),
    "convnext": ("convnext_atto", 32, {"depths": (1, 1, 1, 1)}),
    "convnext v2": ("convnextv2_atto", 32, {"depths": (1, 1, 1, 1)}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64, "embed_dim": (32, 64, 64), "depth": (1, 1, 1)}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"img_size": 32, "depth": 2}),
    "fastvit": ("fastvit_t8", 64, {}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 2)}),
    "sequencer": (
        "sequencer2d_s",
        32,
        {
            "img_size": 32,
            "layers": (1, 1),
            "embed_dims": (16, 32),
            "hidden_sizes": (4, 8),
            "patch_sizes": (8, 1),
            "mlp_ratios": (2.0, 2.0),
        },
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_timm_trains(name):
    architecture, size, options = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=CLASSES, **options)
    trains_with_default_kfac(model, *images(CLASSES, size, batch=8), **AFFORDABLE)
