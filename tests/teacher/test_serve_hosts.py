"""A teacher that two processes of two devices serve answers as one of one process; its processes end together."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from qwen3.rollout import Rollout, rollouts_from_json
from teacher import wire
from teacher.limits import Limits
from teacher.wire import TargetsRequest
from tests.qwen3.hosts.two_processes import environment, free_address

# Between processes sums are added in another order.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}
MESH = ("--mesh.data", "1", "--mesh.fsdp", "4")
LENGTHS = (40, 1, 128, 17)
ENDED_SECONDS = 20


@dataclasses.dataclass
class Two:
    """Two processes that serve, the first at `url`."""

    url: str
    processes: list[subprocess.Popen[bytes]]
    outputs: list[Path]

    def wait(self, path: str, status: int) -> None:
        """Until it answers so."""
        while all(process.poll() is None for process in self.processes):
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(self.url + path).status_code == status:
                    return
            time.sleep(0.1)
        raise AssertionError(self.said(0) + self.said(1))

    def statuses(self) -> list[int]:
        """Exit statuses; whatever ended the one, the other must not be left waiting."""
        return [process.wait(ENDED_SECONDS) for process in self.processes]

    def said(self, process: int) -> str:
        return self.outputs[process].read_text()


@contextlib.contextmanager
def two_processes(folder: str, limits: Limits, out: Path, *second: str) -> Iterator[Two]:
    """The second has some options more."""
    address, (host, port) = free_address(), free_address().split(":")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(limits).items()]
    command = [sys.executable, "-m", "teacher.serve", "--model", folder, "--port", port, "--dtype", "float32"]
    two = Two(f"http://{host}:{port}", [], [])
    with contextlib.ExitStack() as files:
        for number in range(2):
            cluster = ("--coordinator", address, "--processes", "2", "--process", str(number))
            more = (*options, *MESH, *cluster, *(second if number else ()))
            two.outputs.append(out / f"output-{number}")
            output = files.enter_context(two.outputs[-1].open("w"))
            two.processes.append(
                subprocess.Popen([*command, *more], env=environment(2), stdout=output, stderr=subprocess.STDOUT)
            )
        try:
            yield two
        finally:
            for process in two.processes:
                process.kill()
                process.wait()


def targets(vocab_size: int) -> Iterator[TargetsRequest]:
    """Of every kind, several sequences each."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, vocab_size, length).astype(np.int32) for length in LENGTHS]
    starts = [3, 0, 100, 16]
    rows = [length - start for length, start in zip(LENGTHS, starts, strict=True)]
    ids = [rng.permuted(np.tile(np.arange(-1, 19, dtype=np.int32), (count, 1)), axis=1)[:, :4] for count in rows]
    yield TargetsRequest(targets="top_k", sequences=sequences, starts=starts, entries=5)
    yield TargetsRequest(targets="at_ids", sequences=sequences, starts=starts, entries=4, ids=ids, top_k=3)
    yield TargetsRequest(targets="sampled", sequences=sequences, starts=starts, entries=4, seeds=[1, 2, 3, 4])
    yield TargetsRequest(targets="hidden", sequences=sequences, starts=starts)


def rollouts(vocab_size: int, step: int) -> dict[str, Any]:
    """Of both modes, sampled in different ways; as many as there are slots."""
    prompts = np.random.default_rng(step).integers(0, vocab_size, (4, 9)).tolist()
    thinking = {"max_new_tokens": 30, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "thinking_budget": 3}
    ways = {"thinking": thinking, "non_thinking": {"max_new_tokens": 20, "temperature": 1.2}}
    requests = [
        {"prompt_ids": ids, "prompt_id": str(number), "sample_index": number, "mode": mode, "params": ways[mode]}
        for number, ids in enumerate(prompts)
        for mode in ways
    ]
    return {"seed": 7, "step": step, "requests": requests}


def chat(client: httpx2.Client, temperature: float) -> tuple[dict[str, str], list[str], list[float]]:
    """The streamed answer to a question: its texts, its tokens and their log-probabilities."""
    question = [{"role": "user", "content": "2+3?"}]
    asked = {"messages": question, "max_tokens": 40, "temperature": temperature, "seed": 3, "logprobs": True}
    texts, tokens, logprobs = {"reasoning": "", "content": ""}, [], []
    with client.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                for field in texts:
                    texts[field] += choice["delta"].get(field) or ""
                for one in (choice["logprobs"] or {}).get("content") or []:
                    tokens.append(one["token"])
                    logprobs.append(one["logprob"])
    return texts, tokens, logprobs


