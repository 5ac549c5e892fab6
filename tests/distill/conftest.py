"""What a run in the test's own process changes for the whole process is undone, and need not be paid for again."""

import html
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


@pytest.fixture
def charts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes seconds of every run; tests/distill/report and the shared run look at what is drawn."""
    drawn = "<svg role='img' aria-label='{}'></svg>"
    monkeypatch.setattr("distill.report.charts.svg_of", lambda _, label: drawn.format(html.escape(label)))
