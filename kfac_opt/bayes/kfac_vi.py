"""KFACVI: natural-gradient variational inference with Kronecker-factored covariance."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kfac_opt._curvature.block import Damping, DampingScale
from kfac_opt._step import options as checks
from kfac_opt._step.optimizer import CurvatureOptimizer
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt._step.suspended import Suspended
from kfac_opt._step.workings import Workings
from kfac_opt.bayes.draws import VariationalOptions
from kfac_opt.bayes.posterior import Posterior, PosteriorDamping
from kfac_opt.bayes.prior import delta, with_prior
from kfac_opt.bayes.trained_posterior import TrainedPosterior
from kfac_opt.bayes.weight_sampler import WeightSampler
from kfac_opt.likelihoods import Likelihood, LikelihoodName


class KFACVI(CurvatureOptimizer):
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

    needs_basis = True
    zero_damping = True

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
        self._variational = VariationalOptions(
            num_samples=num_samples,
            antithetic=antithetic,
            posterior_damping=posterior_damping,
            prior_gradient=prior_gradient,
            batch_statistics=batch_statistics,
            sample_group=sample_group,
        )
        self._variational.check(type(self).__name__)
        super().__init__(model, params, defaults, options, generator)

    # -- passes with drawn weights ------------------------------------------------------------------------------

    def weight_samples(self, num_samples: int | None = None) -> Suspended:
        """Loop over passes: inside the body the weights are a draw from the posterior, afterwards the means again.

        Run forward and backward in the body. After the loop every ``.grad`` of the model, also where another optimizer
        holds the parameter, is what it was before plus the mean over the passes, and the curvature statistics of the
        passes are joined. A pass that is left by an exception or ``break`` is dropped, with what it did to running
        statistics; one whose gradient is not finite is dropped and counted (``dropped_samples``); if all are
        dropped, the sum of their gradients is left for a gradient scaler to find, and a ``step()`` that is taken with
        it leaves the weights alone. Before the first estimate all passes run at the mean.

        Args:
            num_samples: number of passes; None: that given at construction. With a ``sample_group`` it is the number
                over all ranks, and this rank's share is run.

        Yields:
            The number of the draw.

        Raises:
            RuntimeError: inside another ``weight_samples()`` or ``sampled_params()``.
            ValueError: for fewer samples than ranks, or a batch with more terms than ``num_data``.
        """
        return Suspended(self._passes(num_samples))

    def _passes(self, num_samples: int | None = None) -> Generator[int, None, None]:
        number = self._variational.num_samples if num_samples is None else num_samples
        checks.check_count(type(self).__name__, "weight_samples: num_samples", number)
        self._ready_workings("weight_samples()")
        return self._sampler.passes(self._sampler.share_of(number))

    def sampled_params(self, generator: torch.Generator | None = None) -> AbstractContextManager[None]:
        """One draw from the posterior while the body runs; the means come back bit for bit, also if it raises.

        Args:
            generator: of the draw; None: a private one that neither disturbs nor repeats the training draws.

        Raises:
            RuntimeError: before the first estimate, or inside another sampling context.
        """
        self._ready_workings("sampled_params()")
        return self._sampler.one_draw(generator)

    @property
    def dropped_samples(self) -> int:
        """Completed passes that were left out because their loss or gradient was not finite."""
        return self._sampler.dropped

    def posterior(self) -> Posterior:
        """The posterior of the current curvature around the current weights, with a copy of everything it needs.

        Raises:
            RuntimeError: before the first estimate, or while the weights are a draw.
        """
        self._require_workings()
        self._sampler.refuse_inside("posterior()")
        return self._sampler.posterior.copy(self._likelihood, self._seeds)

    # -- the step: what the sampler and the prior add to it ------------------------------------------------------

    def _ready_workings(self, what: str = "step()") -> Workings:
        workings = super()._ready_workings(what)
        self._sampler.refuse_inside(what)
        return workings

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        return self._sampler.evaluate(closure, self._passes())

    def _advance(self, workings: Workings) -> None:
        self._sampler.begin_step()
        self._noise = self._sampler.take_mean_noise()
        super()._advance(workings)
        self._sampler.end_step()

    def _gradients(self, group: dict[str, Any], *, raw: bool = False) -> dict[int, Tensor]:
        """Those of the loss and the prior; none in a step that has no finite one."""
        if self._sampler.lost and not raw:
            return {}
        found = super()._gradients(group, raw=raw)
        members = {id(parameter): parameter for parameter in group["params"]}
        return {key: with_prior(group, members[key], gradient, self._noise.get(key)) for key, gradient in found.items()}

    def _damping(self) -> Callable[[Mapping[str, Any]], Damping]:
        scale = self._options.damping_scale
        return lambda group: Damping(float(group["damping"]), scale, delta(group))

    # -- the model ----------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, flat: set[str]) -> None:
        super()._attach(model, flat)
        workings = self._require_workings()
        posterior = TrainedPosterior(workings.blocks, self._variational.posterior_damping)
        self._sampler = WeightSampler(posterior, workings.capture, self._seeds, self._variational)
        workings.when_blocks_change(posterior.follow_blocks)

    def _check_values(self, group: Mapping[str, Any]) -> None:
        super()._check_values(group)
        owner = type(self).__name__
        for name in ("num_data", "prior_precision", "temperature"):
            checks.check_number(owner, name, group[name], low=0.0, open_low=True)
        if group["posterior_floor"] is not None:
            checks.check_number(owner, "posterior_floor", group["posterior_floor"], low=0.0)
        if group["curvature"] == "identity":
            raise ValueError(
                f"{owner}: curvature='identity' has no posterior to draw weights from. Use 'diagonal', or "
                "torch.optim.SGD for these parameters."
            )

    def _install(self, saved: dict[str, Any]) -> None:
        super()._install(saved)
        if self._workings is not None:
            self._sampler.drop_passes()

    def __getstate__(self) -> dict[str, Any]:
        # A process group can neither be pickled nor copied.
        return {**super().__getstate__(), "_variational": replace(self._variational, sample_group=None)}

    def _reattach(self, original: CurvatureOptimizer, model: nn.Module, memo: dict[int, Any]) -> None:
        self._variational = cast(KFACVI, original)._variational
        super()._reattach(original, model, memo)
