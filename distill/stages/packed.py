"""What a packed batch costs, counted from its segments."""

from collections.abc import Mapping

import numpy as np

from distill.training.flops import Flops


def documents_flops(flops: Flops, batch: Mapping[str, np.ndarray]) -> float:
    """What going over the documents of a packed batch costs; padding is free."""
    segments = batch["segment_ids"]
    lengths = [np.bincount(row)[1:] for row in segments]
    return flops.of(int(n) for row in lengths for n in row if n)
