"""KFACVI: natural-gradient variational inference with Kronecker-factored covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed import ProcessGroup

from kfac_opt._curvature.block import DampingScale
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt.bayes.draws import VariationalOptions
from kfac_opt.bayes.posterior import PosteriorDamping
from kfac_opt.bayes.variational import VariationalOptimizer
from kfac_opt.likelihoods import Likelihood, LikelihoodName


class KFACVI(VariationalOptimizer):
    r"""Trains a Gaussian posterior over all weights: KFAC with weight samples.

    The mean follows the preconditioned gradient, taken at weights drawn from the posterior; the covariance is the
    curvature that K-FAC estimates anyway,
    :math:`\Sigma = \frac{1}{\mathrm{ess}} (F + (\delta + \mathrm{floor}) I)^{-1}`, ``ess = num_data / temperature``,
    ``δ = prior_precision / ess``. Noisy K-FAC (Zhang, Sun, Duvenaud & Grosse 2018, arXiv:1712.02390) is
    ``posterior_floor=0, prior_gradient="sample", damping_style="factored", posterior_damping="factored"``; KFAC-VI with
    several samples (Nakata, Osawa & Yokota) is ``weight_decay_rule="step", momentum_rule="lr"`` without trust region.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> optimizer = KFACVI(model, lr=0.1, num_data=1000)
    >>> x, y = torch.randn(32, 8), torch.randint(3, (32,))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     for _ in optimizer.weight_samples(2):
    ...         nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    >>> optimizer.posterior().sample()["0.weight"].shape
    torch.Size([16, 8])

    Args:
        model, params, lr, momentum, weight_decay: as for :class:`kfac_opt.KFAC`; ``weight_decay`` comes on top of the
            prior.
        damping: extra damping γ of the step, ``>= 0``, on top of δ; relative to the layer's curvature with
            ``damping_scale="relative"``. It does not enter the posterior.
        num_data: ``N``, the number of terms in the loss of the whole data set (examples; tokens for a loss per
            token). Per group, as the next three.
        prior_precision: ``1 / η`` of the prior ``N(0, η I)``; ``> 0``.
        temperature: ``> 0``; below 1 the posterior is narrower than Bayes' rule says. For a warm-up, write
            ``optimizer.param_groups[i]["temperature"]`` as a scheduler writes ``lr``.
        posterior_floor: ``>= 0``, absolute; added to the Fisher's eigenvalues in the covariance alone. It bounds the
            noise in directions that the data do not determine, which is what makes deep nets diverge. None: for each
            layer what keeps deviations at most at ``0.5 / √in_dim``, so that a single sample trains at any data size
            (``benchmarks/kfac_vi.py``); 0 is Bayes' rule.
        num_samples: passes of ``step(closure)``, and of ``weight_samples()`` without an argument.
        antithetic: draws 2i and 2i + 1 of one ``weight_samples`` are μ ± ε: their odd errors cancel.
        posterior_damping: ``"exact"`` adds δ and floor to the product of eigenvalues; ``"factored"`` splits them
            between the factors of Kronecker blocks, as published, which is too narrow in undetermined directions.
        prior_gradient: ``"mean"`` adds ``δ μ`` to the gradient, ``"sample"`` ``δ`` times the mean of the drawn weights.
        weight_decay_rule: ``"lr"``: the decay follows the learning rate; ``"step"``: ``(weight_decay / lr) μ`` enters
            the momentum with the direction, so that the decay per step does not follow it (as published).
        momentum_rule: ``"constant"``, or ``"lr"``: ``momentum · lr / base_lr``, ``base_lr`` the ``lr`` given here.
        batch_statistics: of BatchNorm layers: ``"step"``: the first pass of a step that is not dropped alone moves the
            running statistics; ``"pass"``: every such pass does.
        sample_group: ranks among which the passes of a step are divided: each has the same batch and other draws.
            Needs at least one pass per rank. Gradients are averaged over this group; averaging over ranks with other
            batches is left to DistributedDataParallel, whose ``process_group`` is then the other dimension of the mesh.
        process_group: all ranks whose factors are summed, those of both dimensions.

    All others are those of :class:`kfac_opt.KFAC`. ``curvature="identity"`` has no posterior and is refused. With
    ``max_block_dim`` the posterior knows no covariance between blocks either; its bases are stored whole.

    Raises:
        ValueError, TypeError, RuntimeError: at construction, as for :class:`kfac_opt.KFAC`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float = 0.1,
        momentum: float = 0.8,
        damping: float = 0.03,
        weight_decay: float = 0.0,
        *,
        num_data: float,
        prior_precision: float = 1.0,
        temperature: float = 1.0,
        posterior_floor: float | None = None,
        num_samples: int = 1,
        antithetic: bool = True,
        posterior_damping: PosteriorDamping = "exact",
        prior_gradient: Literal["mean", "sample"] = "mean",
        weight_decay_rule: Literal["lr", "step"] = "lr",
        momentum_rule: Literal["constant", "lr"] = "constant",
        batch_statistics: Literal["step", "pass"] = "step",
        sample_group: ProcessGroup | None = None,
        likelihood: LikelihoodName | Likelihood = "categorical",
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        label_samples: int = 1,
        curvature: Literal["kronecker", "eigenbasis", "diagonal"] = "kronecker",
        damping_style: Literal["factored", "exact", "split"] = "factored",
        damping_scale: DampingScale = "relative",
        nesterov: bool = True,
        ramp_steps: int = 10,
        factor_decay: float = 0.95,
        factor_interval: int = 10,
        inverse_interval: int = 100,
        refresh: Literal["staggered", "together"] = "staggered",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        kl_clip: float | None = 1e-4,
        max_relative_update: float | None = 0.05,
        decoupled_weight_decay: bool = True,
        max_factor_dim: int = 8192,
        max_block_dim: int | None = None,
        outputs: Callable[[Any], Any] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        factor_dtype: torch.dtype = torch.float32,
        inverse_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "num_data": num_data,
            "prior_precision": prior_precision,
            "temperature": temperature,
            "posterior_floor": posterior_floor,
            "base_lr": lr,
            "nesterov": nesterov,
            "factor_decay": factor_decay,
            "factor_interval": factor_interval,
            "inverse_interval": inverse_interval,
            "kl_clip": kl_clip,
            "max_relative_update": max_relative_update,
            "decoupled_weight_decay": decoupled_weight_decay,
            "curvature": curvature,
            "maximize": maximize,
        }
        options = CurvatureOptions(
            likelihood=likelihood,
            fisher=fisher,
            label_samples=label_samples,
            damping_style=damping_style,
            damping_scale=damping_scale,
            ramp_steps=ramp_steps,
            refresh=refresh,
            weight_sharing=weight_sharing,
            max_factor_dim=max_factor_dim,
            max_block_dim=max_block_dim,
            outputs=outputs,
            loss_reduction=loss_reduction,
            factor_dtype=factor_dtype,
            inverse_dtype=inverse_dtype,
            foreach=foreach,
            process_group=process_group,
        )
        variational = VariationalOptions(
            num_samples=num_samples,
            antithetic=antithetic,
            posterior_damping=posterior_damping,
            prior_gradient=prior_gradient,
            weight_decay_rule=weight_decay_rule,
            momentum_rule=momentum_rule,
            batch_statistics=batch_statistics,
            sample_group=sample_group,
        )
        super().__init__(model, params, defaults, options, variational, generator)
