"""What a teacher behind HTTP costs beside one in the same process, and beside transformers' own server.

    python -m experiments.benchmarks.service
    python -m experiments.benchmarks.service --sizes tiny --rounds 4 --peer False

prints a line of JSON for each size and comparison. Ways take turns within a round, and a ratio is of one round's
turns; given are the median over rounds, and the lowest and highest. *Scoring*: 16 clients, each with one sequence of
256 tokens a request, against `Scorer` on the same sequences in batches of the size; with the teacher's 64 likeliest
tokens, and with hidden states. *One request*: its time less that of the compiled program alone, by turns of one.
*Completions*: the same requests, 255 tokens of text and one greedy token, to `transformers serve` and to this project's
server; the first of these gives no log-probabilities, so that there is nothing else to compare. `cpu_seconds` is what
processes of client and server took together: on a machine that others share it says more than the clock.

Clients and servers share this machine's cores. Models are those of `sizes.py`, untrained, in float32. transformers is
installed into an environment of its own the first time (`peer_environments.py`).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx2
import jax
import numpy as np
import tyro

from distill.training.host_memory import keep_freed_memory
from experiments.benchmarks.machine import machine
from experiments.benchmarks.peer_environments import TRANSFORMERS, prepare
from experiments.benchmarks.sizes import SIZES, Size
from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.rollout import THINKING, Rollout
from qwen3.sharding import MeshShape, make_mesh
from teacher.client import TeacherClient
from teacher.scoring import Scorer, hidden_program, top_k_and_following_program
from teacher.wire import Kind, TargetsRequest

_ROOT = Path(__file__).parents[2]
_TOKENIZER = _ROOT / "experiments" / "quickstart_tokenizer"
_START_SECONDS = 900
_K = 64
_KINDS: tuple[Kind, ...] = ("top_k", "hidden")
_MARKS: Mapping[str, float] = {"share_of_in_process": 0.85, "overhead_ms": 3.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    sizes: tuple[Literal["tiny", "vocab"], ...] = ("tiny", "vocab")
    clients: int = 16
    requests: int = 2
    """Of each client in a turn."""
    rounds: int = 8
    """Turns of each way that count; one before them warms up."""
    singles: int = 8
    """Single requests in a round, each beside the program alone."""
    peer: bool = True
    """Ask transformers' server, too."""
    folder: Path = Path("runs/.service_benchmark")
    """Models and the servers' logs."""
    peers: Path = Path("runs/.peers")
    """Where the peer's environment is installed."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one way took."""

    seconds: float
    cpu_seconds: float
    """Of this process and of the servers together."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A process that answers."""

    url: str
    pid: int
    model: str
    """What it calls the model."""


def main(asked: Arguments) -> None:
    for name in asked.sizes:
        for row in measure(SIZES[name], asked.folder.absolute() / name, asked):
            print(json.dumps({"benchmark": "service", "size": name} | row | machine()), flush=True)


def measure(size: Size, model: Path, asked: Arguments) -> Iterator[dict[str, Any]]:
    """The rows of one size, whose teacher is in the folder `model`, or gets there.

    Raises UserError where a server does not start, or the two do not do the same work."""
    _make(size, model)
    with contextlib.ExitStack() as held:
        ours = held.enter_context(_serving(_own_command(size, model), "/ready", model.with_suffix(".log"), model.name))
        peer = None
        if asked.peer:
            python = prepare(TRANSFORMERS, asked.peers.absolute(), lambda text: print(text, file=sys.stderr))
            log = model.with_suffix(".peer.log")
            peer = held.enter_context(_serving(_peer_command(python, model), "/health", log, str(model)))
        work = held.enter_context(contextlib.closing(Work(size, model, asked, ours)))
        yield from _rows(work, peer, asked)


