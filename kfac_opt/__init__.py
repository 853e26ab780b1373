"""K-FAC for PyTorch: natural gradient, variational inference and Fisher diagnostics."""

from kfac_opt.layers import register_layer
from kfac_opt.optim.kfac import KFAC
from kfac_opt.optim.kfac_vi import KFACVI
from kfac_opt.posterior import Posterior

__all__ = ["KFAC", "KFACVI", "Posterior", "register_layer"]
