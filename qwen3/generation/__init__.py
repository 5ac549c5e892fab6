"""Generating from a decoder: paged caches, slots, sampling and the engine over them."""
