"""What the options of an update rule are where the user gives none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from kfac_opt._curvature.block import DampingScale

UpdateScale = Literal["rms", "natural"]
Auto = Literal["auto"]
T = TypeVar("T")


@dataclass(frozen=True)
class RuleDefaults:
    """Defaults that belong together: a damping or a learning rate means something else under another rule."""

    lr: float
    momentum: float
    damping: float
    damping_scale: DampingScale
    power: float
    ramp_steps: int
    factor_interval: int
    inverse_interval: int
    kl_clip: float | None
    max_relative_update: float | None


RULE_DEFAULTS: dict[str, RuleDefaults] = {
    "natural": RuleDefaults(
        lr=0.1,
        momentum=0.8,
        damping=0.03,
        damping_scale="relative",
        power=1.0,
        ramp_steps=10,
        factor_interval=10,
        inverse_interval=100,
        kl_clip=1e-4,
        max_relative_update=0.05,
    ),
    "rms": RuleDefaults(
        lr=0.015,
        momentum=0.9,
        damping=1e-3,
        damping_scale="mean",
        power=0.5,
        ramp_steps=20,
        factor_interval=5,
        inverse_interval=10,
        kl_clip=None,
        max_relative_update=0.06,
    ),
}


def given_or(value: T | None, default: T) -> T:
    """``default`` for None."""
    return default if value is None else value


def given_or_auto(value: float | Auto | None, default: float | None) -> float | None:
    """``default`` for the word "auto": None switches these options off."""
    return default if value == "auto" else value  # type: ignore[return-value]