class Work:
    """Sequences of one size, and the ways to have them scored."""

    def __init__(self, size: Size, folder: Path, asked: Arguments, server: Server):
        self._size, self.server = size, server
        mesh = make_mesh(MeshShape(), jax.devices()[:1])
        self._model, self._mesh = hf.load(folder, mesh=mesh), mesh
        self._scorer = Scorer(self._model, mesh)
        rng, length = np.random.default_rng(0), size.sequence_tokens
        count = asked.clients * asked.requests
        self._sequences = list(rng.integers(16, size.teacher.vocab_size, (count, length), dtype=np.int32))
        self._texts = ["".join(digits) for digits in rng.choice(list("0123456789"), (count, length - 1))]
        self._clients = [TeacherClient([server.url]) for _ in range(asked.clients)]
        self._http = [httpx2.Client(timeout=_START_SECONDS) for _ in range(asked.clients)]
        self._threads = concurrent.futures.ThreadPoolExecutor(asked.clients)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return len(self._sequences) * self._size.sequence_tokens

    def in_process(self, kind: Kind) -> None:
        """Every sequence, a batch of the size after the other, with the targets on the host."""
        rows, length = self._size.batch_size, self._size.sequence_tokens
        for first in range(0, len(self._sequences), rows):
            batch = self._sequences[first : first + rows]
            if kind == "top_k":
                self._scorer.score_rollouts(list(map(_rollout, batch)), k=_K, rows=rows, length=length, pad_id=0)
            else:
                tokens = np.stack(batch)
                positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
                np.asarray(self._scorer.hidden(tokens, positions, np.ones_like(tokens)).hidden)

    def served(self, kind: Kind) -> None:
        """Every sequence as a request of its own, of all clients at once."""
        self._by_clients(lambda client, index: self._clients[client].targets(self._request(kind, index)))

    def completed(self, server: Server) -> None:
        """Every text, of all clients at once."""
        self._by_clients(lambda client, index: self.complete(server, client, index))

    def complete(self, server: Server, client: int = 0, index: int = 0) -> int:
        """One text, with one greedy token; the tokens that the server has counted in it."""
        body = {"model": server.model, "prompt": self._texts[index], "max_tokens": 1, "temperature": 0}
        answer = self._http[client].post(f"{server.url}/v1/completions", json=body)
        if answer.status_code != 200:
            raise UserError(f"{answer.url} has answered with status {answer.status_code}: {answer.text[:200]}")
        return answer.json()["usage"]["prompt_tokens"]

    def one(self, kind: Kind) -> None:
        """One request while no other is under way."""
        self._clients[0].targets(self._request(kind, 0))

    def program(self, kind: Kind) -> Callable[[], None]:
        """What the server runs for `one`, alone: its arguments are there, and its results stay."""
        shape = {"rows": 1, "length": self._size.sequence_tokens}
        program = (
            hidden_program(self._model, self._mesh, **shape)
            if kind == "hidden"
            else top_k_and_following_program(self._model, self._mesh, **shape, k=_K)
        )
        compiled = program.function.lower(*program.arguments).compile()
        tokens = self._sequences[0][None]
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
        following = () if kind == "hidden" else (np.append(tokens[:, 1:], [[-1]], axis=1).astype(np.int32),)
        arguments = jax.device_put((tokens, positions, np.ones_like(tokens), *following))
        return lambda: jax.block_until_ready(compiled(self._model, *arguments))

    def close(self) -> None:
        self._threads.shutdown()
        for client in self._clients:
            client.close()
        for http in self._http:
            http.close()

    def _request(self, kind: Kind, index: int) -> TargetsRequest:
        entries = _K if kind == "top_k" else 0
        return TargetsRequest(targets=kind, sequences=[self._sequences[index]], starts=[0], entries=entries)

    def _by_clients(self, ask: Callable[[int, int], Any]) -> None:
        count = len(self._clients)

        def all_of(client: int) -> None:
            for index in range(client, len(self._sequences), count):
                ask(client, index)

        list(self._threads.map(all_of, range(count)))


