"""Fast kernels for symmetric matrices on a CPU; every one has a plain counterpart."""
