"""Weight uncertainty: training with weight samples against its rivals, and what their ensembles know."""
