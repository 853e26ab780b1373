"""Output distributions of a model: what the Fisher matrix, the loss and the predictive are made of.

A likelihood turns the outputs ``f`` of the model into the gradients of ``-log p(y | f)`` that the Fisher
matrix needs: for labels sampled from the model (``sample_gradients``), or for all labels at once through a
root of the output Hessian ``H`` (``root_gradients``). ``H`` is the Hessian of the negative log-likelihood in
the outputs, so that the exact Fisher equals the generalized Gauss-Newton matrix (Martens 2020, §9).

A *term* is one summand of the mean loss: an example, an unmasked token of a sequence, a pixel of a
segmentation. ``N`` always counts terms.
"""

from kfac_opt.likelihoods.base import Likelihood
from kfac_opt.likelihoods.bernoulli import Bernoulli
from kfac_opt.likelihoods.categorical import Categorical
from kfac_opt.likelihoods.columns import output_gradients
from kfac_opt.likelihoods.gaussian import Gaussian
from kfac_opt.likelihoods.registry import LikelihoodName, make_likelihood

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "LikelihoodName",
    "make_likelihood",
    "output_gradients",
]
