"""Ensemble prediction from a posterior; the code is in :mod:`kfac_opt.bayes.prediction`."""

from kfac_opt.bayes.prediction import Prediction, concatenated, mixture, predict

__all__ = ["Prediction", "concatenated", "mixture", "predict"]
