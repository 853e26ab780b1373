"""What every real network must show when its optimizer is replaced by a default KFAC and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.quiet import beyond_announcements, own_warnings
from tests.support import assert_same, gradients

STEPS = 8
AFFORDABLE = {"max_factor_dim": 1024}
"""For networks with wide layers: eight refreshes of 4,608 × 4,608 inverses would take minutes and show nothing more."""
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Outputs = Callable[[Any], Tensor]


def images(classes: int = 5, size: int = 32, batch: int = 4) -> tuple[Inputs, Tensor]:
    """Random images and labels."""
    source = torch.Generator().manual_seed(1)
    return ((torch.randn(batch, 3, size, size, generator=source),), {}), torch.randint(classes, (batch,), generator=source)


def first_tensor(output: Any) -> Tensor:
    """The logits among what the model returns."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def mean_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross-entropy, mean over all terms."""
    logits = first_tensor(output)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def one_pass(model: nn.Module, inputs: Inputs, targets: Tensor, seed: int = 0) -> Tensor:
    """Forward and backward with the global generator seeded (dropout, stochastic depth)."""
    torch.manual_seed(seed)
    arguments, keywords = inputs
    for parameter in model.parameters():
        parameter.grad = None
    loss = mean_loss(model(*arguments, **keywords), targets)
    loss.backward()
    return loss.detach()


def trains_with_default_kfac(
    model: nn.Module, inputs: Inputs, targets: Tensor, allowed: tuple[str, ...] = (), in_double: bool = True, **options: Any
) -> None:
    """Gradients as without KFAC, bit for bit; eight steps that move what has a gradient; no factor depends on ``inplace``.

    Args:
        allowed: patterns of further messages that are right for this network.
        in_double: whether the network runs in double precision, to tell small gradients from rounding.
        options: of KFAC; none for most networks.
    """
    model.train()
    plain, outplace, before = copy.deepcopy(model), _without_inplace(model), copy.deepcopy(model)
    one_pass(plain, inputs, targets)
    with own_warnings() as said:
        optimizer = KFAC(model, **options)
        one_pass(model, inputs, targets)
        assert_same(gradients(model), gradients(plain))
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
        optimizer.step()
        found = _factors(model, optimizer)
        losses = []
        for step in range(1, STEPS):
            losses.append(one_pass(model, inputs, targets, seed=step))
            optimizer.step()
    assert not beyond_announcements(said, allowed), said
    if outplace is not None:
        _same_factors(found, outplace, inputs, targets, options)
    assert optimizer.dropped_estimates == 0
    assert torch.isfinite(torch.stack(losses)).all(), losses
    _everything_moved(before, model, inputs, targets, torch.float64 if in_double else torch.float32)


def _without_inplace(model: nn.Module) -> nn.Module | None:
    """A copy with every ``inplace`` switched off; None where there is none."""
    twin = copy.deepcopy(model)
    switched = [module for module in twin.modules() if getattr(module, "inplace", False) is True]
    for module in switched:
        module.inplace = False
    return twin if switched else None


def _factors(model: nn.Module, optimizer: KFAC) -> dict[str, Tensor]:
    """Copies of all averages of the curvature, by parameter and kind."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}: {key}": value.clone()
        for p, state in optimizer.state.items()
        for key, value in state.get("curvature", {}).items()
        if key in ("input_factor", "output_factor", "diagonal", "moment")
    }


def _same_factors(
    found: dict[str, Tensor], outplace: nn.Module, inputs: Inputs, targets: Tensor, options: dict[str, Any]
) -> None:
    other = KFAC(outplace, **options)
    one_pass(outplace, inputs, targets)
    other.step()
    expected = _factors(outplace, other)
    assert found.keys() == expected.keys()
    for name, factor in expected.items():
        size = float(factor.abs().max())
        worst = float((found[name] - factor).abs().max())
        assert worst <= 1e-4 * size, f"{name}: with inplace off by {worst:.3g} of {size:.3g}"


def _everything_moved(before: nn.Module, model: nn.Module, inputs: Inputs, targets: Tensor, dtype: torch.dtype) -> None:
    """A parameter counts whose gradient is more than rounding; in double precision 1e-12 of the largest is."""
    twin = copy.deepcopy(before).to(dtype)
    arguments, keywords = inputs
    one_pass(twin, (tuple(_cast(a, dtype) for a in arguments), {k: _cast(v, dtype) for k, v in keywords.items()}), targets)
    sizes = {name: float(p.grad.abs().max()) for name, p in twin.named_parameters() if p.grad is not None}
    largest = max(sizes.values())
    rounding = 1e4 * torch.finfo(dtype).eps * largest
    starts = dict(before.named_parameters())
    still = []
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        start = starts[name].detach()
        moved = float((p.detach() - start).abs().max())
        if sizes.get(name, 0.0) > rounding and moved <= 4 * torch.finfo(p.dtype).eps * float(start.abs().max()):
            still.append(f"{name}: gradient {sizes[name]:.3g} of {largest:.3g}, moved by {moved:.3g}")
    assert not still, still


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
