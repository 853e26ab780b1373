"""Private random generators: each purpose has a seed of its own, derived from one base seed and nothing else."""

from __future__ import annotations

import torch

LABELS, WEIGHTS, EVALUATION, POSTERIOR = 1, 2, 4, 5
"""Purposes: sampled labels; draws of training; ``sampled_params()``; ``posterior()``. Seeds of saved states depend on them."""


def derive_seed(base: int, *purpose: int) -> int:
    """A seed for one purpose, independent of its neighbours: a 63-bit mix of the base seed and the numbers."""
    value = base & 0xFFFFFFFFFFFFFFFF
    for number in purpose:
        # splitmix64's finalizer, once per number
        value = (value + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A private generator on this device."""
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator


class Seeds:
    """The base seed of an optimizer, and the private generators that hang on it."""

    def __init__(self, base: int) -> None:
        self.base = base

    def derived(self, *purpose: int) -> int:
        """See :func:`derive_seed`."""
        return derive_seed(self.base, *purpose)

    def generator(self, device: torch.device, *purpose: int) -> torch.Generator:
        """From the base seed and the purpose alone."""
        return seeded(self.derived(*purpose), device)
