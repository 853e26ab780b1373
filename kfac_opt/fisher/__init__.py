"""Looking at the Fisher matrix: spectra, estimator variance, gradients."""

from kfac_opt.fisher.matrix import FisherMatrix
from kfac_opt.fisher.spectrum import SpectralDensity, SpectralErrors, spectral_density

__all__ = ["FisherMatrix", "SpectralDensity", "SpectralErrors", "spectral_density"]
