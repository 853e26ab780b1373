"""What every real network must show when its optimizer is replaced by a default KFAC and nothing else changes."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.support import assert_same, gradients

STEPS = 8
ANNOUNCED = (
    "no layer adapter covers",
    "larger than max_factor_dim",
    "has a forward of its own",
    "diagonal curvature is used there from now on",
    "taken for the logits",
)
"""Documented to be said once: parameters with diagonal curvature, and which output the Fisher matrix belongs to."""

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
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = KFAC(model, **options)
        one_pass(model, inputs, targets)
        assert_same(gradients(model), gradients(plain))
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
        optimizer.step()
        if outplace is not None:
            _same_factors(model, optimizer, outplace, inputs, targets, options)
        losses = []
        for step in range(1, STEPS):
            losses.append(one_pass(model, inputs, targets, seed=step))
            optimizer.step()
    unexpected = [str(w.message) for w in said if not any(re.search(p, str(w.message)) for p in (*ANNOUNCED, *allowed))]
    unexpected = [message for message in unexpected if "KFAC" in message or "kfac" in message or "likelihood" in message]
    assert not unexpected, unexpected
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


def _same_factors(
    model: nn.Module, optimizer: KFAC, outplace: nn.Module, inputs: Inputs, targets: Tensor, options: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = KFAC(outplace, **options)
        one_pass(outplace, inputs, targets)
        other.step()
    assert list(other.curvature) == list(optimizer.curvature)
    names = {id(p): name for name, p in model.named_parameters()}
    here = {names[id(p)]: optimizer.state[p].get("curvature", {}) for p in optimizer.state}
    names = {id(p): name for name, p in outplace.named_parameters()}
    there = {names[id(p)]: other.state[p].get("curvature", {}) for p in other.state}
    for name, state in there.items():
        for key in ("input_factor", "output_factor", "diagonal", "moment"):
            if key in state:
                size = float(state[key].abs().max())
                worst = float((here[name][key] - state[key]).abs().max())
                assert worst <= 1e-4 * size, f"{name}: {key} with inplace off by {worst:.3g} of {size:.3g}"


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
