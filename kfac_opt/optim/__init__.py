"""Optimizers: KFAC and its siblings."""
