"""K-FAC for PyTorch: natural gradient, variational inference and Fisher diagnostics."""
