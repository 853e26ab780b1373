"""The study of gradient outliers: what is followed, what was found, how it is drawn."""
