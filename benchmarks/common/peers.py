"""Other K-FAC packages as contestants of the step times, where the user has installed them; never dependencies.

``asdl`` (``pip install asdfghjkl``; Osawa et al. 2023, arXiv:2305.04684) and ``singd`` (Lin et al. 2024, arXiv:2312.05705).
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.config import ConfigError
from benchmarks.common.workloads import Workload

PACKAGES = ("asdl", "singd")


def is_installed(package: str) -> bool:
    """Whether the package can be imported.

    Raises:
        ConfigError: for one that is not known here.
    """
    if package not in PACKAGES:
        raise ConfigError(f"a contestant of kind 'peer' must name one of {', '.join(PACKAGES)} as optimizer, got '{package}'.")
    return importlib.util.find_spec(package) is not None


def peer_step(package: str, settings: dict[str, Any], model: nn.Module, workload: Workload) -> Callable[[], None]:
    """Forward, backward and step with another package, the momentum and learning rate of torch's SGD around it."""
    build = {"asdl": _asdl, "singd": _singd}[package]
    return build(dict(settings), model, workload)


def _asdl(settings: dict[str, Any], model: nn.Module, workload: Workload) -> Callable[[], None]:
    """``fisher_type``: ``fisher_mc`` or ``fisher_emp``; the other settings belong to its ``PreconditioningConfig``."""
    import asdl

    fisher, rate = settings.pop("fisher_type", "fisher_mc"), settings.pop("lr", 1e-3)
    settings.setdefault("data_size", workload.config.batch_size)
    maker = asdl.KfacGradientMaker(model, asdl.PreconditioningConfig(**settings), fisher_type=fisher)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    batches = itertools.cycle(workload.batches)

    def loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction=reduction)

    def run() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        maker.setup_loss_call(loss, maker.setup_model_call(model, inputs), targets)
        maker.forward_and_backward()
        optimizer.step()

    return run


def _singd(settings: dict[str, Any], model: nn.Module, workload: Workload) -> Callable[[], None]:
    """Parameters of layers that it does not know are trained by SGD, as its documentation advises."""
    from singd.optim.optimizer import SINGD

    structures = tuple(settings.pop("structures", ("dense", "dense")))
    known = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    covered = {id(p) for module in known for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in covered]
    own = [p for p in model.parameters() if id(p) in covered]
    optimizers: list[torch.optim.Optimizer] = [SINGD(model, own, structures=structures, warn_unsupported=False, **settings)]
    if others:
        optimizers.append(torch.optim.SGD(others, lr=settings.get("lr", 1e-3), momentum=0.9))
    losses = workload.losses(model)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        next(losses).backward()
        for optimizer in optimizers:
            optimizer.step()

    return run
