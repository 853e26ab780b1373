"""Products with the Fisher matrix and its spectrum, beside curvlinops in the same run.

    pip install curvlinops-for-pytorch
    python -m benchmarks.fisher_speed --config configs/fisher_speed/lenet.yaml

Contestants take turns, medians, on a CPU of processor time: a busy machine changes none of the ratios. Without curvlinops
only our own times are shown.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.command import run_command
from benchmarks.common.config import LOCAL, ExperimentConfig
from benchmarks.common.figures import COLOURS, Figure, finish, subplots
from benchmarks.common.models import build_model
from benchmarks.common.report import Finding, Report, Table, findings_table, run_script, verdict
from benchmarks.common.timing import Timed, interleave
from kfac_opt.fisher import FisherMatrix, spectral_density

PEER = "curvlinops"
SLOW = {"exact: building": 2, "empirical: building and all eigenvalues": 2, "exact: block Lanczos density": 7}
"""In every how many rounds what takes long is timed."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(ExperimentConfig):
    """What is measured. ``batch_size`` is that of the peer's data: it goes through all of it for every product."""

    model: dict[str, Any]
    input_shape: list[int]
    num_classes: int = 10
    num_examples: int = 2000
    batch_size: int = 500
    rounds: int = 5
    columns: int = 10
    memory_gib: float = 2.0
    out: Path = field(default=Path("out/fisher_speed"), metadata=LOCAL)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Measures, prints the table, writes PNG, page, TensorBoard and JSON."""
    return run_script(SpeedConfig, run, arguments, __doc__ or "", "fisher_speed/lenet.yaml")


def run(config: SpeedConfig) -> Report:
    """The measurement without its files."""
    generator = torch.Generator().manual_seed(config.seed)
    inputs = torch.randn(config.num_examples, *config.input_shape, generator=generator).to(config.device)
    targets = torch.randint(config.num_classes, (config.num_examples,), generator=generator).to(config.device)
    model = build_model(config.model, config.seed).to(config.device).eval()
    size = sum(p.numel() for p in model.parameters())
    vector = torch.randn(size, generator=generator).to(config.device)
    block = torch.randn(size, config.columns, generator=generator).to(config.device)
    limit = int(config.memory_gib * 2**30)

    def build(kind: str, blocks: str = "full") -> FisherMatrix:
        return FisherMatrix(model, (inputs, targets), kind=kind, blocks=blocks, memory_limit=limit)  # type: ignore[arg-type]

    exact, layer_wise = build("exact"), build("exact", "layer_wise")
    timed: dict[str, Callable[[], Any]] = {
        "exact, one vector": lambda: exact @ vector,
        "layer-wise, one vector": lambda: layer_wise @ vector,
        f"exact, {config.columns} vectors": lambda: exact @ block,
    }
    peer = peer_operators(model, inputs, targets, config.batch_size)
    if peer is not None:
        full, layers = peer
        pieces = vector.split([operator.shape[1] for operator in layers])
        timed[f"{PEER}: exact, one vector"] = lambda: full @ vector
        timed[f"{PEER}: one operator per layer"] = lambda: [op @ piece for op, piece in zip(layers, pieces)]
        difference = float((exact @ vector - full @ vector).norm() / (full @ vector).norm())
        assert difference < 1e-3, f"the two products differ by {difference:.1e}"
    timed["exact: building"] = lambda: build("exact")
    timed["empirical: building and all eigenvalues"] = lambda: build("empirical").eigenvalues()
    timed["exact: block Lanczos density"] = lambda: spectral_density(exact, "block_lanczos")
    contestants = {name: Timed(_quiet(step), SLOW.get(name, 1)) for name, step in timed.items()}
    on_gpu = torch.device(config.device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = interleave(contestants, config.rounds, warmup=1, device=config.device, clock=clock)
    return make_report(config, size, exact, {name: statistics.median(values) for name, values in seconds.items()})


def peer_operators(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> tuple[Any, list[Any]] | None:
    """The peer's exact Fisher (generalized Gauss-Newton) of the whole net, and one operator per layer."""
    try:
        peer = importlib.import_module(PEER)
    except ImportError:
        return None
    data = list(zip(inputs.split(batch_size), targets.split(batch_size)))
    loss = nn.CrossEntropyLoss()

    def make(parameters: list[nn.Parameter]) -> Any:
        return peer.GGNLinearOperator(model, loss, parameters, data, check_deterministic=False)

    layers = [list(part.parameters(recurse=False)) for part in model.modules()]
    return make(list(model.parameters())), [make(parameters) for parameters in layers if parameters]


def _quiet(step: Callable[[], Any]) -> Callable[[], None]:
    def run_it() -> None:
        step()

    return run_it


def make_report(config: SpeedConfig, size: int, exact: FisherMatrix, medians: dict[str, float]) -> Report:
    """Table, bars and the goals."""
    reference = medians.get(f"{PEER}: exact, one vector")
    rows = [
        {"what": name, "median ms": 1e3 * value, "per product of the peer": reference and value / reference}
        for name, value in medians.items()
    ]
    clock = "seconds on the clock" if torch.device(config.device).type == "cuda" else "processor time"
    held = goals(medians) if reference is not None else []
    return Report(
        title=f"Speed of Fisher products: {config.name}",
        text=[
            f"{config.model['name']} with {size} parameters, {config.num_examples} examples, {config.threads} thread(s). Route: "
            f"{exact.route} ({exact.route_reason})."
        ],
        tables=[
            Table.of(f"Medians of {config.rounds} interleaved rounds, {clock}.", rows),
            *([findings_table("Goals", held)] if held else []),
        ],
        findings=held,
        figures={"times": _bars({n: 1e3 * value for n, value in medians.items() if "vector" in n or "operator" in n})},
        content={"seconds": medians, "parameters": size, "route": exact.route},
    )


def _bars(values: dict[str, float]) -> Figure:
    figure, ax = subplots(figsize=(7, 0.55 * len(values) + 1))
    colours = [COLOURS[1] if name.startswith(PEER) else COLOURS[0] for name in values]
    bars = ax.barh(list(values), list(values.values()), color=colours, height=0.6)
    ax.bar_label(bars, fmt="%.0f", fontsize=9, padding=3)
    ax.invert_yaxis()
    ax.set(xlabel="ms per call")
    ax.grid(visible=False, axis="y")
    return finish(figure, "Products: ours, and the peer's.")


def goals(medians: dict[str, float]) -> list[Finding]:
    """What was aimed at, beside the peer."""
    full = medians[f"{PEER}: exact, one vector"]
    numbers = {
        "full": full / medians["exact, one vector"],
        "layers": medians[f"{PEER}: one operator per layer"] / medians["layer-wise, one vector"],
        "spectrum": medians["empirical: building and all eigenvalues"] / full,
        "building": medians["exact: building"] / full,
    }
    return [
        Finding("full exact product", "at least 2 × faster", {"×": numbers["full"]}, verdict(numbers["full"] >= 2)),
        Finding("layer-wise product", "at least 6 × faster", {"×": numbers["layers"]}, verdict(numbers["layers"] >= 6)),
        Finding(
            "exact empirical spectrum, building included",
            "in the time of at most 20 of its products",
            {"products": numbers["spectrum"], "products to build the exact matrix": numbers["building"]},
            verdict(numbers["spectrum"] <= 20),
        ),
    ]


if __name__ == "__main__":
    run_command(main)
