"""Watches forward passes and turns them into statistics."""
