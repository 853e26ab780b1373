"""Looking at the Fisher matrix: spectra, estimator variance, gradients."""
