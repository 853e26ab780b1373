"""The Gaussian posterior over a model's weights: training it, Laplace's approximation, predictions."""
