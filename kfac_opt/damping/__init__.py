"""Damping that changes during training, used like a learning-rate scheduler."""

from kfac_opt.damping.levenberg import LevenbergMarquardt
from kfac_opt.damping.rule import DampingRule
from kfac_opt.damping.schedules import ExponentialDamping, LinearDamping
from kfac_opt.damping.trust_region import TrustRegionDamping

__all__ = ["DampingRule", "ExponentialDamping", "LevenbergMarquardt", "LinearDamping", "TrustRegionDamping"]
