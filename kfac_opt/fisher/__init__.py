"""Looking at the Fisher matrix: spectra, estimator variance, gradients."""

from kfac_opt.fisher.matrix import FisherMatrix

__all__ = ["FisherMatrix"]
