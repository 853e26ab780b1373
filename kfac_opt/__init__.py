"""K-FAC for PyTorch: natural gradient, variational inference and Fisher diagnostics."""

from kfac_opt.layers import register_layer
from kfac_opt.optim.kfac import KFAC

__all__ = ["KFAC", "register_layer"]
