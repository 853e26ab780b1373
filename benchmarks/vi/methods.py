"""Training with each method, and the predictions of what came out."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.config import ConfigError
from benchmarks.common.data import Dataset
from benchmarks.common.models import build_model
from benchmarks.vi.config import MethodConfig, RateSchedule
from benchmarks.vi.members import LAPLACE_PRIOR, MemberStore, load_member, save_member
from kfac_opt import KFAC, KFACVI, Posterior
from kfac_opt.bayes.batchnorm import update_bn
from kfac_opt.bayes.laplace import fit_laplace
from kfac_opt.bayes.linearized import linearized_predict
from kfac_opt.bayes.prediction import Prediction, mixture, predict, summarize
from kfac_opt.likelihoods import Categorical

EVAL_BATCH = 256


@dataclass(frozen=True)
class Training:
    """How long and in what steps; the same for all methods of an experiment."""

    model: dict[str, Any]
    num_steps: int
    epoch_steps: int
    batch_size: int
    schedule: RateSchedule
    evaluations: int
    eval_examples: int | None
    device: str = "cpu"


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
    method: MethodConfig,
    settings: dict[str, Any],
    data: Dataset,
    training: Training,
    seed: int,
    store: MemberStore | None = None,
) -> Trained:
    """Trains the net, or all members, and fits what comes after the training; nets found in ``store`` are not trained again."""
    seeds = [seed + 1000 * number for number in range(method.members)]
    members = [_member(method, settings, data, training, one, store) for one in seeds]
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
    method: MethodConfig, settings: dict[str, Any], data: Dataset, training: Training, seed: int, store: MemberStore | None
) -> Trained:
    """One net, from the store if it is there."""
    if store is None or method.kind == "ivon":  # IVON draws from the state of its optimizer
        return _train_one(method, settings, data, training, seed)
    path = store.path(method, settings, seed)
    if path.is_file():
        model = with_dropout(build_model(training.model, seed), method.dropout).to(training.device).eval()
        posterior, facts = load_member(path, model, training.device)
        curve = Curve(**facts.pop("curve"))
        return Trained(method, [model], [posterior] if posterior is not None else [], curve=curve, **facts)
    trained = _train_one(method, settings, data, training, seed)
    facts = {name: getattr(trained, name) for name in ("seconds", "diverged", "dropped_samples")}
    posterior = trained.posteriors[0] if trained.posteriors else None
    save_member(path, trained.models[0], posterior, {**facts, "curve": asdict(trained.curve)})
    return trained


def _train_one(method: MethodConfig, settings: dict[str, Any], data: Dataset, training: Training, seed: int) -> Trained:
    model = with_dropout(build_model(training.model, seed), method.dropout).to(training.device)
    model.train()
    optimizer = build(method, settings, model, len(data.train_inputs), seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = method.schedule or training.schedule
    trained = Trained(method, [model])
    batches = data.batches(training.batch_size, seed)
    marks = {round((k + 1) * training.num_steps / training.evaluations) for k in range(training.evaluations)}
    losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[training.device] if training.device.startswith("cuda") else []):
        torch.manual_seed(seed)  # dropout and IVON draw from the global generator
        start = time.perf_counter()
        for step in range(training.num_steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step, training.num_steps, training.epoch_steps)
            losses.append(_step(method, optimizer, model, *next(batches)))
            if step + 1 in marks:
                trained.seconds += time.perf_counter() - start
                _note(trained.curve, model, data, training, step + 1)
                start = time.perf_counter()
        trained.seconds += time.perf_counter() - start
    return _finished(trained, optimizer, data, losses)


def _step(method: MethodConfig, optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One training step; returns the mini-batch loss (the mean over samples), detached."""

    def backward() -> Tensor:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    optimizer.zero_grad()
    if method.kind == "kfac_vi" and method.num_samples:
        losses = []
        for _ in optimizer.weight_samples(method.num_samples):
            losses.append(backward())
        loss = torch.stack(losses).mean()
    elif method.kind == "ivon":
        losses = []
        for _ in range(method.num_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                losses.append(backward())
        loss = torch.stack(losses).mean()
    else:
        loss = backward()
    optimizer.step()
    return loss


def _finished(trained: Trained, optimizer: Any, data: Dataset, losses: list[Tensor]) -> Trained:
    model = trained.models[0].eval()
    last = torch.stack(losses[-max(1, len(losses) // 10) :]).mean()
    learnt_nothing = float(last) > 0.95 * math.log(data.num_classes)
    trained.diverged = not math.isfinite(last) or learnt_nothing or not trained.is_finite
    if isinstance(optimizer, KFACVI) and trained.is_finite:
        trained.posteriors = [optimizer.posterior()]
        trained.dropped_samples = optimizer.dropped_samples
        # The running statistics followed the drawn weights.
        update_bn(model, data.train_inputs[:10_000].split(EVAL_BATCH), posterior=trained.posteriors[0])
    if isinstance(optimizer, KFAC | KFACVI):
        optimizer.detach()
    if trained.method.kind == "ivon":
        trained.sampler = optimizer.sampled_params
    return trained


@torch.no_grad()
def _note(curve: Curve, model: nn.Module, data: Dataset, training: Training, step: int) -> None:
    curve.epochs.append(step / training.epoch_steps)
    model.eval()
    for values, inputs, targets in (
        (curve.train_accuracy, data.train_inputs, data.train_targets),
        (curve.test_accuracy, data.test_inputs, data.test_targets),
    ):
        number = len(inputs) if training.eval_examples is None else training.eval_examples
        logits = torch.cat([model(x) for x in inputs[:number].split(EVAL_BATCH)])
        values.append(float((logits.argmax(-1) == targets[:number]).double().mean()))
    model.train()


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
    return KFACVI(model, generator=source, **{"num_data": num_data, **settings})


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
