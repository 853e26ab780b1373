"""The contestants: optimizers as people use them, from torch and from their own packages.

SOAP comes from ``pytorch-optimizer``, Distributed Shampoo from Meta's ``torch-shampoo`` (see ``benchmarks/README.md``); both
are optional, a contestant whose package is missing is an error that says how to install it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.config import ConfigError
from benchmarks.common.optimizers import build_optimizer

SHAMPOO_HINT = "pip install --no-deps git+https://github.com/facebookresearch/optimizers@06da10bdc734ea2ccef2b55fa66a3279785c22b6"


def build(name: str, model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    """The optimizer ``name``; ``kfac`` and ``ekfac`` are told the likelihood, everything else is in ``settings``.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    if name in BUILDERS:
        return BUILDERS[name](model, dict(settings))
    return build_optimizer(name, model, settings, likelihood, seed)


def _sgd(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"momentum": 0.9, "nesterov": True, **settings})


def _adamw(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    betas = (0.9, settings.pop("beta2", 0.999))
    return torch.optim.AdamW(model.parameters(), betas=betas, **settings)


def _muon(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return MuonAndAdamW(model, **settings)


def _soap(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """With the settings that its authors recommend: betas 0.95, decay 0.01, a new basis every 10 steps.

    Sides above 1024 (embeddings) keep their own axes, as Shampoo cuts them into blocks of that size.
    """
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ConfigError("contestant 'soap' needs a package: pip install pytorch-optimizer") from error
    betas = (settings.pop("beta1", 0.95), settings.pop("beta2", 0.95))
    return SOAP(
        model.parameters(),
        betas=betas,
        **{"weight_decay": 0.01, "max_precondition_dim": 1024, "precondition_frequency": 10, **settings},
    )


def _shampoo(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Grafted onto Adam, as its authors recommend to users of AdamW; a new root every 10 steps."""
    try:
        from distributed_shampoo.distributed_shampoo import DistributedShampoo
        from distributed_shampoo.shampoo_types import AdamGraftingConfig
    except ImportError as error:
        raise ConfigError(f"contestant 'shampoo' needs Meta's package: {SHAMPOO_HINT}") from error
    beta2 = settings.pop("beta2", 0.999)
    grafting = AdamGraftingConfig(beta2=beta2, epsilon=1e-8)
    options = {"epsilon": 1e-12, "weight_decay": 0.01, "max_preconditioner_dim": 1024, "precondition_frequency": 10, **settings}
    return DistributedShampoo(model.parameters(), betas=(0.9, beta2), grafting_config=grafting, **options)


Builder = Callable[[nn.Module, dict[str, Any]], torch.optim.Optimizer]
BUILDERS: dict[str, Builder] = {"sgd": _sgd, "adamw": _adamw, "muon": _muon, "soap": _soap, "shampoo": _shampoo}


class MuonAndAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for the hidden weights, AdamW for the first and last layer, embeddings and vectors.

    Recurrent matrices are hidden weights. Convolutions are matrices ``[out_channels, rest]`` (Jordan et al. 2024); torch's
    Muon takes only matrices, so they are handed over as views that share their storage.
    """

    def __init__(
        self, model: nn.Module, lr: float, adamw_lr: float = 3e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.RNNBase | nn.Embedding)]
        self._convolutions: list[tuple[nn.Parameter, nn.Parameter]] = []
        hidden: list[nn.Parameter] = []
        for layer in layers[1:-1]:
            if isinstance(layer, nn.Conv2d):
                matrix = nn.Parameter(layer.weight.detach().flatten(1))
                self._convolutions.append((layer.weight, matrix))
                hidden.append(matrix)
            elif not isinstance(layer, nn.Embedding):
                hidden.extend(p for p in layer.parameters(recurse=False) if p.ndim == 2)
        taken = {id(p) for p in hidden} | {id(weight) for weight, _ in self._convolutions}
        others = [p for p in model.parameters() if id(p) not in taken]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=adamw_lr, weight_decay=0.01)]
        if hidden:
            options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
            self._parts.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options))
        super().__init__(others + hidden, {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One step of both; closures are not needed here."""
        assert closure is None
        for weight, matrix in self._convolutions:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, those of the convolutions themselves too."""
        super().zero_grad(set_to_none)
        for weight, _ in self._convolutions:
            weight.grad = None
