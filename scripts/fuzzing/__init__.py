"""Mutated bytes for everything that reads bytes it does not trust."""
