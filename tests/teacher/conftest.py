"""One reciting teacher and its server for all tests that ask in text: compiling takes longer than asking."""

import dataclasses
from collections.abc import Iterator

import pytest

from teacher.serve.app import Standing
from teacher.serve.service import Service
from tests.teacher.reciting import make_reciting_folder
from tests.teacher.serving import LIMITS, load, serving


@pytest.fixture(scope="session")
def reciting_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_reciting_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def reciting(reciting_folder: str) -> Service:
    # Tools make a prompt long, and so does the text that ends thinking.
    sizes = {"max_prompt_tokens": 480, "max_new_tokens": 80, "max_request_tokens": 2048, "prefix_cache_tokens": 0}
    return load(reciting_folder, dataclasses.replace(LIMITS, **sizes))


@pytest.fixture(scope="session")
def reciting_url(reciting: Service) -> Iterator[str]:
    with serving(Standing(reciting)) as url:
        yield url
