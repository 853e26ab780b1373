"""Experiments with ``kfac_opt``, one module each: ``python -m benchmarks.NAME --config configs/NAME/....yaml``."""
