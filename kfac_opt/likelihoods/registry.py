"""Likelihoods by name and by description."""

from __future__ import annotations

from typing import Literal

from kfac_opt.likelihoods.base import Likelihood
from kfac_opt.likelihoods.bernoulli import Bernoulli
from kfac_opt.likelihoods.categorical import Categorical
from kfac_opt.likelihoods.gaussian import Gaussian

LikelihoodName = Literal["categorical", "bernoulli", "gaussian"]
_LIKELIHOODS: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def make_likelihood(likelihood: LikelihoodName | Likelihood | dict[str, object]) -> Likelihood:
    """The likelihood itself, or the one named, or the one that ``describe()`` wrote down.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    arguments = dict(likelihood) if isinstance(likelihood, dict) else {"name": likelihood}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in _LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {sorted(_LIKELIHOODS)} or an instance of Likelihood, got {name!r}")
    return _LIKELIHOODS[name](**arguments)
