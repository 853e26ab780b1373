"""Training with each method, and the predictions of what came out."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.config import ConfigError, resolved
from benchmarks.common.data import Dataset
from benchmarks.common.models import build_model
from benchmarks.common.results import fingerprint
from benchmarks.common.tasks import evaluate
from benchmarks.common.train import Loop
from benchmarks.vi import published
from benchmarks.vi.config import MethodConfig, VIConfig
from kfac_opt import KFAC, KFACVI, Posterior
from kfac_opt.bayes.batchnorm import update_bn
from kfac_opt.bayes.laplace import fit_laplace
from kfac_opt.bayes.linearized import linearized_predict
from kfac_opt.bayes.prediction import Prediction, mixture, predict, summarize
from kfac_opt.likelihoods import Categorical

EVAL_BATCH = 256


LAPLACE_PRIOR = "laplace_prior"
"""Among the settings: prior precision of a Laplace posterior."""
_AFTER_THE_TRAINING = ("members", "laplace", "search", "start", "settings")
_OF_THE_TRAINING = ("data", "model", "epochs", "batch_size", "schedule", "evaluations", "eval_examples", "device")


@dataclass
class Curve:
    """Accuracy at the mean over the training, by epochs."""

    epochs: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


@dataclass
class Trained:
    """What a training left behind.

    Attributes:
        models: one net, or the members of an ensemble, in evaluation mode.
        posteriors: over the weights of each net, if there are any.
        sampler: context of one draw of an optimizer's own (IVON).
        seconds: of training, evaluations excluded.
        diverged: the loss was not finite, or the net ended no better than guessing.
    """

    method: MethodConfig
    models: list[nn.Module]
    posteriors: list[Posterior] = field(default_factory=list)
    sampler: Callable[[], Any] | None = None
    curve: Curve = field(default_factory=Curve)
    seconds: float = 0.0
    diverged: bool = False
    dropped_samples: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(p).all()) for model in self.models for p in model.parameters())

    def at_mean(self, inputs: Tensor) -> Prediction:
        """Prediction of the net at its mean; of all nets, each at the mean of its posterior, where they have posteriors."""
        models = self.models if self.posteriors else self.models[:1]
        return self._summary(inputs, lambda x: (model(x) for model in models), len(models))

    def ensemble(self, inputs: Tensor, num_samples: int, seed: int) -> Prediction | None:
        """Prediction of the ensemble this method has, None if it has none."""
        source = torch.Generator(inputs.device).manual_seed(seed)
        if self.method.laplace == "linearized" and self.posteriors:
            return linearized_predict(self.models[0], self.posteriors[0], inputs.split(EVAL_BATCH), 4 * num_samples, source)
        if self.posteriors and self.method.num_samples:
            each = -(-num_samples // len(self.models))
            pairs = zip(self.models, self.posteriors, strict=True)
            return mixture([predict(model, q, inputs.split(EVAL_BATCH), each, source) for model, q in pairs])
        if len(self.models) > 1:
            return self._summary(inputs, lambda x: (model(x) for model in self.models), len(self.models))
        if self.method.dropout:
            return self._summary(inputs, lambda x: self._dropped_out(x, num_samples, seed), num_samples)
        if self.sampler is not None:
            return self._summary(inputs, lambda x: self._drawn(x, num_samples, seed), num_samples)
        return None

    def _dropped_out(self, x: Tensor, number: int, seed: int) -> Iterator[Tensor]:
        layers = [module for module in self.models[0].modules() if isinstance(module, nn.Dropout)]
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            for layer in layers:
                layer.train()
            try:
                for _ in range(number):
                    yield self.models[0](x)
            finally:
                for layer in layers:
                    layer.eval()

    def _drawn(self, x: Tensor, number: int, seed: int) -> Iterator[Tensor]:
        assert self.sampler is not None
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)  # the same draws for every batch
            for _ in range(number):
                with self.sampler():
                    yield self.models[0](x)

    @torch.no_grad()
    def _summary(self, inputs: Tensor, outputs: Callable[[Tensor], Iterator[Tensor]], number: int) -> Prediction:
        parts = [summarize(outputs(x), Categorical(), number, False) for x in inputs.split(EVAL_BATCH)]
        names = ("probabilities", "entropy", "expected_entropy", "variance")
        return Prediction(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def is_installed(method: MethodConfig) -> bool:
    """Whether the packages of this method are there; only IVON needs one that is not a dependency."""
    return method.kind != "ivon" or importlib.util.find_spec("ivon") is not None


def train_method(
    method: MethodConfig, settings: dict[str, Any], data: Dataset, config: VIConfig, seed: int, folder: Path | None = None
) -> Trained:
    """Trains the net, or all members, and fits what comes after the training.

    Args:
        folder: of trained nets: each is trained once, also when several ensembles and seeds share it.
    """
    seeds = [seed + 1000 * number for number in range(method.members)]
    members = [_member(method, settings, data, config, one, folder) for one in seeds]
    first = members[0]
    trained = Trained(
        method,
        [part.models[0] for part in members],
        [posterior for part in members for posterior in part.posteriors],
        first.sampler,
        first.curve,
        sum(part.seconds for part in members),
        any(part.diverged for part in members),
        first.dropped_samples,
    )
    if method.laplace is not None and not trained.diverged:
        start = time.perf_counter()
        batches = list(zip(data.train_inputs.split(EVAL_BATCH), data.train_targets.split(EVAL_BATCH), strict=True))
        prior = settings.get(LAPLACE_PRIOR, "evidence")
        trained.posteriors = [fit_laplace(first.models[0], batches, prior_precision=prior, fisher="mc")]
        trained.seconds += time.perf_counter() - start
    return trained


def _member(
    method: MethodConfig, settings: dict[str, Any], data: Dataset, config: VIConfig, seed: int, folder: Path | None
) -> Trained:
    """One net, from its file if it is there: ensembles of any size share it, and posteriors fitted afterwards."""
    if folder is None or method.kind == "ivon":  # IVON draws from the state of its optimizer
        return _train_one(method, settings, data, config, seed)
    own = {key: value for key, value in asdict(method).items() if key not in _AFTER_THE_TRAINING}
    used = {key: value for key, value in settings.items() if key != LAPLACE_PRIOR}
    shared = [len(data.train_inputs), *(resolved(getattr(config, key)) for key in _OF_THE_TRAINING)]
    path = folder / f"{method.kind}-{seed}-{fingerprint([own, used, shared, seed])}.pt"
    if path.is_file():
        state = torch.load(path, map_location=config.device, weights_only=True)
        model = with_dropout(build_model(config.model, seed), method.dropout).to(config.device).eval()
        model.load_state_dict(state["model"])
        posteriors = [Posterior.from_state_dict(found) for found in state["posteriors"]]
        return Trained(method, [model], posteriors, **{**state["facts"], "curve": Curve(**state["facts"]["curve"])})
    trained = _train_one(method, settings, data, config, seed)
    facts = {name: getattr(trained, name) for name in ("seconds", "diverged", "dropped_samples")}
    state = {"model": trained.models[0].state_dict(), "posteriors": [q.state_dict() for q in trained.posteriors]}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save({**state, "facts": {**facts, "curve": asdict(trained.curve)}}, part)
    os.replace(part, path)
    return trained


def _train_one(method: MethodConfig, settings: dict[str, Any], data: Dataset, config: VIConfig, seed: int) -> Trained:
    model = with_dropout(build_model(config.model, seed), method.dropout).to(config.device).train()
    optimizer: Any = build(method, settings, model, len(data.train_inputs), seed)
    trained, losses, schedule = Trained(method, [model]), [], method.schedule or config.schedule
    epoch_steps = max(1, len(data.train_inputs) // config.batch_size)
    num_steps = max(1, round(config.epochs * epoch_steps))
    marks = {round((k + 1) * num_steps / config.evaluations) for k in range(config.evaluations)}

    def backward(x: Tensor, y: Tensor) -> Tensor:
        """One pass, or one with each weight sample; returns the mean loss over samples."""
        found = []
        for _ in _draws(method, optimizer):
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            found.append(loss.detach())
        return torch.stack(found).mean()

    loop = Loop(
        model, optimizer, data.batches(config.batch_size, seed), functional.cross_entropy, num_steps,
        lambda step: schedule.factor(step, num_steps, epoch_steps), backward,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[config.device] if config.device.startswith("cuda") else []):
        torch.manual_seed(seed)  # dropout and IVON draw from the global generator
        for done, loss in loop:
            losses.append(loss)
            if done in marks:
                with loop.stopped():
                    _note(trained.curve, model, data, config.eval_examples, done / epoch_steps)
    trained.seconds = loop.seconds
    last = float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())
    learnt_nothing = last > 0.95 * math.log(data.num_classes)
    trained.diverged = loop.broken_step is not None or not math.isfinite(last) or learnt_nothing or not trained.is_finite
    model.eval()
    if method.kind == "kfac_vi" and trained.is_finite:
        trained.posteriors, trained.dropped_samples = [optimizer.posterior()], optimizer.dropped_samples
        # The running statistics followed the drawn weights.
        update_bn(model, data.train_inputs[:10_000].split(EVAL_BATCH), posterior=trained.posteriors[0])
    getattr(optimizer, "detach", lambda: None)()
    trained.sampler = optimizer.sampled_params if method.kind == "ivon" else None
    return trained


def _draws(method: MethodConfig, optimizer: Any) -> Iterator[None]:
    """Once for every pass of a step, with the weights that it should see."""
    if method.kind == "kfac_vi" and method.num_samples:
        yield from (None for _ in optimizer.weight_samples(method.num_samples))
    elif method.kind == "ivon":
        for _ in range(method.num_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                yield
    else:
        yield


def _note(curve: Curve, model: nn.Module, data: Dataset, number: int | None, epochs: float) -> None:
    curve.epochs.append(epochs)
    curve.train_accuracy.append(1 - evaluate(model, data.train_inputs[:number], data.train_targets[:number]).error)
    curve.test_accuracy.append(1 - evaluate(model, data.test_inputs[:number], data.test_targets[:number]).error)


def build(method: MethodConfig, settings: dict[str, Any], model: nn.Module, num_data: int, seed: int) -> torch.optim.Optimizer:
    """The optimizer of this method.

    Raises:
        ConfigError: for IVON where it is not installed.
    """
    parameters = model.parameters()
    if method.kind == "sgd":
        return torch.optim.SGD(parameters, **{"momentum": 0.9, "nesterov": True, **settings})
    if method.kind == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if method.kind == "ivon":
        if not is_installed(method):
            raise ConfigError("method 'ivon' needs the package ivon-opt. Install it, or leave the method out.")
        import ivon

        optimizer: torch.optim.Optimizer = ivon.IVON(parameters, **{"ess": num_data, **settings})
        return optimizer
    source = torch.Generator().manual_seed(seed)
    if method.kind == "kfac":
        return KFAC(model, generator=source, **{name: value for name, value in settings.items() if name != LAPLACE_PRIOR})
    own = {name: value for name, value in settings.items() if name != published.SETTING}
    variational = KFACVI(model, generator=source, **{"num_data": num_data, **own})
    if published.SETTING in settings:
        published.follow_published_rules_(variational, float(settings[published.SETTING]))
    return variational


def with_dropout(model: nn.Module, share: float) -> nn.Module:
    """Dropout before every Linear layer of a ``Sequential`` but the first layer with weights."""
    if not share:
        return model
    layers: list[nn.Module] = []
    seen_weights = False
    for layer in model.children():
        if isinstance(layer, nn.Linear) and seen_weights:
            layers.append(nn.Dropout(share))
        seen_weights = seen_weights or any(True for _ in layer.parameters())
        layers.append(layer)
    return nn.Sequential(*layers)
