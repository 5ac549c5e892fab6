"""A client gets the same answers from one server or several, through outages, and from one teacher only."""

import contextlib
import copy
import dataclasses
import http.server
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen3.errors import UserError
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams
from teacher.client import TeacherClient
from teacher.limits import token_of_environment
from teacher.serve.app import Standing
from teacher.serve.metrics import Metrics
from teacher.serve.service import Service
from teacher.wire import TargetsRequest
from tests.teacher.crowd import Crowd
from tests.teacher.serving import load, make_folder, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def service(folder: str) -> Service:
    return load(folder)


@pytest.fixture
def other(service: Service) -> Service:
    """Another teacher to whoever asks: of other weights."""
    other = copy.copy(service)
    other.identity = dataclasses.replace(service.identity, weights="others")
    return other


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with serving(Standing(service)) as url:
        yield url


@pytest.fixture(scope="module")
def request_(service: Service) -> TargetsRequest:
    """More sequences and tokens than one request may hold."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, service.vocab_size, length).astype(np.int32) for length in rng.integers(2, 128, 20)]
    return TargetsRequest(targets="top_k", sequences=sequences, starts=[len(one) // 2 for one in sequences], entries=3)


@pytest.fixture(scope="module")
def answers(url: str, request_: TargetsRequest) -> list:
    client = TeacherClient([url])
    found = client.targets(request_)
    client.close()
    return found


def assert_equal(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_array_equal(one["ids"], other["ids"])
        # Which sequences share a batch decides nothing but the order of float sums.
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=2e-5)


def test_what_no_request_holds_is_split_and_comes_back_in_order(answers, request_):
    assert [len(answer["ids"]) for answer in answers] == request_.rows


def test_several_servers_of_one_teacher_share_what_is_asked(service, url, answers, request_):
    with serving(Standing(service)) as second:
        client = TeacherClient([url, second])
        assert client.identity == service.identity
        assert_equal(client.targets(request_), answers)
    # One of them is gone.
    assert_equal(client.targets(request_), answers)
    client.close()


def test_a_restart_is_waited_for(service, answers, request_):
    with serving(Standing(service)) as url:
        client = TeacherClient([url])
    port = int(url.rpartition(":")[2])
    found: list = []
    asking = threading.Thread(target=lambda: found.extend(client.targets(request_)))
    asking.start()
    time.sleep(0.2)
    standing = Standing()
    with serving(standing, port=port):
        time.sleep(0.2)
        assert found == []
        standing.service = service
        asking.join()
    assert_equal(found, answers)
    client.close()


def test_clients_of_two_servers_get_every_answer_once_while_one_of_them_goes_and_comes_back(service, url, folder):
    """`test_faults` does it with processes that are killed, and many more requests."""
    twin = copy.copy(service)
    twin.metrics = Metrics()
    with contextlib.ExitStack() as second, contextlib.ExitStack() as opened:
        other = second.enter_context(serving(Standing(twin)))
        crowd = opened.enter_context(contextlib.closing(Crowd(folder, [url, other], clients=32, requests=192)))
        gone = threading.Event()
        going = threading.Thread(target=lambda: (gone.wait(60), second.close()))
        going.start()
        crowd.ask(128, lambda count: gone.set() if count == 40 else None)
        going.join()
        twin.metrics = Metrics()
        opened.enter_context(serving(Standing(twin), port=int(other.rpartition(":")[2])))
        crowd.ask(192)
        crowd.check()
    # Clients that ask for one thing at a time go to both.
    assert b'teacher_requests_total{endpoint="/v1/targets",status="200"}' in twin.metrics.text()


def test_another_teacher_is_refused_at_the_start_and_after_a_restart(service, other, url, request_):
    with serving(Standing(other)) as second:
        with pytest.raises(UserError, match=r"serves another teacher than was expected: it differs in weights"):
            TeacherClient([url, second])
        with pytest.raises(UserError, match=r"differs in weights"):
            TeacherClient([second], expected=service.identity)
    standing = Standing(service)
    with serving(standing) as third:
        client = TeacherClient([third])
        standing.service = other
        with pytest.raises(UserError, match=r"serves another teacher than the one that was asked before") as raised:
            client.targets(request_)
    assert "\n" not in str(raised.value)
    client.close()


def test_the_head_and_rollouts_are_the_teachers(service, url):
    client = TeacherClient([url])
    np.testing.assert_array_equal(client.head, service.head)
    requests = [
        Request(
            prompt_ids=[3, 4, 5 + number],
            prompt_id=str(number),
            sample_index=0,
            mode="non_thinking",
            params=SamplingParams(max_new_tokens=6),
        )
        for number in range(9)
    ]
    found = client.rollouts(requests, seed=1)
    expected = service.generation.submit(requests, seed=1).result()
    for one, rollout in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, rollout.tokens)
        assert (one.prompt_id, one.prompt_length) == (rollout.prompt_id, 3)
    client.close()


@contextlib.contextmanager
def answering(*statuses: int) -> Iterator[str]:
    """A server that answers so, one after the other, and then no more."""
    left = list(statuses)

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(left.pop(0) if left else 503)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_outage_begins_when_no_server_is_reached_and_ends_with_any_answer():
    # Busy for longer than an outage may last: it is there, and what it says at last counts.
    with answering(*[429] * 8, 404) as busy, pytest.raises(UserError, match="refused with status 404"):
        TeacherClient([busy], outage_seconds=0.1)
    with (
        answering(503, 408) as slow,
        pytest.raises(UserError, match=r"given up .*; start it with a larger --deadline-se"),
    ):
        TeacherClient([slow], outage_seconds=30)


def test_white_space_is_no_part_of_the_token_and_the_token_is_in_no_message(monkeypatch):
    monkeypatch.setenv("TEACHER_TOKEN", " geheim\n")
    assert token_of_environment() == "geheim"
    for wrong in ("gehe\nim", "geh\u00e9im"):
        monkeypatch.setenv("TEACHER_TOKEN", wrong)
        with pytest.raises(UserError, match="TEACHER_TOKEN holds other characters than visible ASCII") as raised:
            TeacherClient(["http://127.0.0.1:1"])
        assert "geh" not in str(raised.value)
    monkeypatch.setenv("TEACHER_TOKEN", "")
    assert token_of_environment() is None


def test_what_a_user_can_mend_is_said_in_one_line(service, url, request_, monkeypatch):
    def refused(match: str, *urls: str, seconds: float = 0.2) -> None:
        with pytest.raises(UserError, match=match) as raised:
            TeacherClient(urls, outage_seconds=seconds)
        assert "\n" not in str(raised.value)

    refused(r"no teacher has answered at http://127\.0\.0\.1:1 for 0\.2 seconds", "http://127.0.0.1:1")
    refused(r"no server's address", "teacher:8470")
    with serving(Standing(), token="a secret") as locked:
        refused(r"asks for a token", locked)
        monkeypatch.setenv("TEACHER_TOKEN", "a secret")
        refused(r"is being loaded", locked)
    client = TeacherClient([url])
    with pytest.raises(UserError, match=r"refused with status 413: k asks for 9 entries a position; this server takes"):
        client.targets(dataclasses.replace(request_, entries=9))
    client.close()


def test_the_readmes_example_answers(url, capsys):
    readme = Path(__file__).parents[2] / "teacher" / "README.md"
    example, _ = re.findall(r"```py\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict = {}
    exec(example.replace("http://127.0.0.1:8470", url), names)
    assert names["said"]["ids"].shape == (3, 4)
    assert capsys.readouterr().out
    names["client"].close()
