"""Approximations of a layer's Fisher block, and the hooks that feed them."""