def answers(url: str, vocab_size: int) -> dict[str, Any]:
    """What a server says to requests of all kinds that come at once, each twice."""
    with httpx2.Client(base_url=url, timeout=120) as client, concurrent.futures.ThreadPoolExecutor(8) as threads:

        def head() -> tuple[dict[str, np.ndarray], dict[str, str]]:
            return wire.decode(client.get("/v1/head").content)

        def scored(request: TargetsRequest) -> dict[str, np.ndarray]:
            response = client.post("/v1/targets", content=wire.encode_request(request))
            assert response.status_code == 200, response.text
            return wire.decode(response.content)[0]

        def generated(step: int) -> list[Rollout]:
            return rollouts_from_json(client.post("/v1/rollouts", json=rollouts(vocab_size, step)).json())

        asked: dict[str, Callable[[], Any]] = {"head": head}
        for request in targets(vocab_size):
            asked[request.targets] = lambda request=request: scored(request)
        for step in (0, 1):
            asked[f"rollouts {step}"] = lambda step=step: generated(step)
        for temperature in (0.0, 1.0):
            asked[f"chat {temperature}"] = lambda temperature=temperature: chat(client, temperature)
        pending = {(name, number): threads.submit(ask) for number in range(2) for name, ask in asked.items()}
        found = {where: future.result(120) for where, future in pending.items()}
        for name in asked:
            require_same(name, found[name, 0], found[name, 1])
        return {name: found[name, 0] for name in asked}


def require_same(name: str, ours: Any, theirs: Any) -> None:
    if name == "head":
        np.testing.assert_array_equal(ours[0]["head"], theirs[0]["head"])
        assert ours[1] == theirs[1]
    elif name.startswith("rollouts"):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
            np.testing.assert_allclose(one.sampler_logprobs, other.sampler_logprobs, **TOLERANCE)
    elif name.startswith("chat"):
        assert ours[:2] == theirs[:2]
        assert len(ours[1]) > 5
        np.testing.assert_allclose(ours[2], theirs[2], **TOLERANCE)
    else:
        assert ours.keys() == theirs.keys()
        for field, wanted in theirs.items():
            if wanted.dtype == np.int32:
                np.testing.assert_array_equal(ours[field], wanted, err_msg=f"{name} {field}")
            else:
                np.testing.assert_allclose(ours[field], wanted, **TOLERANCE, err_msg=f"{name} {field}")


def test_two_processes_answer_as_one_does_until_one_dies(reciting_folder, reciting, reciting_url, tmp_path):
    with two_processes(reciting_folder, reciting.limits, tmp_path) as two:
        two.wait("/ready", 503)
        two.wait("/ready", 200)
        vocab_size = reciting.vocab_size
        said, wanted = answers(two.url, vocab_size), answers(reciting_url, vocab_size)
        assert said.keys() == wanted.keys()
        for name in wanted:
            require_same(name, said[name], wanted[name])
        with httpx2.Client(base_url=two.url, timeout=120) as client:
            # What is given up by the first process, under way or not, holds up nobody.
            late = client.post("/v1/rollouts", json=rollouts(vocab_size, 2), headers={"x-deadline-seconds": "0.02"})
            assert late.status_code == 408
            require_same("chat", chat(client, 0.0), wanted["chat 0.0"])
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            cut = thread.submit(httpx2.post, f"{two.url}/v1/rollouts", json=rollouts(vocab_size, 3), timeout=60)
            two.processes[1].kill()
            assert two.statuses() == [1, -signal.SIGKILL]
            assert isinstance(cut.exception(60), httpx2.TransportError)
        *_, last = two.said(0).splitlines()
        assert re.fullmatch(r"error \(process 0 of 2\): process 1 has ended, and the server with it; .*", last)
        assert "Traceback" not in two.said(0)


def test_a_signal_to_either_ends_both_while_they_load(reciting_folder, reciting, tmp_path):
    with two_processes(reciting_folder, reciting.limits, tmp_path) as two:
        two.wait("/health", 200)
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses() == [0, 0]
        assert "error" not in two.said(0) + two.said(1)


@pytest.mark.long
def test_a_signal_to_either_lets_both_finish_what_has_been_accepted(reciting_folder, reciting, reciting_url, tmp_path):
    with two_processes(reciting_folder, reciting.limits, tmp_path) as two:
        two.wait("/ready", 200)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            body = rollouts(reciting.vocab_size, 0)
            accepted = thread.submit(httpx2.post, f"{two.url}/v1/rollouts", json=body, timeout=60)
            while "queue_requests 1" not in httpx2.get(f"{two.url}/metrics").text:
                pass
            two.processes[1].send_signal(signal.SIGTERM)
            said = rollouts_from_json(accepted.result(60).json())
        assert two.statuses() == [0, 0]
        assert "error" not in two.said(0) + two.said(1)
    wanted = httpx2.post(f"{reciting_url}/v1/rollouts", json=body, timeout=60).json()
    require_same("rollouts", said, rollouts_from_json(wanted))


@pytest.mark.long
def test_what_differs_between_processes_is_refused_before_weights_are_read(reciting_folder, reciting, tmp_path):
    with two_processes(reciting_folder, reciting.limits, tmp_path, "--max-new-tokens=79") as two:
        assert two.statuses() == [2, 2]
        for number in range(2):
            *_, last = two.said(number).splitlines()
            assert last.startswith(f"error (process {number} of 2): the teacher's files, or its options, in process 1")
