"""Approximations of one layer's Fisher block, and the averages that they are made of."""
