"""The command that serves: what it refuses before it listens, and that a signal ends it when all is answered."""

import dataclasses
import signal
import socket

import numpy as np
import pytest

from teacher.client import TeacherClient
from teacher.serve import __main__ as command
from teacher.serve.__main__ import main
from teacher.wire import TargetsRequest
from tests.teacher.serving import LIMITS, ServerProcess, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_folder(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "nowhere"), "nowhere"),
        ((), "--model"),
        (("--model", "FOLDER", "--host", "0.0.0.0"), "set the environment variable TEACHER_TOKEN"),
        (("--model", "FOLDER", "--max-sequence-tokens", "512"), "--max-sequence-tokens is 512, but the positions"),
        (("--model", "FOLDER", "--max-sequence-tokens", "0"), "max_sequence_tokens is 0; it must be at least 1"),
        (
            ("--model", "FOLDER", "--max-request-tokens", "64"),
            "max_request_tokens is 64, less than max_sequence_tokens",
        ),
        (("--model", "FOLDER", "--max-top-k", "many"), "argument --max-top-k: invalid int value: 'many'"),
        (("--model", "FOLDER", "--mesh.expert", "3"), "mesh"),
        (("--model", "FOLDER", "--processes", "2", "--process", "0"), "need --coordinator HOST:PORT"),
        (("--model", "FOLDER", "--kernels.attention", "fast"), "kernels.attention is 'fast'"),
        (("--model", "FOLDER", "--modle", "x"), "unrecognized arguments: --modle x"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(options, said, folder, monkeypatch, capsys):
    monkeypatch.delenv("TEACHER_TOKEN", raising=False)
    assert main([folder if option == "FOLDER" else option for option in options]) == 2
    error = capsys.readouterr().err
    assert said in error, error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("options", "tokens"), [((), 16_384), (("--mesh.data", "4", "--mesh.context", "2"), 0)])
def test_prefixes_are_kept_unless_a_mesh_cuts_rows(options, tokens, folder, monkeypatch):
    served = []
    monkeypatch.setattr(command, "serve", lambda one, *_, **__: served.append(one) or 0)
    sizes = ("--max-sequence-tokens", "128", "--max-prompt-tokens", "64", "--max-new-tokens", "16")
    assert main(["--model", folder, *sizes, *options]) == 0
    assert [one.limits.prefix_cache_tokens for one in served] == [tokens]
    if not tokens:
        assert main(["--model", folder, *sizes, *options, "--prefix-cache-tokens", "16384"]) == 2


def test_an_address_that_is_taken_is_said_in_one_line(folder, capsys):
    sizes = ("--max-sequence-tokens", "128", "--max-prompt-tokens", "64", "--max-new-tokens", "16")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--model", folder, "--port", port, *sizes]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in error
    assert error.count("\n") == 1
    assert main(["--model", folder, "--port", "99999", *sizes]) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_it_answers_until_a_signal_comes(folder, tmp_path):
    server = ServerProcess(folder, tmp_path / "output", dataclasses.replace(LIMITS, batch_tokens=128))
    server.start()
    try:
        assert server.wait() == {503, 200}
        client = TeacherClient([server.url])
        (said,) = client.targets(
            TargetsRequest(targets="top_k", sequences=[np.arange(9, dtype=np.int32)], starts=[0], entries=2)
        )
        assert said["ids"].shape == (9, 2)
        client.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    finally:
        server.kill()
    assert f"serving {folder} on {server.url}" in (tmp_path / "output").read_text()
