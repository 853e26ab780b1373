"""Does the best learning rate move with the width of the net? A narrow and a wide MLP and GPT.

    python -m benchmarks.battery.width --config configs/battery/width.yaml
    python -m benchmarks.battery.width --config configs/battery/width.yaml --report_only true --keep benchmarks/results/battery

Finished runs are lines of a log; the figure is made from the kept JSON.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.battery.run import Contestant, Schedule, make_factory, train
from benchmarks.battery.tasks import SHAKESPEARE, TASKS, BatteryTask
from benchmarks.common.config import LOCAL, parse_arguments
from benchmarks.common.models import GPT, mlp
from benchmarks.common.optimizers import default_settings
from benchmarks.common.results import append_json_line, fingerprint, provenance, read_json, read_json_lines, write_json


def _gpt(width: int) -> nn.Module:
    return GPT(context=64, num_layers=2, width=width)


NETS: dict[str, tuple[str, Any, BatteryTask]] = {
    "mlp": ("MNIST, MLP 784-w-w-w-10", lambda width: mlp((784, width, width, width, 10)), TASKS["mnist_mlp"]),
    "gpt": ("Tiny Shakespeare, GPT 2 × w", _gpt, BatteryTask("", nn.Module, SHAKESPEARE, steps=60, batch_size=8)),
}


@dataclass(frozen=True)
class WidthConfig:
    """Nets, widths, and the learning rates of each contestant (``rates``)."""

    name: str
    nets: list[str]
    widths: list[int]
    contestants: dict[str, Contestant]
    seeds: list[int] = field(default_factory=lambda: [0])
    schedule: Schedule = field(default_factory=Schedule)
    threads: int = 1
    report_only: bool = field(default=False, metadata=LOCAL)
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/battery"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, keeps the losses, draws."""
    config = parse_arguments(WidthConfig, arguments, description="The best learning rate of a narrow and of a wide net.")
    torch.set_num_threads(config.threads)
    path = (config.keep or config.out / config.name) / f"{config.name}.json"
    content = {**provenance(config, config.seeds[0]), "losses": run(config)}
    path = write_json(path, content)
    path.with_suffix(".png").write_bytes(figure(read_json(path)))
    for (net, name), rates in best_rates(read_json(path)).items():
        print(f"{net}, {name}: " + ", ".join(f"width {width}: {rate:.3g}" for width, rate in rates.items()))


def run(config: WidthConfig) -> dict[str, Any]:
    """Final training losses ``[net][contestant][width][rate]``, means over seeds; None for a run that broke."""
    path = config.out / config.name / "runs.jsonl"
    known = {line["identity"]: line["final_loss"] for line in read_json_lines(path)}
    losses: dict[str, Any] = {}
    for net in config.nets:
        _, build, task = NETS[net]
        dataset = None
        for name, contestant in config.contestants.items():
            for width in config.widths:
                for rate in contestant.rates:
                    settings, values = {**contestant.fixed, "lr": rate}, []
                    for seed in config.seeds:
                        made_by = [contestant.optimizer, contestant.tag, default_settings(contestant.optimizer)]
                        identity = fingerprint([net, width, task.steps, made_by, settings, seed])
                        if identity not in known and not config.report_only:
                            dataset = dataset or task.data(config.data_root)
                            own = replace(task, model=functools.partial(build, width))
                            result = train(own, dataset, make_factory(contestant, own, settings, seed), seed, config.schedule)
                            line = {
                                "identity": identity,
                                "net": net,
                                "width": width,
                                "contestant": name,
                                "lr": rate,
                                "seed": seed,
                            }
                            append_json_line(
                                path, {**line, **{key: result[key] for key in ("final_loss", "test_loss", "seconds")}}
                            )
                            known[identity] = result["final_loss"]
                        values.append(known.get(identity))
                    whole = all(value is not None and math.isfinite(value) for value in values)
                    by_width = losses.setdefault(net, {}).setdefault(name, {}).setdefault(str(width), {})
                    by_width[f"{rate:g}"] = sum(values) / len(values) if whole else None  # type: ignore[arg-type]
    return losses


def best_rate(losses: dict[str, float | None]) -> float:
    """The bottom of the parabola through the lowest loss and its neighbours, over the logarithm of the rate."""
    points = [(math.log(float(rate)), math.log(loss)) for rate, loss in losses.items() if loss is not None]
    place = min(range(len(points)), key=lambda index: points[index][1])
    if place in (0, len(points) - 1):
        return math.exp(points[place][0])
    (x0, y0), (x1, y1), (x2, y2) = points[place - 1 : place + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return math.exp(0.5 * (x0 + x1) - left * (x2 - x0) / (2 * (right - left)))


def best_rates(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Best rate by width, for each net and contestant."""
    return {
        (net, name): {width: best_rate(losses) for width, losses in by_width.items()}
        for net, by_name in content["losses"].items()
        for name, by_width in by_name.items()
    }


def figure(content: dict[str, Any]) -> bytes:
    """PNG: a row for each net, a column for each contestant, final loss over the rate, a line for each width."""
    from benchmarks.common.figures import COLOURS, figure_png, house_style, plt

    names = list(content["config"]["contestants"])
    nets = list(content["losses"])
    with house_style():
        canvas, grid = plt.subplots(
            len(nets), len(names), figsize=(4.0 * len(names), 3.0 * len(nets)), squeeze=False, sharey="row"
        )
        for row, net in zip(grid, nets, strict=True):
            for axes, name in zip(row, names, strict=True):
                for index, (width, losses) in enumerate(content["losses"][net][name].items()):
                    points = [(float(rate), loss) for rate, loss in losses.items() if loss is not None]
                    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[index], label=f"width {width}", markersize=4)
                    axes.axvline(best_rate(losses), color=COLOURS[index], linewidth=1.0, linestyle=":")
                label = content["config"]["contestants"][name]["label"]
                axes.set(xscale="log", yscale="log", title=f"{label}: {NETS[net][0]}", xlabel="learning rate")
            row[0].set_ylabel("final training loss")
            row[-1].legend()
        return figure_png(canvas)


if __name__ == "__main__":
    main()
