"""`python -m teacher.serve --model DIR`: a teacher for students on other machines."""

import argparse
import dataclasses
import os
import queue
import signal
import socket
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import uvicorn
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qwen3.checkpoint.quantisation import Quantisation
from qwen3.commands import OneLineParser, reported, spell_out
from qwen3.decoder.kernels import Kernels
from qwen3.errors import UserError
from qwen3.hosts.launcher import follow
from qwen3.hosts.lifelines import FAREWELL, Lifelines
from qwen3.hosts.processes import Cluster, add_cluster_options, give_up, is_first, leave, where
from qwen3.sharding import MeshShape
from teacher.limits import TOKEN_VARIABLE, Limits, token_of_environment
from teacher.serve.app import LOOPBACK, Standing, make_app
from teacher.serve.service import Served, Service

_MOST_CONNECTIONS = 1_024
_DRAIN_SECONDS = 300
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END = b"end"
"""What a process says to the first where it got a signal."""
_SMALLER = "lower --batch-tokens, --max-sequence-tokens or --generation-batch-size, or use more devices"
_DESCRIPTION = f"""\
Serve a teacher over HTTP: targets for students, and text.

  python -m teacher.serve --model checkpoints/Qwen3-32B
  {TOKEN_VARIABLE}=… python -m teacher.serve --model checkpoints/Qwen3-235B-A22B --host 0.0.0.0 --mesh.expert 8

On several hosts, start the same command once on each: process 0 speaks HTTP, the others follow it. Under srun and on
GKE's TPU slices the processes find one another; elsewhere say who they are (--coordinator, --processes, --process).

POST /v1/chat/completions  POST /v1/completions    as OpenAI and vLLM have them, streams too
POST /inference/v1/generate    vLLM's token endpoint, with prompt log-probabilities
POST /generate             as SGLang has it
POST /v1/targets           top-k, chosen ids, sampled tokens or hidden states, in safetensors (teacher/README.md)
GET  /v1/head              the output matrix, for exact divergences from hidden states
POST /v1/rollouts          what the teacher generates, the same for the same seed
GET  /docs                 all of it, field by field; /openapi.json for programs
GET  /v1/models  /health  /ready  /metrics
"""
_EPILOGUE = f"""\
Beyond this machine (--host) a token is required: set the environment variable {TOKEN_VARIABLE}, the same for server
and clients. /ready answers 200 once all programs are compiled. SIGTERM finishes what has been
accepted, within {_DRAIN_SECONDS // 60} minutes, and ends; of several processes, whichever gets it, all end.
Exit status: 0 ended by a signal; 2 something for you to mend, said in one line; 1 one of several processes has died,
and the others have ended with it.
"""
_OPTIONS: Mapping[str, str] = {
    "max_sequence_tokens": "longest sequence that is scored",
    "batch_tokens": "tokens that are scored together at most",
    "max_top_k": "most likely tokens a position that can be asked for",
    "max_ids": "ids a position that can be asked for by name",
    "max_sampled_tokens": "tokens a position that can be sampled",
    "prefix_cache_tokens": "tokens kept for sequences that begin with them; 0 scores all anew, as --mesh.context does",
    "max_request_sequences": "sequences in one request",
    "max_request_tokens": "tokens of all sequences in one request",
    "max_body_bytes": "bytes of one request",
    "max_held_bytes": "bytes of all requests and answers that are held; beyond them further requests get 429",
    "max_queue_requests": "requests that wait or are being answered; further ones get 429",
    "max_queue_tokens": "tokens in them",
    "deadline_seconds": "after which a request is given up",
    "generation_batch_size": "sequences generated at once",
    "max_prompt_tokens": "longest prompt to generate from",
    "max_new_tokens": "most tokens that are generated for one prompt",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    spell_out()
    return _reported(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _reported(work: Callable[[], int]) -> int:
    return reported(work, where=where, smaller=_SMALLER)


def _main(arguments: list[str]) -> int:
    own = parser().parse_args(arguments)
    token = token_of_environment()
    if own.host not in LOOPBACK and token is None:
        raise UserError(
            f"--host is {own.host}, which others can reach; set the environment variable {TOKEN_VARIABLE} to a secret, "
            "here and for the clients, or leave --host"
        )
    mesh_shape = MeshShape(**_fields(own, "mesh.", MeshShape))
    if own.prefix_cache_tokens is None:
        own.prefix_cache_tokens = 0 if mesh_shape.context > 1 else Limits.prefix_cache_tokens
    served = Served(
        model=own.model,
        dtype=own.dtype,
        quantisation=own.quantisation,
        mesh=mesh_shape,
        kernels=Kernels(**_fields(own, "kernels.", Kernels)),
        limits=Limits(**_fields(own, "", Limits)),
    )

    def work(lines: Lifelines | None) -> int:
        mesh = served.check()
        if lines is not None and not is_first():
            follow_first(served, mesh, lines)
        return serve(served, mesh, host=own.host, port=own.port, token=token, followers=lines)

    cluster = Cluster.named(own.coordinator, own.processes, own.process)
    if cluster is None:
        return work(None)
    remedy = "Start the same command on every host again"
    return cluster.run(lambda lines: _reported(lambda: work(lines)), what="server", remedy=remedy)


def serve(
    served: Served, mesh: Mesh, *, host: str, port: int, token: str | None, followers: Lifelines | None = None
) -> int:
    """Load `served` while it already listens, serve it until a signal comes, and return the exit status. With
    `followers` the process ends then, and they with it."""
    standing, failures = Standing(), list[Exception]()
    with _listening(host, port) as listening:
        config = uvicorn.Config(
            make_app(standing, token=token),
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
            limit_concurrency=_MOST_CONNECTIONS,
        )
        server = uvicorn.Server(config)

        def load() -> None:
            try:
                standing.service = _loaded(served, mesh, followers)
            except Exception as error:  # noqa: BLE001 - it is raised again where the process ends
                failures.append(error)
                server.should_exit = True
                return
            kind = jax.devices()[0].device_kind
            print(f"serving {served.model} on http://{host}:{port}, {mesh.size} × {kind}", flush=True)

        def end_with_followers(lines: Lifelines) -> None:
            lines.received.get()
            server.should_exit = True

        threading.Thread(target=load, name="load-teacher", daemon=True).start()
        if followers is not None:
            threading.Thread(target=end_with_followers, args=(followers,), name="hear-followers", daemon=True).start()
        # uvicorn hands on, once all is finished, the signal that has ended it.
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        server.run([listening])
    if failures:
        raise failures[0]
    if standing.service is not None:
        standing.service.close()
    if followers is not None:
        # At once: what is still being loaded is of no use to anybody.
        leave(followers, 0)
    return 0


def follow_first(served: Served, mesh: Mesh, lines: Lifelines) -> NoReturn:
    """Load `served` and do what the first process launches, until that one ends and this one with it. A signal is
    handed on to the first."""
    launched: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def work() -> int:
        follow(launched, Service.load(served, mesh).works(), lines)

    def follow_or_end() -> None:
        try:
            leave(lines, _reported(work))
        except BaseException:  # noqa: BLE001
            give_up(lines)

    def hand_on(number: int, frame: Any) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        lines.say(_END)

    for number in _SIGNALS:
        signal.signal(number, hand_on)
    threading.Thread(target=follow_or_end, name="follow", daemon=True).start()
    while (message := lines.received.get()) != FAREWELL:
        launched.put(message)
    leave(lines, 0)


def _listening(host: str, port: int) -> socket.socket:
    """Before anything is loaded. Raises UserError for an address that cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise UserError(f"--host is {host!r}, which is no address ({error.strerror}); choose another") from None
    except (OSError, OverflowError) as error:
        # The error's own text says the address once more.
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"{host}:{port} cannot be listened on ({reason}); choose another --port or --host") from None


def _loaded(served: Served, mesh: Mesh, followers: Lifelines | None) -> Service:
    """The service, with bars on a terminal for what it takes to make it."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def on_step(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        return Service.load(served, mesh, on_step, followers)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m teacher.serve",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="folder in Hugging Face format")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8470, help="default: 8470")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of weights and computing")
    add("--quantisation", choices=typing.get_args(Quantisation), help="keep projections and experts in eight bits")
    limits = parser.add_argument_group("what it takes; the first six say how large programs and cache are")
    for field in dataclasses.fields(Limits):
        kind: Callable[[str], Any] = float if isinstance(field.default, float) else int
        limits.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=kind,
            metavar="N",
            default=None if field.name == "prefix_cache_tokens" else field.default,
            help=f"{_OPTIONS[field.name]} (default: {field.default:,})",
        )
    devices = parser.add_argument_group("devices")
    for field in dataclasses.fields(MeshShape):
        devices.add_argument(
            f"--mesh.{field.name}", type=int, metavar="N", default=field.default, help=f"default: {field.default}"
        )
    for field in dataclasses.fields(Kernels):
        devices.add_argument(
            f"--kernels.{field.name.replace('_', '-')}", dest=f"kernels.{field.name}", default=field.default
        )
    add_cluster_options(parser)
    return parser


def _fields(own: argparse.Namespace, prefix: str, kind: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(own, prefix + field.name) for field in dataclasses.fields(kind)}


if __name__ == "__main__":
    sys.exit(main())
