"""K-FAC for PyTorch: natural gradient, variational inference and Fisher diagnostics."""

from kfac_opt.bayes.kfac_vi import KFACVI
from kfac_opt.bayes.posterior import Posterior
from kfac_opt.kfac import KFAC
from kfac_opt.layers import register_layer

__version__ = "0.2.0.dev0"

__all__ = ["KFAC", "KFACVI", "Posterior", "__version__", "register_layer"]