def _rows(work: Work, peer: Server | None, asked: Arguments) -> Iterator[dict[str, Any]]:
    ways: dict[str, Callable[[], Any]] = {}
    for kind in _KINDS:
        ways[f"in process, {kind}"] = functools.partial(work.in_process, kind)
        ways[f"served, {kind}"] = functools.partial(work.served, kind)
    servers = {"this project": work.server} | ({} if peer is None else {"transformers serve": peer})
    counted = {name: work.complete(server) for name, server in servers.items()}
    if len(set(counted.values())) > 1:
        raise UserError(f"the servers count other tokens in the same text ({counted}): not the same work")
    for name, server in servers.items():
        ways[f"completions, {name}"] = functools.partial(work.completed, server)
        ways[f"one completion, {name}"] = functools.partial(work.complete, server)
    programs = {kind: work.program(kind) for kind in _KINDS}
    pids = [server.pid for server in servers.values()]
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    singles: dict[Kind, list[tuple[float, float]]] = {kind: [] for kind in programs}
    for round_ in range(asked.rounds + 1):
        for name, way in ways.items():
            turn = _turn(way, pids)
            if round_:
                turns[name].append(turn)
        for kind, program in programs.items():
            served = functools.partial(work.one, kind)
            pairs = [(_seconds(served), _seconds(program)) for _ in range(asked.singles)]
            if round_:
                singles[kind] += pairs
    for kind in programs:
        here, there = turns[f"in process, {kind}"], turns[f"served, {kind}"]
        yield {
            "comparison": f"scoring, {kind}",
            "clients": asked.clients,
            **_spread("in_process_tokens_per_second", [work.tokens / turn.seconds for turn in here]),
            **_spread("served_tokens_per_second", [work.tokens / turn.seconds for turn in there]),
            **ratio("share_of_in_process", here, there),
            "mark": _MARKS["share_of_in_process"],
        }
        both = singles[kind]
        yield {
            "comparison": f"one request, {kind}",
            **_spread("served_ms", [1e3 * one for one, _ in both]),
            **_spread("program_ms", [1e3 * one for _, one in both]),
            **_spread("overhead_ms", [1e3 * (one - other) for one, other in both]),
            "mark": _MARKS["overhead_ms"],
        }
    if peer is not None:
        for what in ("completions", "one completion"):
            mine, theirs = (turns[f"{what}, {name}"] for name in servers)
            yield {
                "comparison": what,
                "prompt_tokens": counted["this project"],
                **_spread("this_project_ms", [1e3 * turn.seconds for turn in mine]),
                **_spread("transformers_serve_ms", [1e3 * turn.seconds for turn in theirs]),
                **ratio("times_as_fast", theirs, mine),
            }


def ratio(name: str, over: Sequence[Turn], under: Sequence[Turn]) -> dict[str, Any]:
    """How much less time `under` took, turn by turn."""
    pairs = list(zip(over, under, strict=True))
    by_clock = _spread(name, [one.seconds / other.seconds for one, other in pairs])
    return by_clock | _spread(f"{name}_by_cpu_seconds", [one.cpu_seconds / other.cpu_seconds for one, other in pairs])


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    median, lowest, highest = (float(f"{one:.4g}") for one in (statistics.median(values), min(values), max(values)))
    return {name: median, f"{name}_range": [lowest, highest]}


def _turn(way: Callable[[], Any], pids: Sequence[int]) -> Turn:
    cpu = time.process_time() + sum(map(_cpu_seconds, pids))
    seconds = _seconds(way)
    return Turn(seconds, time.process_time() + sum(map(_cpu_seconds, pids)) - cpu)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rollout(tokens: np.ndarray) -> Rollout:
    return Rollout(
        tokens=tokens, prompt_length=1, loss_mask=np.arange(len(tokens)) < len(tokens) - 1,
        sampler_logprobs=np.zeros(len(tokens), np.float32), mode=THINKING, prompt_id="0", sample_index=0,
        policy_step=0, finished=True,
    )  # fmt: skip


def _make(size: Size, folder: Path) -> None:
    if not (folder / "config.json").exists():
        hf.save(folder, Qwen3(size.teacher, jax.random.key(0)))
        for file in _TOKENIZER.iterdir():
            shutil.copy(file, folder)


def _own_command(size: Size, model: Path) -> list[str]:
    length = size.sequence_tokens
    command = [sys.executable, "-m", "teacher.serve", "--model", str(model), "--dtype", "float32"]
    limits = {"sequence-tokens": length, "prompt-tokens": length, "new-tokens": 1}
    command += [part for name, most in limits.items() for part in (f"--max-{name}", str(most))]
    # The same sequences are asked for again and again: what is kept of them would not be scored.
    return [*command, "--batch-tokens", str(size.batch_size * length), "--prefix-cache-tokens", "0"]


def _peer_command(python: Path, model: Path) -> list[str]:
    return [str(python.parent / "transformers"), "serve", str(model), "--device", "cpu", "--dtype", "float32"]


@contextlib.contextmanager
def _serving(command: Sequence[str], ready: str, log: Path, model: str) -> Iterator[Server]:
    """A server on a port of its own, once `ready` answers with 200. Raises UserError where it ends before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=output, env=os.environ | variables
        )
    try:
        server, ends = Server(f"http://127.0.0.1:{port}", process.pid, model), time.monotonic() + _START_SECONDS
        while not _is_ready(server.url + ready):
            if process.poll() is not None or time.monotonic() > ends:
                said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                raise UserError(f"{command[0]} does not serve: {said[-1] if said else 'no word'} (all of it: {log})")
            time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(url).status_code == 200
    return False


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
