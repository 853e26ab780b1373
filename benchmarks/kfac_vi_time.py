"""What weight samples cost: a step of KFACVI beside KFAC's, a draw, an ensemble beside plain forwards.

    python -m benchmarks.kfac_vi_time                   # LeNet5; --model.name mlp for another net

All numbers are ratios of times taken in turn in the same run, so that a busy machine slows both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.command import run_command
from benchmarks.common.config import ExperimentConfig
from benchmarks.common.models import build_model
from benchmarks.common.report import Report, Table, progress, run_script
from benchmarks.common.timing import Timed, cycle_ratio, interleave
from kfac_opt import KFAC, KFACVI
from kfac_opt.bayes.posterior import Posterior
from kfac_opt.bayes.prediction import predict

PERIOD = 100  # steps between refreshes, the default
AT_ONCE = 8  # draws are made so many at a time in training and in predictions


@dataclass(frozen=True, kw_only=True)
class TimeConfig(ExperimentConfig):
    """What is timed.

    Attributes:
        input_shape: of one example, filled with random numbers.
        batch_size: of the training steps.
        predict_batches: batch sizes of the ensemble predictions.
        predict_samples: draws of an ensemble.
        rounds: timed steps of each optimizer; whole multiples of 100 count every refresh with its share.
    """

    name: str = "kfac_vi_time"
    model: dict[str, Any] = field(default_factory=lambda: {"name": "lenet5"})
    input_shape: list[int] = field(default_factory=lambda: [3, 32, 32])
    num_classes: int = 10
    batch_size: int = 64
    predict_batches: list[int] = field(default_factory=lambda: [1, 16, 64, 256])
    predict_samples: int = 50
    rounds: int = 300

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.predict_samples < 1:
            raise ValueError(f"rounds and predict_samples must be >= 1, got {self.rounds} and {self.predict_samples}")


def main(arguments: Sequence[str] | None = None) -> Report:
    """Measures and writes the ratios."""
    return run_script(TimeConfig, run, arguments, "The price of weight samples.", None)


def run(config: TimeConfig) -> Report:
    """Training steps and predictions."""
    ratios = {**_training(config), **_prediction(config)}
    rows = [{"what": name, "ratio": value} for name, value in ratios.items()]
    return Report("The price of weight samples", tables=[Table.of("Times taken in turn.", rows)], content={"ratios": ratios})


def _clock(config: TimeConfig) -> Callable[[], float]:
    """Processor time of a CPU, so that other processes do not count; wall time around a synchronised device."""
    return time.process_time if config.device == "cpu" else time.perf_counter


def _batch(config: TimeConfig, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(size, *config.input_shape, generator=generator)
    y = torch.randint(config.num_classes, (size,), generator=generator)
    return x.to(config.device), y.to(config.device)


def _training(config: TimeConfig) -> dict[str, float]:
    x, y = _batch(config, config.batch_size)
    nets = {name: build_model(config.model, config.seed).to(config.device) for name in ("KFAC", "KFACVI", "plain")}
    kfac, variational = KFAC(nets["KFAC"]), KFACVI(nets["KFACVI"], num_data=50_000)

    def backward(net: nn.Module) -> None:
        functional.cross_entropy(net(x), y).backward()

    def kfac_step() -> None:
        kfac.zero_grad()
        backward(nets["KFAC"])
        kfac.step()

    def variational_step() -> None:
        variational.zero_grad()
        for _ in variational.weight_samples(1):
            backward(nets["KFACVI"])
        variational.step()

    def plain() -> None:
        nets["plain"].zero_grad()
        backward(nets["plain"])

    variational_step()
    posterior = variational.posterior()
    contestants: dict[str, Callable[[], Any]] = {
        "KFAC": kfac_step,
        "KFACVI": variational_step,
        "draw": posterior.sample,
        "draws": lambda: [posterior.sample() for _ in range(AT_ONCE)],
        "pairs": lambda: _pairs(posterior, AT_ONCE // 2),
        "forward + backward": plain,
    }
    with progress(config.rounds, "training") as bar:
        # The first steps belong to the ramp, where every step refreshes.
        times = interleave(
            {name: Timed(step) for name, step in contestants.items()},
            config.rounds,
            warmup=min(config.rounds, PERIOD + 30),
            device=config.device,
            on_round=bar.update,
            clock=_clock(config),
        )
    period = min(PERIOD, config.rounds)
    plain_seconds = statistics.median(times["forward + backward"])
    row = {name: statistics.median(times[name]) / AT_ONCE / plain_seconds for name in ("draws", "pairs")}
    return {
        "KFACVI step, one sample / KFAC step": cycle_ratio(times["KFACVI"], times["KFAC"], period),
        "one draw alone / forward + backward": statistics.median(times["draw"]) / plain_seconds,
        f"one of {AT_ONCE} draws in a row / forward + backward": row["draws"],
        f"one of {AT_ONCE} draws in antithetic pairs / forward + backward": row["pairs"],
        "KFAC step / forward + backward": cycle_ratio(times["KFAC"], times["forward + backward"], period),
    }


def _pairs(posterior: Posterior, number: int) -> list[dict[str, Tensor]]:
    """μ ± ε, the draws of training with two samples or more."""
    return [
        {name: torch.add(mean, noise[name], alpha=sign) for name, mean in posterior.mean.items()}
        for noise in posterior.deviations(number)
        for sign in (1, -1)
    ]


def _prediction(config: TimeConfig) -> dict[str, float]:
    net = build_model(config.model, config.seed).to(config.device)
    optimizer = KFACVI(net, num_data=50_000)
    x, y = _batch(config, config.batch_size)
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    posterior = optimizer.posterior()
    optimizer.detach()
    net.eval()
    ratios: dict[str, float] = {}
    for size in config.predict_batches:
        inputs, _ = _batch(config, size)

        @torch.no_grad()
        def forwards(inputs: Tensor = inputs) -> None:
            for _ in range(config.predict_samples):
                net(inputs)

        def ensemble(vectorize: Any, antithetic: bool = False, inputs: Tensor = inputs) -> Callable[[], Any]:
            samples = config.predict_samples
            return lambda: predict(net, posterior, inputs, samples, vectorize=vectorize, antithetic=antithetic)

        ensembles = {"loop": ensemble("loop"), "loop, antithetic": ensemble("loop", True), "vmap": ensemble("vmap")}
        times = interleave(
            {"plain": Timed(forwards), **{name: Timed(ensemble) for name, ensemble in ensembles.items()}},
            max(3, config.rounds // 20),
            warmup=1,
            device=config.device,
            clock=_clock(config),
        )
        plain = statistics.median(times["plain"])
        for name in ensembles:
            key = f"predict, batch {size}, {name} / {config.predict_samples} plain forwards"
            ratios[key] = statistics.median(times[name]) / plain
    return ratios


if __name__ == "__main__":
    run_command(main)
