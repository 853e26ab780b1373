"""What an experiment on the Fisher matrix leaves behind: PNG, page, TensorBoard, JSON, and the study's findings beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.config import parse_arguments
from benchmarks.common.figures import save_png
from benchmarks.common.page import Figure, Section, Table, machine_footer, write_page
from benchmarks.common.results import (
    describe_machine,
    describe_versions,
    provenance,
    tensorboard_writer,
    write_json,
)
from benchmarks.common.tables import text_table


@dataclass(frozen=True)
class Finding:
    """A statement of a study, whether it holds here (``yes``, ``no``, ``in part``), and in which numbers."""

    statement: str
    verdict: str
    ours: str


def verdict(holds: bool | float) -> str:
    """``yes`` or ``no``; of a share of cases ``in part`` between."""
    share = float(holds)
    return "yes" if share >= 1.0 else "no" if share <= 0.0 else "in part"


def findings_table(source: str, findings: Sequence[Finding]) -> Table:
    """The study's statements beside ours."""
    rows = [[f.statement, f.verdict, f.ours] for f in findings]
    return Table(f"{source}: the study's findings, and whether they hold here.", ("the study", "here", "in numbers"), rows)


@dataclass
class Report:
    """Pieces of one experiment.

    Attributes:
        content: the numbers, plain data.
        figures: PNG and caption by file stem.
        scalars: for TensorBoard: ``{tag: [(step, value)]}``.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def section(self) -> Section:
        """As a part of a page."""
        return Section(self.title, self.text, self.tables, list(self.figures.values()), notes=self.notes)


def run_script(
    config_class: type[Any], run: Callable[[Any], Report], arguments: Sequence[str] | None, description: str, default: Path
) -> Report:
    """Command line to files: reads the config, runs the experiment, writes what it leaves and prints its tables."""
    config = parse_arguments(config_class, arguments, description=description, default=default)
    torch.set_num_threads(config.threads)
    report = run(config)
    folder = config.out / config.name
    page = write_report(report, config, folder, config.keep, seed=config.seed, device=config.device, name=config.name)
    for table in report.tables:
        print(text_table(table.header, table.rows), end="\n\n")
    for note in report.notes:
        print(note)
    print(f"page: {page}")
    return report


def write_report(report: Report, config: Any, folder: Path, keep: Path | None, *, seed: int, device: str, name: str) -> Path:
    """Writes everything below ``folder``, JSON and pictures also into ``keep``; returns the page."""
    content = {
        **provenance(config, seed, device),
        "findings": [asdict(finding) for finding in report.findings],
        **report.content,
    }
    footer = machine_footer(describe_machine(device), describe_versions())
    page = write_page(folder / "index.html", report.title, [report.section()], footer=footer)
    for place in [folder] if keep is None else [folder, keep]:
        write_json(place / f"{name}.json", content)
        for stem, figure in report.figures.items():
            save_png(place / f"{name}_{stem}.png", figure.png)
    _write_tensorboard(folder / "tensorboard", report.scalars, report.figures)
    return page


def _write_tensorboard(folder: Path, scalars: Mapping[str, Sequence[tuple[int, float]]], figures: Mapping[str, Figure]) -> None:
    import io

    import numpy as np
    from matplotlib import image

    writer = tensorboard_writer(folder)
    for tag, points in scalars.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)
    for stem, figure in figures.items():
        pixels = np.asarray(image.imread(io.BytesIO(figure.png), format="png"))
        writer.add_image(stem, pixels[..., :3], 0, dataformats="HWC")
    writer.close()
