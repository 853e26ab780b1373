"""Layers as linear maps: one adapter per layer type."""

from kfac_opt.layers import attention, conv, embedding, linear, norm, recurrent, transposed
from kfac_opt.layers.adapter import LayerAdapter, WeightSharing, append_one, find_adapter, has_own_forward, register_layer
from kfac_opt.layers.layout import MatrixLayout
from kfac_opt.layers.parts import find_composite

__all__ = [
    "LayerAdapter",
    "MatrixLayout",
    "WeightSharing",
    "append_one",
    "attention",
    "conv",
    "embedding",
    "find_adapter",
    "find_composite",
    "has_own_forward",
    "linear",
    "norm",
    "recurrent",
    "register_layer",
    "transposed",
]
