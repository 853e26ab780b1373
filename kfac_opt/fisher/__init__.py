"""Looking at the Fisher matrix: spectra, estimator variance, gradients."""

from kfac_opt.fisher.gradients import (
    GradientStatistics,
    LayerGradients,
    Outliers,
    gradient_statistics,
    symmetric_log_bins,
)
from kfac_opt.fisher.matrix import FisherMatrix
from kfac_opt.fisher.monitor import GradientMonitor
from kfac_opt.fisher.spectrum import SpectralDensity, SpectralErrors, spectral_density
from kfac_opt.fisher.variance import (
    EstimatorVariance,
    PartVariance,
    SecondVariance,
    decay_for,
    effective_labels,
    entrywise_variance,
    estimator_variance,
)

__all__ = [
    "EstimatorVariance",
    "FisherMatrix",
    "GradientMonitor",
    "GradientStatistics",
    "LayerGradients",
    "Outliers",
    "PartVariance",
    "SecondVariance",
    "SpectralDensity",
    "SpectralErrors",
    "decay_for",
    "effective_labels",
    "entrywise_variance",
    "estimator_variance",
    "gradient_statistics",
    "spectral_density",
    "symmetric_log_bins",
]
