"""Optimizers by name, with plain numbers as settings, so that a config or a search can make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.config import ConfigError, check_keys

Settings = Mapping[str, Any]


def build_optimizer(
    name: str, model: nn.Module, settings: Settings, likelihood: str = "categorical", seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer ``name`` for ``model``.

    Args:
        name: one of ``OPTIMIZERS``.
        settings: arguments of the optimizer's constructor; those that are left out keep its defaults.
        likelihood: the model's output distribution, which K-FAC wants to know.
        seed: of the labels that K-FAC samples.

    Raises:
        ConfigError: an unknown optimizer or setting, by name, with what is allowed.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got '{name}'.")
    try:
        return OPTIMIZERS[name](model, dict(settings), likelihood, seed)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer '{name}' refuses its settings {dict(settings)}: {error}") from error


def optimizer_factory(name: str, settings: Settings, likelihood: str = "categorical") -> Callable[[nn.Module, int], Any]:
    """Makes the optimizer of a run out of its model and its seed."""
    return lambda model, seed: build_optimizer(name, model, settings, likelihood, seed)


def _build_sgd(model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    check_keys(settings, _arguments(torch.optim.SGD), "sgd")
    return torch.optim.SGD(model.parameters(), **settings)


def _build_adamw(model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    """AdamW; ``beta1`` and ``beta2`` can be given one by one."""
    check_keys(settings, [*_arguments(torch.optim.AdamW), "beta1", "beta2"], "adamw")
    betas = (settings.pop("beta1", 0.9), settings.pop("beta2", 0.999))
    return torch.optim.AdamW(model.parameters(), **{"betas": betas, **settings})


def _build_muon(model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    """Muon for the hidden weight matrices, AdamW (``adamw_lr``) for everything else (Jordan et al. 2024)."""
    if not muon_applies(model):
        raise ConfigError(
            "optimizer 'muon' needs torch.optim.Muon (torch >= 2.9) and a model with hidden weight matrices; "
            f"found torch {torch.__version__} and {len(hidden_matrices(model))} hidden matrices. Leave it out."
        )
    check_keys(settings, [*_arguments(torch.optim.Muon), "adamw_lr"], "muon")
    hidden = hidden_matrices(model)
    others = [p for p in model.parameters() if p.requires_grad and not any(p is matrix for matrix in hidden)]
    adamw_lr = settings.pop("adamw_lr", 1e-3)
    weight_decay = settings.get("weight_decay", 0.1)
    return Together(
        torch.optim.Muon(hidden, **settings),
        torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=weight_decay),
    )


def _build_kfac(model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    from kfac_opt import KFAC

    check_keys(settings, _arguments(KFAC), "kfac")
    settings = {k: getattr(torch, v) if k.endswith("_dtype") and isinstance(v, str) else v for k, v in settings.items()}
    generator = torch.Generator().manual_seed(seed)
    return KFAC(model, **{"likelihood": likelihood, "generator": generator, **settings})


def _build_ekfac(model: nn.Module, settings: dict[str, Any], likelihood: str, seed: int) -> torch.optim.Optimizer:
    return _build_kfac(model, {"curvature": "eigenbasis", **settings}, likelihood, seed)


Builder = Callable[[nn.Module, dict[str, Any], str, int], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Builder] = {
    "sgd": _build_sgd,
    "adamw": _build_adamw,
    "muon": _build_muon,
    "kfac": _build_kfac,
    "ekfac": _build_ekfac,
}


def default_settings(name: str) -> str:
    """The defaults of an optimizer's constructor, as text: results made with other defaults must not be reused."""
    if name in ("kfac", "ekfac"):
        from kfac_opt import KFAC

        return str(inspect.signature(KFAC))
    return f"torch {torch.__version__}"


LABELS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "kfac": "KFAC", "ekfac": "EKFAC"}


def label(name: str) -> str:
    """How an optimizer is written in figures and tables."""
    return LABELS.get(name, name)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the Linear layers except the first and the last one with parameters; embeddings never count."""
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    return [layer.weight for layer in layers[1:-1] if isinstance(layer, nn.Linear) and layer.weight.requires_grad]


def muon_applies(model: nn.Module) -> bool:
    """Whether torch has Muon and ``model`` has weight matrices for it."""
    return hasattr(torch.optim, "Muon") and bool(hidden_matrices(model))


class Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups in one list, so that a schedule reaches all learning rates."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Steps each optimizer; the closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each storage counted once."""
    storages: dict[int, int] = {}
    optimizers: Iterable[torch.optim.Optimizer] = getattr(optimizer, "optimizers", (optimizer,))
    for part in optimizers:
        _collect_storages(dict(part.state), storages)
    return sum(storages.values())


def _collect_storages(value: Any, storages: dict[int, int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_storages(item, storages)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_storages(item, storages)


def _arguments(constructor: Callable[..., Any]) -> list[str]:
    skipped = {"self", "params", "model", "args", "kwargs"}
    return [name for name in inspect.signature(constructor).parameters if name not in skipped]
