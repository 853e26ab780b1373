"""Layers as linear maps: one adapter per layer type."""

from kfac_opt.layers import conv, embedding, linear, norm, transposed
from kfac_opt.layers.adapter import LayerAdapter, WeightSharing, append_one, find_adapter, has_own_forward, register_layer
from kfac_opt.layers.layout import MatrixLayout

__all__ = [
    "LayerAdapter",
    "MatrixLayout",
    "WeightSharing",
    "append_one",
    "conv",
    "embedding",
    "find_adapter",
    "has_own_forward",
    "linear",
    "norm",
    "register_layer",
    "transposed",
]
