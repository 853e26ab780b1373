"""What the loss's own gradient says about the likelihood: behind outputs=, along other dimensions, and of terms left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt.likelihoods import Categorical
from tests.support import Lambda, data, mlp


class Wrapped(nn.Module):
    """Returns what ``make`` puts the logits into."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.make = mlp(torch.float32, classes=4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.net(x))


@dataclass
class Unknown:
    """No structure that torch looks into."""

    y: Tensor


def run(optimizer: KFAC, model: nn.Module, loss: Callable[[Any], Tensor], x: Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()


X, Y = data(dtype=torch.float32)
TARGETS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
PICKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "the tensor itself": (lambda z: {"y": z}, lambda d: d["y"]),
    "a product": (lambda z: {"y": z}, lambda d: d["y"] * 1),
    "a slice": (lambda z: {"y": z, "n": 3}, lambda d: d["y"][:, :4]),
    "heads side by side": (lambda z: (z[:, :2], z[:, 2:]), lambda out: torch.cat(out, -1)),
    "heads under each other": (lambda z: [z, 2 * z], lambda out: torch.cat(out)),
}


def squares(out: Any) -> Tensor:
    parts = [out["y"]] if isinstance(out, dict) else list(out)
    joined = parts[0] if parts[0].shape[1] == 4 else torch.cat(parts, -1)
    return F.mse_loss(joined, TARGETS)


def entropies(out: Any) -> Tensor:
    parts = [out["y"]] if isinstance(out, dict) else list(out)
    if parts[0].shape[1] == 4:
        return torch.stack([F.cross_entropy(part, Y) for part in parts]).mean()
    return F.cross_entropy(torch.cat(parts, -1), Y)


@pytest.mark.parametrize("pick", PICKS)
def test_regression_behind_outputs_is_noticed(pick):
    make, outputs = PICKS[pick]
    model = Wrapped(make)
    optimizer = KFAC(model, outputs=outputs, factor_interval=1)
    with pytest.warns(UserWarning, match="likelihood 'categorical' does not fit the loss"):
        run(optimizer, model, squares, X)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("pick", PICKS)
def test_a_cross_entropy_behind_outputs_hears_nothing(pick, fisher):
    make, outputs = PICKS[pick]
    model = Wrapped(make)
    optimizer = KFAC(model, outputs=outputs, fisher=fisher, factor_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, model, entropies, X)


@pytest.mark.parametrize("kind", ["another output", "not linear", "an unknown object"])
def test_what_cannot_be_seen_is_said_once(kind):
    make, outputs, logits = {
        "another output": (lambda z: (1 * z, 2 * z), lambda out: out[0] * 1, lambda out: out[1]),
        "not linear": (lambda z: {"y": z}, lambda d: d["y"].relu(), lambda d: d["y"]),
        "an unknown object": (Unknown, lambda out: out.y * 1, lambda out: out.y),
    }[kind]
    model = Wrapped(make)
    optimizer = KFAC(model, outputs=outputs, factor_interval=1)
    with pytest.warns(UserWarning, match="no loss came through the tensor that outputs= picked in the first 3 passes") as said:
        run(optimizer, model, lambda out: F.mse_loss(logits(out), TARGETS), X, steps=6)
    assert len(said) == 1


def test_passes_without_a_backward_say_nothing():
    model = Wrapped(lambda z: {"y": z})
    optimizer = KFAC(model, outputs=lambda d: d["y"] * 1, factor_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model(X)
            optimizer.step()


SHAPES = {
    "1-D segmentation": ((2, 5, 7), 1),
    "beams of a sequence": ((2, 3, 4, 5), 3),
    "an image": ((2, 5, 4, 3), 1),
    "a sequence": ((2, 7, 5), 2),
}


def shaped(shape: tuple[int, ...], dim: int, likelihood: Any) -> tuple[KFAC, nn.Module, Callable[[Tensor], Tensor]]:
    size = torch.Size(shape).numel() // shape[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, size), Lambda(lambda z: z.reshape(shape)))
    targets = torch.randint(shape[dim], [s for d, s in enumerate(shape) if d != dim])
    optimizer = KFAC(model, likelihood=likelihood, factor_interval=1)
    return optimizer, model, lambda z: F.cross_entropy(z.movedim(dim, 1), targets)


@pytest.mark.parametrize("name", ["1-D segmentation", "beams of a sequence"])
def test_classes_in_another_dimension_are_named_and_the_remedy_works(name):
    shape, dim = SHAPES[name]
    optimizer, model, loss = shaped(shape, dim, "categorical")
    with pytest.warns(UserWarning, match=rf"likelihood.*Choose likelihood=Categorical\(class_dim={dim}\)"):
        run(optimizer, model, loss, X[:2])
    optimizer, model, loss = shaped(shape, dim, Categorical(class_dim=dim))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, model, loss, X[:2])


@pytest.mark.parametrize("name", ["an image", "a sequence"])
def test_the_default_dimension_hears_nothing(name):
    optimizer, model, loss = shaped(*SHAPES[name], "categorical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, model, loss, X[:2])


IGNORED = torch.where(torch.arange(8) < 3, -100, Y)
LEFT_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "ignore_index": lambda z: F.cross_entropy(z, IGNORED),
    "some rows": lambda z: F.cross_entropy(z[3:], Y[3:]),
    "weights of zero": lambda z: (F.cross_entropy(z, Y, reduction="none") * (torch.arange(8) >= 3)).mean(),
}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_terms_that_the_loss_leaves_out_are_hinted_at_once(kind, fisher):
    model = mlp(torch.float32)
    optimizer = KFAC(model, fisher=fisher, factor_interval=1)
    with pytest.warns(UserWarning, match=r"3 of the 8 terms.*optimizer\.masked\(mask\)") as said:
        run(optimizer, model, LEFT_OUT[kind], X)
    assert len(said) == 1


@pytest.mark.parametrize("how", ["masked", "outputs"])
def test_a_masked_fisher_hears_nothing(how):
    model, mask = mlp(torch.float32), IGNORED >= 0
    optimizer = KFAC(model, factor_interval=1, outputs=(lambda z: (z, mask)) if how == "outputs" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.masked(mask):
            run(optimizer, model, LEFT_OUT["ignore_index"], X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [1.0, 300.0])
def test_terms_that_are_certain_are_not_left_out(dtype, gain):
    """With large logits, gradients vanish of their own accord; in half precision so do those of a small loss."""
    model = nn.Sequential(mlp(torch.float32), Lambda(lambda z: gain * z)).to(dtype)
    optimizer = KFAC(model, factor_interval=1, lr=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, model, lambda z: 1e-3 * F.cross_entropy(z.float(), Y), X.to(dtype), steps=3)


def test_a_language_model_whose_loss_shifts_the_labels_hears_nothing():
    """The logits of the last position have no label; other positions without one are hinted at."""
    torch.manual_seed(0)
    model, x, labels = nn.Linear(6, 4), torch.randn(5, 7, 6), torch.randint(4, (5, 7))
    optimizer = KFAC(model, factor_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, model, lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), x)
    other = KFAC(nn.Linear(6, 4), factor_interval=1)
    with pytest.warns(UserWarning, match="10 of the 35 terms"):
        run(other, other._workings.blocks.model, lambda z: F.cross_entropy(z[:, 1:-1].flatten(0, 1), labels[:, 2:].flatten()), x)
