"""KFAC: natural gradient with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup

from kfac_opt._curvature.block import DampingScale
from kfac_opt._step.defaults import RULE_DEFAULTS, Auto, UpdateScale, given_or, given_or_auto
from kfac_opt._step.optimizer import CurvatureOptimizer
from kfac_opt._step.options import check_choice, check_number
from kfac_opt._step.settings import CurvatureOptions
from kfac_opt.bayes.posterior import Posterior, Width
from kfac_opt.bayes.posteriors import build_posterior, parameter_names, posterior_blocks
from kfac_opt.layers.embedding import padding_rows
from kfac_opt.likelihoods import Likelihood, LikelihoodName


class KFAC(CurvatureOptimizer):
    r"""Preconditions the gradient with the inverse of a Kronecker-factored Fisher matrix; a drop-in for SGD or AdamW.

    The Fisher matrix is that of the model's output distribution (the *true* Fisher, by sampled labels), collected
    during the ordinary forward passes in training mode; the training loop does not change.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> optimizer = KFAC(model, lr=0.1)
    >>> x, y = torch.randn(32, 8), torch.randint(3, (32,))
    >>> loss = nn.functional.cross_entropy(model(x), y)
    >>> loss.backward()
    >>> optimizer.step()
    >>> optimizer.curvature["0"].input_factor.shape
    torch.Size([9, 9])

    Args:
        model: the module that the training loop calls. Its ``forward`` is one pass; wrappers
            (DistributedDataParallel, torch.compile) may be around it or not.
        params: None for all trainable parameters, else parameters or groups as in torch.optim. ``lr``,
            ``momentum``, ``damping``, ``power``, ``weight_decay``, ``factor_decay``, the intervals, ``kl_clip``,
            ``max_relative_update`` and ``curvature`` can differ per group; a layer's weight and bias share one.
        lr: step size, ``>= 0``; None: 0.1 with ``"natural"`` (the best single setting over several tasks,
            ``benchmarks/robustness.py``), 0.015 with ``"rms"`` (chosen on a GPT, an autoencoder and two digits nets).
        momentum: in [0, 1); None: 0.8 with ``"natural"`` (as safe as 0.9 and faster early, same measurement), 0.9 with
            ``"rms"``.
        damping: γ or, with another ``damping_scale`` than ``"absolute"``, its ratio to the layer's curvature; ``> 0``;
            None: 0.03 with ``"natural"``, 1e-3 with ``"rms"``.
        weight_decay: ``>= 0``; decoupled from the gradient (AdamW's rule, ``lr · weight_decay`` per step) unless
            ``decoupled_weight_decay=False`` adds it to the gradient before preconditioning.
        update_scale: the update rule. ``"natural"``: ``lr`` times the direction, shortened by the trust region, then
            momentum. ``"rms"``: momentum of the gradient, then the direction, at a length that ``lr`` and the layer's shape
            decide: a factor on the loss or on the gradients changes nothing, and nothing has to be searched for a new task.
            A pace of at most 1 shortens the steps of a layer whose gradients oscillate (``optim/scale_free.py``).
        power: of the curvature, in (0, 1]; None: 1 with ``"natural"``, 1/2 with ``"rms"``. Directions are
            ``(F + γ)^(-power) V``: 1 is the natural gradient; 1/2 whitens the gradient instead, so that steep and flat
            directions move by amounts of like size. With ``"factored"`` damping each factor is taken to the power. The
            roots follow a changed power at the next step.
        likelihood: the model's output distribution, to which the Fisher matrix belongs.
        fisher: ``"mc"`` samples ``label_samples`` labels per term (unbiased, the cheapest true Fisher);
            ``"exact"`` sums over all labels through a root of the output Hessian, ``classes − 1`` backward passes to the
            layers' outputs. Where a layer's rows depend on one loss term each, the factors are then exact and
            deterministic; where terms mix (a loss per token, BatchNorm in training mode) and for diagonal blocks the
            random signs make them unbiased instead. ``"empirical"`` uses the data's labels from the user's own backward:
            biased, and it needs the loss's reduction and scale: for categorical and Bernoulli likelihoods with hard
            labels the scale is read off the output gradients; otherwise ``loss_reduction`` decides and a scaled loss
            cannot be undone. Parameters without an adapter then use ``N (∂L/∂θ)²`` of the summed gradient, which is
            biased further.
        curvature: ``"kronecker"``; ``"eigenbasis"`` (EKFAC); ``"diagonal"``; ``"identity"`` (torch's SGD: no trust
            region and no curvature).
        damping_style: for ``"kronecker"``: ``"factored"`` (π-split, two Cholesky inverses) or ``"exact"``
            ``(A ⊗ G + γ I)⁻¹`` (eigenbases, four products per step instead of two); ``"split"`` is the π-split in the
            eigenbases, where a changed damping acts at once. ``"eigenbasis"`` is damped exactly, ``s + γ``, with
            ``"factored"`` and ``"exact"``; ``"split"`` adds the cross terms of the π-split,
            ``s_ij + √(γ/s̄)(s̄_i· + s̄_·j) + γ``: more damping where both factors are poorly known, which on an MNIST MLP
            halves the training loss that EKFAC ends at.
        damping_scale: None: ``"relative"`` with ``update_scale="natural"``, ``"mean"`` with ``"rms"``. ``"relative"``:
            ``γ_l = damping · max(τ_l, 0.1 max_t τ_l)`` with
            ``τ_l = (tr A/dim A)(tr G/dim G) sqrt(dim A dim G)``, so that one value fits all layers and does not change
            with the scale of the loss; ``"mean"``: ``damping`` times the mean of the eigenvalues that it is added to, those
            of each factor where the damping is split (``"factored"``, ``"split"``), else those of the block: what fits powers
            below 1, which need much less; ``"absolute"``: γ is ``damping``, as in the literature.
        nesterov: Nesterov momentum on the preconditioned, clipped direction, as in torch's SGD.
        ramp_steps: this many early steps all take an estimate, and inverses are refreshed after 1, 1, 2, 4, … steps up
            to ``inverse_interval``: stale inverses early are what makes K-FAC diverge. 0 switches both off.
        factor_decay: in [0, 1), weight of the old average; the average is corrected for its start at zero.
        factor_interval: steps between estimates.
        inverse_interval: steps between refreshes of a layer's inverses or eigenbases.
        refresh: ``"staggered"`` spreads the refreshes over a round of 16 steps or more (no step stalls), and
            of a large net (a ResNet50) over every round but the first: step 0 makes all inverses, ten seconds on two cores
            for a ResNet50, and the steps of the ramp a share each. ``"together"`` does all at the start of a round.
        weight_sharing: ``"expand"`` treats positions as examples, ``"reduce"`` joins them first (Eschenhagen et al.
            2023). Layers hold their examples along the first dimension (``batch_first=True`` in torch's modules):
            ``"reduce"``, EKFAC's scales and norm layers sum per example; the factors of ``"expand"`` do not mind.
        kl_clip: trust region of ``update_scale="natural"``: directions are scaled so that ``lr² Σ <V, d>`` is at most this;
            None switches it off; ``"auto"`` is 1e-4. ``"rms"`` has no use for it and refuses it.
        max_relative_update: bound of each layer's step relative to the norm of its weights; None switches it off;
            ``"auto"`` is 0.05 with ``"natural"`` and 0.06 with ``"rms"``.
        max_factor_dim: a side of a layer larger than this keeps only the diagonal of its factor (a factor of size n
            takes ``n²`` numbers and ``n³`` operations).
        max_block_dim: a side of a layer larger than this keeps only diagonal blocks of its factor, at most this large:
            neighbouring inputs, of a convolution whole channels (the bias goes with the last), or neighbouring outputs.
            Covariances between blocks count as zero, everything else is as before; None keeps whole factors. Sizes ``n``
            cut into ``k`` blocks take ``1/k`` of the memory and of the operations of a step and ``1/k²`` of a refresh
            (``benchmarks/step_parts.py``). It costs convergence: on digits (64-128-128-10, 250 steps, mean of three
            seeds) the training loss ends at 8e-5 with whole factors, 3e-4, 2e-3 and 4e-3 with blocks of 64, 32, 16.
        outputs: picks the logits, or ``(logits, mask)``, from what the model returns; not needed for a tensor or an
            object with ``.logits``.
        loss_reduction: of the user's loss; only the empirical Fisher needs it.
        factor_dtype: of factors and their arithmetic: float32 or float64; a float64 model has float64 factors.
        inverse_dtype: of the stored inverses and of the products with them; None means as the factors.
            ``torch.bfloat16`` halves the memory of the inverses and, where the processor multiplies it natively, the
            time of preconditioning, for a relative rounding of 2⁻⁹ (``benchmarks/step_time.py``). For
            ``curvature="kronecker"`` with ``damping_style="factored"``.
        maximize: step along the gradient instead of against it.
        foreach: None or True updates all parameters in grouped calls, False one by one; same numbers.
        generator: draws the base seed of all private generators at construction; None means seed 0. The global
            random state is never touched.
        process_group: over which factors are summed; None means the default group when torch.distributed runs.

    Raises:
        ValueError, TypeError, RuntimeError: at construction for arguments out of range, foreign parameters, weight
            and bias in different groups, DataParallel, sharded parameters. A later optimizer on the same model takes over:
            this one's ``step()`` then says so.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        *,
        update_scale: UpdateScale = "rms",
        power: float | None = None,
        likelihood: LikelihoodName | Likelihood = "categorical",
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        label_samples: int = 1,
        curvature: Literal["kronecker", "eigenbasis", "diagonal", "identity"] = "kronecker",
        damping_style: Literal["factored", "exact", "split"] = "factored",
        damping_scale: DampingScale | None = None,
        nesterov: bool = True,
        ramp_steps: int | None = None,
        factor_decay: float = 0.95,
        factor_interval: int | None = None,
        inverse_interval: int | None = None,
        refresh: Literal["staggered", "together"] = "staggered",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        kl_clip: float | Auto | None = "auto",
        max_relative_update: float | Auto | None = "auto",
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
        check_choice(type(self).__name__, "update_scale", update_scale, get_args(UpdateScale))
        usual = RULE_DEFAULTS[update_scale]
        defaults = {
            "lr": given_or(lr, usual.lr),
            "momentum": given_or(momentum, usual.momentum),
            "damping": given_or(damping, usual.damping),
            "weight_decay": weight_decay,
            "update_scale": update_scale,
            "power": given_or(power, usual.power),
            "nesterov": nesterov,
            "factor_decay": factor_decay,
            "factor_interval": given_or(factor_interval, usual.factor_interval),
            "inverse_interval": given_or(inverse_interval, usual.inverse_interval),
            "kl_clip": given_or_auto(kl_clip, usual.kl_clip),
            "max_relative_update": given_or_auto(max_relative_update, usual.max_relative_update),
            "decoupled_weight_decay": decoupled_weight_decay,
            "curvature": curvature,
            "maximize": maximize,
        }
        options = CurvatureOptions(
            likelihood=likelihood,
            fisher=fisher,
            label_samples=label_samples,
            damping_style=damping_style,
            damping_scale=given_or(damping_scale, usual.damping_scale),
            update_scale=update_scale,
            ramp_steps=given_or(ramp_steps, usual.ramp_steps),
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
        super().__init__(model, params, defaults, options, generator)

    def posterior(self, num_data: float, prior_precision: float = 1.0, temperature: float = 1.0) -> Posterior:
        r"""Laplace posterior around the current weights (Ritter, Botev & Barber 2018): no damping, no floor.

        The covariance is :math:`(\mathrm{num\_data}\,F / \mathrm{temperature} + \mathrm{prior\_precision}\, I)^{-1}`
        with the averaged factors of training; ``fit_laplace`` takes them over a whole data set instead. Predict with
        ``linearized_predict``: weight samples of a post-hoc Laplace posterior often predict badly.

        Args:
            num_data: number of terms of the loss over the data set.

        Raises:
            RuntimeError: before the first estimate.
            ValueError: for numbers that are not positive.
        """
        owner = "KFAC.posterior"
        for name, value in (("num_data", num_data), ("prior_precision", prior_precision), ("temperature", temperature)):
            check_number(owner, name, value, low=0.0, open_low=True)
        blocks, width = self._require_workings().blocks, Width(num_data / temperature, prior_precision)
        names, constant = parameter_names(blocks.model), padding_rows(blocks.model)
        return build_posterior(
            owner,
            blocks.model,
            posterior_blocks(names, blocks.tracked.values(), blocks.state_of, lambda _: width, constant=constant),
            [parameter for group in self.param_groups for parameter in group["params"]],
            width=width,
            likelihood=self._likelihood,
            seed=self._seeds.base,
            num_data=num_data,
        )
