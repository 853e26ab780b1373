"""What an experiment leaves behind: tables and figures on one page, JSON, TensorBoard; and the way there."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jinja2 import Environment
from markupsafe import Markup
from tqdm import tqdm

from benchmarks.common.config import ExperimentConfig, parse_arguments
from benchmarks.common.figures import Figure
from benchmarks.common.results import describe_machine, describe_versions, provenance, write_json, write_text
from benchmarks.common.statistics import text

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Table:
    """A frame of text under its caption. ``words``: its cells are sentences rather than numbers."""

    caption: str
    frame: pd.DataFrame
    words: bool = False

    @classmethod
    def of(cls, caption: str, rows: Sequence[Mapping[str, Any]], *, words: bool = False) -> Table:
        """From one mapping of column to value per row: text, numbers, or a list of numbers, one per seed."""
        cells = [{key: text(value) for key, value in row.items()} for row in rows]
        return cls(caption, pd.DataFrame(cells).fillna("—"), words)

    @property
    def html(self) -> Markup:
        """As a table of a page, all text escaped."""
        with pd.option_context("display.max_colwidth", None):
            return Markup(self.frame.to_html(index=False, border=0))

    def __str__(self) -> str:
        if self.words:
            return "\n".join("- " + " | ".join(row) for row in self.frame.itertuples(index=False))
        return self.frame.to_string(index=False, justify="left")


@dataclass(frozen=True)
class Finding:
    """A statement of a study, and whether it holds here, as data.

    Attributes:
        rule: what must be so for it to hold.
        numbers: what the rule looks at, by name.
    """

    statement: str
    rule: str
    numbers: dict[str, float]
    verdict: Literal["yes", "no", "in part", "not shown"]


def verdict(holds: bool | float | None) -> Literal["yes", "no", "in part", "not shown"]:
    """``yes`` or ``no``; of a share of cases ``in part`` between; ``not shown`` for None."""
    if holds is None:
        return "not shown"
    return "yes" if holds >= 1.0 else "no" if holds <= 0.0 else "in part"


def findings_table(source: str, findings: Sequence[Finding]) -> Table:
    """The study's statements beside ours."""
    rows = []
    for found in findings:
        numbers = "; ".join(f"{name} {text(value)}" for name, value in found.numbers.items())
        rows.append({"the study": found.statement, "here": found.verdict, "rule": found.rule, "in numbers": numbers})
    return Table.of(f"{source}: what the study found, and whether it holds here.", rows, words=True)


@dataclass
class Report:
    """Pieces of one experiment.

    Attributes:
        content: the numbers, plain data, for the JSON; ``full``: what is too large to be kept, for the JSON below ``out``.
        figures: by file stem.
        scalars: for TensorBoard: ``{run/tag: [(step, value)]}``.
        place: of the figures' files, seen from the page.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    place: str = ""

    @property
    def anchor(self) -> str:
        """The name of the section in links."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def run_script(
    config_class: type[Any], run: Callable[[Any], Report], arguments: Sequence[str] | None, description: str, default: str | None
) -> Report:
    """Command line to files: reads the config, runs the experiment, prints its tables and writes what it leaves.

    Args:
        default: config below ``configs/``.
    """
    config = parse_arguments(config_class, arguments, description=description, default=default and CONFIGS / default)
    torch.set_num_threads(config.threads)
    report = run(config)
    print_report(report)
    print(f"page: {write_report(report, config)}")
    return report


def print_report(report: Report) -> None:
    """Tables and notes on the terminal."""
    for table in report.tables:
        print(f"{table.caption}\n{table}\n")
    for note in report.notes:
        print(note)


def write_report(report: Report, config: ExperimentConfig) -> Path:
    """Everything below the experiment's folder, the JSON also in ``keep``; returns the page."""
    found = [asdict(finding) for finding in report.findings]
    content = {**provenance(config, config.seed, config.device), "findings": found, **report.content}
    write_json(config.folder / f"{config.name}.json", {**content, **report.full})
    if config.keep is not None:
        write_json(config.keep / f"{config.name}.json", content)
    _write_tensorboard(config.folder / "tensorboard", report.scalars)
    return write_page(config.folder, report.title, [report], config.device)


def write_page(folder: Path, title: str, sections: Sequence[Report], device: str = "cpu", intro: Sequence[str] = ()) -> Path:
    """The page ``folder/index.html`` of one or several reports, and its pictures; all text is escaped."""
    for section in sections:
        for stem, figure in section.figures.items():
            path = folder / section.place / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(figure.png)
    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    return write_text(folder / "index.html", template.render(title=title, sections=sections, intro=intro, footer=_footer(device)))


def _footer(device: str) -> str:
    machine, versions = describe_machine(device), describe_versions()
    parts = [str(machine.get("gpu") or machine["cpu"]), f"{machine['cores']} cores", f"{machine['threads']} thread(s)"]
    return ", ".join(parts + [f"{name} {version}" for name, version in versions.items() if version != "not installed"])


def _write_tensorboard(folder: Path, scalars: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, Any] = {}
    for path, points in scalars.items():
        run, _, tag = path.rpartition("/")
        if run not in writers:
            for old in (folder / run).glob("events.*"):
                old.unlink()
            writers[run] = SummaryWriter(str(folder / run))
        for step, value in points:
            writers[run].add_scalar(tag, value, step)
    for writer in writers.values():
        writer.close()


def progress(total: int, description: str, done: int = 0) -> tqdm:
    """A bar on a terminal, in a log file a line now and then; ``done`` before does not enter the time estimate."""
    lively = sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=description, mininterval=0.2 if lively else 30.0, miniters=1, file=sys.stderr)
