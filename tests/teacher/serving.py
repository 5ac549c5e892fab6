"""A teacher behind HTTP: a miniature, its service, and servers in the test's own process or in others."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import jax
import uvicorn
from starlette.types import ASGIApp

from qwen3.chat.chat import STOP_THINKING_TEXT
from qwen3.chat.tokenizer import MIN_VOCABULARY, train_byte_level_bpe
from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.sharding import MeshShape, make_mesh
from teacher.limits import Limits
from teacher.serve.app import Standing, make_app
from teacher.serve.service import Served, Service

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(
    max_sequence_tokens=128,
    batch_tokens=256,
    max_top_k=8,
    max_ids=6,
    max_sampled_tokens=5,
    prefix_cache_tokens=512,
    max_request_sequences=8,
    max_request_tokens=512,
    max_body_bytes=40_000,
    max_queue_requests=64,
    generation_batch_size=8,
    max_prompt_tokens=80,
    max_new_tokens=40,
)


ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": MIN_VOCABULARY + 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def make_folder(folder: Path) -> str:
    """An untrained teacher of one layer with a tokenizer, as a Hugging Face folder named teacher."""
    config = ModelConfig.from_hf(ARCHITECTURE)
    hf.save(folder / "teacher", jax.jit(lambda: Qwen3(config, jax.random.key(0)))())
    train_byte_level_bpe([STOP_THINKING_TEXT] * 9, config.vocab_size, folder / "teacher")
    return str(folder / "teacher")


def load(folder: str, limits: Limits = LIMITS, *, devices: int = 1) -> Service:
    """In float32, on one device if nothing else is said."""
    mesh = make_mesh(MeshShape(fsdp=devices), jax.devices()[:devices])
    return Service.load(Served(model=folder, dtype="float32", limits=limits), mesh)


def serving(standing: Standing, *, token: str | None = None, port: int = 0) -> "contextlib.AbstractContextManager[str]":
    """The URL of a server that stops with the block; the service goes on."""
    return serving_app(make_app(standing, token=token), port=port)


@contextlib.contextmanager
def serving_app(app: ASGIApp, *, port: int = 0) -> Iterator[str]:
    """The URL of an application."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class ServerProcess:
    """`python -m teacher.serve` on one device, on the same port however often it is started.

    Attributes:
        url: Where it is asked.
        process: What has been started last.
    """

    def __init__(self, folder: str, log: Path, limits: Limits = LIMITS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "teacher.serve", "--model", folder, "--dtype", "float32"]
        for name, value in {"port": port, **dataclasses.asdict(limits)}.items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._log = log

    def start(self) -> None:
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
        with self._log.open("a") as output:
            self.process = subprocess.Popen(self._command, env=environment, stdout=output, stderr=output)

    def wait(self) -> set[int]:
        """Until it can be asked; what /ready has answered until then."""
        statuses: set[int] = set()
        while 200 not in statuses:
            assert self.process.poll() is None, self._log.read_text()
            try:
                statuses.add(httpx2.get(f"{self.url}/ready").status_code)
            except httpx2.TransportError:
                time.sleep(0.1)
        return statuses

    def kill(self) -> None:
        """Without a warning."""
        self.process.kill()
        self.process.wait()

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def answered(self) -> int:
        """Requests for targets."""
        metrics = httpx2.get(f"{self.url}/metrics").text.splitlines()
        of_targets = 'teacher_requests_total{endpoint="/v1/targets",status="200"}'
        return next((int(float(line.split()[-1])) for line in metrics if line.startswith(of_targets)), 0)
