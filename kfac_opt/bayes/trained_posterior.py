"""The posterior that an optimizer's curvature defines while it trains: widths, covariances, names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfac_opt._step import options as checks
from kfac_opt._step.model_blocks import ModelBlocks
from kfac_opt._step.seeds import POSTERIOR, Seeds
from kfac_opt._step.tracking import TrackedBlock
from kfac_opt.bayes.posterior import NoiseSource, Posterior, PosteriorBlock, PosteriorDamping, Width
from kfac_opt.bayes.posteriors import build_posterior, follows_refreshes, parameter_names, posterior_blocks, safe_floor
from kfac_opt.layers.embedding import padding_rows
from kfac_opt.likelihoods import Likelihood

WIDTHS = ("num_data", "temperature", "prior_precision", "posterior_floor")


@dataclass(frozen=True)
class Covariances:
    """Covariances of the training draws, kept over the steps that leave them as they are.

    Attributes:
        key: what they were made from.
        source: draws the noise.
    """

    key: object
    source: NoiseSource


class TrainedPosterior:
    """Reads the blocks of an optimizer as a Gaussian over the weights.

    Args:
        damping: of the covariances of Kronecker blocks.
    """

    def __init__(self, blocks: ModelBlocks, damping: PosteriorDamping) -> None:
        self.blocks, self.damping = blocks, damping
        self.follow_blocks()

    def follow_blocks(self) -> None:
        """The blocks, or their state, are others now."""
        self._covariances: Covariances | None = None
        self.names, self._constant = parameter_names(self.blocks.model), padding_rows(self.blocks.model)

    def named(self) -> dict[str, Tensor]:
        """Optimized parameters by their names in the model, in the order of the groups; none that left the model."""
        parameters = [p for group in self.blocks.groups for p in group["params"] if p.requires_grad]
        return {self.names[id(p)]: p for p in parameters if id(p) in self.names}

    def width(self, entry: TrackedBlock) -> Width:
        """Data size, prior and floor of a block."""
        group = self.blocks.groups[entry.group]
        checks.check_number(self.blocks.owner, "temperature", group["temperature"], low=0.0, open_low=True)
        ess, prior = float(group["num_data"]) / float(group["temperature"]), float(group["prior_precision"])
        floor = group["posterior_floor"]
        return Width(ess, prior, safe_floor(entry.block, ess, prior) if floor is None else float(floor))

    def _widths(self) -> dict[str, Width]:
        """Those of all optimized parameters by name, with curvature or without."""
        members = [(p, self.width(entry)) for entry in self.blocks.tracked.values() for p in entry.parameters]
        widths = {self.names[id(p)]: width for p, width in members if id(p) in self.names}
        for group in self.blocks.groups:  # what was unfrozen since the last step has no block yet
            width = Width(float(group["num_data"]) / float(group["temperature"]), float(group["prior_precision"]))
            for name in [self.names[id(p)] for p in group["params"] if id(p) in self.names]:
                widths.setdefault(name, width)
        return widths

    def covariances(self, *, current: bool) -> list[PosteriorBlock]:
        """Those of all blocks that have curvature, in the bases of the current factors or of the last refresh."""
        return posterior_blocks(
            self.names,
            self.blocks.tracked.values(),
            self.blocks.state_of,
            self.width,
            damping=self.damping,
            current=current,
            constant=self._constant,
        )

    def source(self) -> NoiseSource:
        """Of the training draws: it changes when curvature is refreshed or a width is written, not at each step."""
        key: list[object] = [group[name] for group in self.blocks.groups for name in WIDTHS]
        for entry in self.blocks.tracked.values():
            state = self.blocks.state_of(entry)
            if state is not None:
                counters = ("refreshes",) if follows_refreshes(entry.block) else ("refreshes", "estimates")
                trained = [parameter.requires_grad for parameter in entry.parameters]
                key += [entry.name, *trained, *(int(state[name]) for name in counters if name in state)]
        if self._covariances is None or self._covariances.key != key:
            self._covariances = Covariances(key, NoiseSource(self.covariances(current=False)))
        return self._covariances.source

    def copy(self, likelihood: Likelihood, seeds: Seeds) -> Posterior:
        """The posterior around the current weights, with a copy of everything it needs.

        Raises:
            RuntimeError: before the first estimate.
        """
        data = {float(group["num_data"]) for group in self.blocks.groups}
        return build_posterior(
            self.blocks.owner,
            self.blocks.model,
            self.covariances(current=True),
            self.named().values(),
            width=self._widths(),
            likelihood=likelihood,
            seed=seeds.derived(POSTERIOR, self.blocks.step_count()),
            num_data=data.pop() if len(data) == 1 else None,
        )
