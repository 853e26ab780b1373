"""Registry of the sections of the demo page: an experiment adds one by decorating a function.

    @demo_section("Damping", order=20)
    def damping_section(context: DemoContext) -> Section: ...

The module must be named in ``benchmarks.demo.SECTION_MODULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.page import Section


@dataclass(frozen=True)
class DemoContext:
    """What a section gets.

    Attributes:
        out: folder for the files that the section wants to keep (its own, exists).
        device: where to train.
        scale: 1.0 for the full demo; tests use less. Sections multiply their budgets (trials, steps, seeds) with it.
        seed: base seed.
    """

    out: Path
    device: str = "cpu"
    scale: float = 1.0
    seed: int = 0

    def budget(self, number: int, at_least: int = 1) -> int:
        """``number`` scaled, but never below ``at_least``."""
        return max(at_least, round(number * self.scale))


SectionFunction = Callable[[DemoContext], Section]


@dataclass(frozen=True)
class RegisteredSection:
    """A section function with its title and its place on the page (lower ``order`` first)."""

    title: str
    order: int
    function: SectionFunction


SECTIONS: dict[str, RegisteredSection] = {}


def demo_section(title: str, *, order: int) -> Callable[[SectionFunction], SectionFunction]:
    """Registers the decorated function as a section of the demo page; the same title replaces an earlier one."""

    def register(function: SectionFunction) -> SectionFunction:
        SECTIONS[title] = RegisteredSection(title, order, function)
        return function

    return register


def registered_sections() -> list[RegisteredSection]:
    """All sections in the order of the page."""
    return sorted(SECTIONS.values(), key=lambda section: section.order)
