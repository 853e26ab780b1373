"""The Gaussian over all trainable weights of a model: draws, densities, divergences, saving."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfac_opt._capture.wrappers import unwrapped
from kfac_opt.bayes.posterior.block import DAMAGED, PosteriorBlock, Width, uncurved_block
from kfac_opt.bayes.posterior.files import save_atomically
from kfac_opt.bayes.posterior.noise import NoiseSource, add_noise
from kfac_opt.layers.embedding import padding_rows
from kfac_opt.likelihoods import Likelihood, LikelihoodName, make_likelihood

_FORMAT = 1


class Posterior:
    r"""``N(μ, Σ)`` with one independent block per layer.

    :math:`\Sigma_l = \frac{1}{\mathrm{ess}} (F_l + \delta I + \mathrm{floor}\, I)^{-1}`; the prior is
    ``N(0, I / prior_precision)``; ``δ = prior_precision / ess``, ``ess = N / temperature``.

    Args:
        means: ``{name: tensor}``, the trainable parameters in the order of ``named_parameters()``.
        blocks: one :class:`PosteriorBlock` per layer; together they name every mean exactly once.
        likelihood: the model's output distribution; ``predict`` turns outputs into probabilities with it.
        fixed: names of the model's parameters that are not random (frozen ones).
        seed: of the posterior's own generator, which every ``sample()`` without a generator advances.
        num_data: ``N``, or None if unknown.
        log_likelihood: log-likelihood of the data at the means in nats, if somebody computed it
            (``fit_laplace`` does).

    Raises:
        ValueError: if blocks and means do not fit.

    >>> from kfac_opt._curvature.spectral import SpectralForm
    >>> from kfac_opt.layers.layout import MatrixLayout
    >>> layout = MatrixLayout("matrix", (2, 3))
    >>> form = SpectralForm(None, None, torch.ones(1, 2, 3))
    >>> block = PosteriorBlock("weight", None, layout, form, Width(ess=99.0, prior_precision=99.0))
    >>> posterior = Posterior({"weight": torch.zeros(2, 3)}, [block])
    >>> posterior.variance()["weight"][0, 0]
    tensor(0.0051)
    """

    def __init__(
        self,
        means: Mapping[str, Tensor],
        blocks: Iterable[PosteriorBlock],
        *,
        likelihood: LikelihoodName | Likelihood | dict[str, object] = "categorical",
        fixed: Iterable[str] = (),
        seed: int = 0,
        num_data: float | None = None,
        log_likelihood: float | None = None,
    ) -> None:
        self.mean = {name: mean.detach().clone() for name, mean in means.items()}
        self.blocks = tuple(blocks)
        self.likelihood = make_likelihood(likelihood)
        self.fixed = tuple(fixed)
        self.seed = int(seed)
        self.num_data = num_data
        self.log_likelihood = log_likelihood
        self._check()
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        blocks: Iterable[PosteriorBlock],
        *,
        width: Width | Mapping[str, Width],
        names: Collection[str] | None = None,
        likelihood: LikelihoodName | Likelihood = "categorical",
        seed: int = 0,
        num_data: float | None = None,
        log_likelihood: float | None = None,
    ) -> Posterior:
        """Around the current weights of ``model``; random parameters without a block get the prior's variance.

        Args:
            blocks: the curved layers.
            width: of the parameters that no block covers: one for all, or by their names.
            names: the random parameters; None: the trainable ones.
        """
        blocks = list(blocks)
        covered = {name for block in blocks for name in block.names}
        named = dict(unwrapped(model).named_parameters())
        if names is None:
            names = [name for name, parameter in named.items() if parameter.requires_grad or name in covered]
        means = {name: parameter for name, parameter in named.items() if name in names}
        widths = width if isinstance(width, Mapping) else dict.fromkeys(means, width)
        rows = padding_rows(unwrapped(model))
        alone = [(name, parameter) for name, parameter in means.items() if name not in covered]
        blocks += [uncurved_block(name, p, widths[name], rows.get(id(p))) for name, p in alone]
        return cls(
            means,
            blocks,
            likelihood=likelihood,
            fixed=[name for name in named if name not in means],
            seed=seed,
            num_data=num_data,
            log_likelihood=log_likelihood,
        )

    def _check(self) -> None:
        owners: dict[str, int] = {}
        for block in self.blocks:
            shapes = (block.layout.weight_shape, _bias_shape(block))
            for name, shape in zip(block.names, shapes, strict=False):
                if name not in self.mean:
                    raise ValueError(f"Posterior: a block covers '{name}', but no mean has this name.")
                if tuple(self.mean[name].shape) != shape:
                    raise ValueError(
                        f"Posterior: the mean of '{name}' has shape {list(self.mean[name].shape)}, its block "
                        f"expects {list(shape)}."
                    )
                owners[name] = owners.get(name, 0) + 1
        wrong = [name for name in self.mean if owners.get(name, 0) != 1]
        if wrong:
            raise ValueError(f"Posterior: every mean needs exactly one block, but {wrong[0]!r} has {owners.get(wrong[0], 0)}.")
        if not self.mean:
            raise ValueError("Posterior: there are no trainable parameters. Give at least one mean.")

    @property
    def device(self) -> torch.device:
        """Where the posterior lives."""
        return next(iter(self.mean.values())).device

    @property
    def num_parameters(self) -> int:
        """``D``, the number of random weights."""
        return sum(block.num_random for block in self.blocks)

    @property
    def width(self) -> Width:
        """Data size, prior and floor, if they are the same for all blocks.

        Raises:
            ValueError: if they differ (parameter groups with priors of their own): read those of ``blocks``.
        """
        widths = {block.width for block in self.blocks}
        if len(widths) > 1:
            raise ValueError("Posterior: the blocks have different widths; read block.width of posterior.blocks.")
        return widths.pop()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the random parameters."""
        return {name: mean.shape for name, mean in self.mean.items()}

    @cached_property
    def _noise(self) -> NoiseSource:
        return NoiseSource(self.blocks)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        r"""One draw of all weights, ``W = μ + Q_G (E ∘ √V) Q_Aᵀ``: names, shapes and dtypes of the means.

        Args:
            generator: source of the noise, on any device; None: the posterior's own, which goes on from draw to draw.
        """
        (noise,) = self.deviations(1, generator)
        return {name: add_noise(mean, noise[name]) for name, mean in self.mean.items()}

    def deviations(self, number: int, generator: torch.Generator | None = None) -> list[dict[str, Tensor]]:
        """What ``number`` calls of :meth:`sample` would add to the means, in the dtypes of the curvature; faster than those."""
        return self._noise.draws([self.generator if generator is None else generator] * number)

    def variance(self) -> dict[str, Tensor]:
        """Marginal variance of every weight (the diagonal of Σ), in the shapes of the means."""
        result: dict[str, Tensor] = {}
        for block in self.blocks:
            weight, bias = block.layout.from_matrix(block.marginal_variance())
            result[block.weight] = weight.clone()
            if block.bias is not None and bias is not None:
                result[block.bias] = bias.clone()
        return {name: result[name] for name in self.mean}

    def log_prob(self, sample: Mapping[str, Tensor]) -> Tensor:
        """Log-density of one set of weights in nats, 0-dim float64; differentiable in ``sample``.

        Raises:
            ValueError: if names or shapes are not those of the means.
        """
        self._check_sample(sample)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for block in self.blocks:
            white = block.whiten(self._matrix(block, lambda name: sample[name] - self.mean[name])).double()
            total = total - 0.5 * (white.square().sum() + block.log_determinant())
        return total - 0.5 * self.num_parameters * math.log(2 * math.pi)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, 0-dim float64."""
        logs = [block.log_determinant() for block in self.blocks]
        return 0.5 * (torch.stack(logs).sum() + self.num_parameters * (1 + math.log(2 * math.pi)))

    def kl(self) -> Tensor:
        r"""Divergence from the prior ``N(0, η I)`` in nats, ``η = 1 / prior_precision``, 0-dim float64.

        :math:`\mathrm{KL} = \frac12 [\sum V/\eta + \|\mu\|^2/\eta - D + D \ln \eta - \sum \ln V]`: needs the
        eigenvalues alone.
        """
        parts = []
        for block in self.blocks:
            precision = block.width.prior_precision
            spectrum, mean = block.spectrum.double(), self._matrix(block, lambda name: self.mean[name]).double()
            squares = block.random_part(spectrum + mean.square()).sum()
            parts.append(0.5 * (precision * squares - block.log_determinant() - block.num_random * (1 + math.log(precision))))
        return torch.stack(parts).sum()

    def with_width(self, width: Width | Mapping[str, Width]) -> Posterior:
        """The same means and Fisher blocks under another data size, prior or floor.

        Args:
            width: one for all blocks, or one for every block by the name of its weight.
        """
        blocks = [block.with_width(width if isinstance(width, Width) else width[block.weight]) for block in self.blocks]
        return self._rebuilt(self.mean, blocks)

    def to(self, device: torch.device | str) -> Posterior:
        """The posterior on ``device``; its own generator starts again from the seed there."""
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)  # noqa: E731
        return self._rebuilt({name: move(mean) for name, mean in self.mean.items()}, [b.map(move) for b in self.blocks])

    def _rebuilt(self, means: Mapping[str, Tensor], blocks: Iterable[PosteriorBlock]) -> Posterior:
        return Posterior(
            means,
            blocks,
            likelihood=self.likelihood,
            fixed=self.fixed,
            seed=self.seed,
            num_data=self.num_data,
            log_likelihood=self.log_likelihood,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and words; :meth:`from_state_dict` reads them back."""
        return {
            "format": _FORMAT,
            "mean": dict(self.mean),
            "blocks": [block.state_dict() for block in self.blocks],
            "likelihood": self.likelihood.describe(),
            "fixed": list(self.fixed),
            "seed": self.seed,
            "num_data": self.num_data,
            "log_likelihood": self.log_likelihood,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], *, likelihood: Likelihood | None = None) -> Posterior:
        """The posterior that ``state_dict`` wrote down; its generator starts again from the saved seed.

        Args:
            likelihood: in place of the one described in ``state``: one of your own.

        Raises:
            ValueError: if ``state`` is not the state of a posterior, or one that could not be drawn from (NaN, negative
                eigenvalues, words and shapes that do not fit), with the name of the key.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            keys = sorted(map(str, state))[:5] if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"Posterior: expected the state of a posterior (format {_FORMAT}), found {keys}. "
                "Save it with posterior.save(path) or posterior.state_dict()."
            )
        missing = sorted({"mean", "blocks", "likelihood", "fixed", "seed", "num_data", "log_likelihood"} - state.keys())
        if missing:
            raise ValueError(
                f"Posterior: the state lacks {missing}, found {sorted(map(str, state))}. "
                "Give the whole dict of posterior.state_dict()."
            )
        for name, mean in state["mean"].items():
            if not isinstance(mean, Tensor) or not bool(torch.isfinite(mean).all()):
                raise ValueError(f"Posterior: the saved mean of '{name}' is no finite tensor. {DAMAGED}")
        return cls(
            state["mean"],
            [PosteriorBlock.from_state_dict(block) for block in state["blocks"]],
            likelihood=cast("dict[str, object]", state["likelihood"]) if likelihood is None else likelihood,
            fixed=state["fixed"],
            seed=state["seed"],
            num_data=state["num_data"],
            log_likelihood=state["log_likelihood"],
        )

    def _check_likelihood(self) -> None:
        described = self.likelihood.describe()
        try:
            known = type(make_likelihood(described)) is type(self.likelihood)
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"Posterior.save: the likelihood {type(self.likelihood).__name__} describes itself as {described}, of "
                "which load() could build no such likelihood. Save posterior.state_dict() with torch.save yourself, and "
                "read it with Posterior.from_state_dict(state, likelihood=...)."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything that is needed to draw and predict later; no optimizer, no code.

        Beside ``path`` first, then renamed: whoever is killed in between leaves the file that was there.

        Raises:
            ValueError: for a likelihood that :meth:`load` could not build again.
        """
        self._check_likelihood()
        save_atomically(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Posterior:
        """Reads what :meth:`save` wrote, with ``weights_only=True``: a file can hold data, never code."""
        return cls.from_state_dict(torch.load(path, map_location=device, weights_only=True))

    def _matrix(self, block: PosteriorBlock, values: Callable[[str], Tensor]) -> Tensor:
        """``[groups, out_dim, in_dim]`` of the block's parameters, in the dtype of its curvature or wider."""
        dtype = block.form.eigenvalues.dtype
        parts = [values(name).to(torch.promote_types(self.mean[name].dtype, dtype)) for name in block.names]
        return block.layout.to_matrix(*parts).to(dtype)

    def _check_sample(self, sample: Mapping[str, Tensor]) -> None:
        missing, extra = self.mean.keys() - sample.keys(), sample.keys() - self.mean.keys()
        if missing or extra:
            raise ValueError(
                f"Posterior.log_prob: the sample lacks {sorted(missing)[:5]} and has {sorted(extra)[:5]} in excess. "
                "Give one tensor for every name in posterior.mean."
            )
        for name, mean in self.mean.items():
            if sample[name].shape != mean.shape:
                raise ValueError(
                    f"Posterior.log_prob: '{name}' has shape {list(sample[name].shape)}, expected {list(mean.shape)}."
                )


def _bias_shape(block: PosteriorBlock) -> tuple[int, ...]:
    return block.layout.weight_shape if block.layout.kind == "norm" else (block.layout.whole_shape[0],)
