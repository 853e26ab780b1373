"""The study of estimator variance: what is computed, what was found, how it is drawn."""
