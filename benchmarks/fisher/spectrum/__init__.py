"""The study of spectra: what is computed, what was found, how it is drawn."""
