"""What a run in the test's own process changes for the whole process is undone."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def own_compilation_cache() -> Iterator[None]:
    """A run keeps its compiled programs beside it; later tests may look at how programs are compiled."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
