"""The Gaussian posterior over a model's weights."""

from kfac_opt.bayes.posterior.block import PosteriorBlock, PosteriorDamping, Width, uncurved_block
from kfac_opt.bayes.posterior.gaussian import Posterior
from kfac_opt.bayes.posterior.noise import NoiseSource, add_noise
from kfac_opt.bayes.posterior.weights import erase_weights_, load_weights_, parameters_of, restored_weights, write_draw_

__all__ = [
    "NoiseSource",
    "Posterior",
    "PosteriorBlock",
    "PosteriorDamping",
    "Width",
    "add_noise",
    "erase_weights_",
    "load_weights_",
    "parameters_of",
    "restored_weights",
    "uncurved_block",
    "write_draw_",
]
