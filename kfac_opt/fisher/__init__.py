"""Looking at the Fisher matrix: spectra, estimator variance, gradients."""

from kfac_opt.fisher.gradients import (
    GradientMonitor,
    GradientStatistics,
    LayerGradients,
    Outliers,
    gradient_statistics,
    symmetric_log_bins,
)
from kfac_opt.fisher.matrix import FisherMatrix
from kfac_opt.fisher.spectrum import SpectralDensity, SpectralErrors, spectral_density

__all__ = [
    "FisherMatrix",
    "GradientMonitor",
    "GradientStatistics",
    "LayerGradients",
    "Outliers",
    "SpectralDensity",
    "SpectralErrors",
    "gradient_statistics",
    "spectral_density",
    "symmetric_log_bins",
]
