"""What a teacher on a device of its own gains: its scoring beside the student's training, against one after the other.

    python -m experiments.benchmarks.own_mesh

prints one line of JSON for each way to do a step, seconds in one run by turns. XLA spreads a program over all cores of
a process, whichever CPU device it is for, and a device takes several programs at once: two of them share what one has
alone and cannot show a gain. Here a device is one core that takes one program after the other: a model's pass computes
next to nothing and then counts in a loop, which has one thread, for the time that it is said to take; what the teacher
reads waits for what it said before; and a thread of its own dispatches the teacher's programs, since on CPU those of
one thread begin in the order of their dispatch, whichever device they are for. All else is the product's own: scorer,
transfer between meshes, rollouts generated ahead from one thread, as they are where meshes have several devices, and
the train step."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from distill.stages.ahead import Written, WrittenAhead
from distill.training.losses import Loss
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from experiments.benchmarks.machine import machine
from experiments.benchmarks.sizes import SIZES
from experiments.benchmarks.turns import LEARNING_RATE
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Output, Qwen3
from qwen3.sharding import MeshShape, make_placed
from teacher.placement import own_mesh
from teacher.scoring import Scorer
from teacher.targets import Hidden

_SHAPE = (2, 64)
"""Rows and tokens of a microbatch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    microbatches: int = 4
    """Of a step."""
    score_seconds: float = 0.1
    """The teacher's device is busy so long with a microbatch."""
    train_seconds: float = 0.1
    """So long the student's."""
    generate_seconds: float = 0.2
    """So long the student's with the rollouts of an on-policy step."""
    rounds: int = 8
    """Each way is measured once in a round."""


class Counting(Qwen3):
    """A model whose forward pass ends with a loop of so many rounds."""

    def __init__(self, config: ModelConfig, key: jax.Array, rounds: int):
        super().__init__(config, key)
        self.rounds = rounds

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        *,
        rematerialise: bool = False,
        mesh: Mesh | None = None,
    ) -> Output:
        out = super().__call__(tokens, positions, segment_ids, rematerialise=rematerialise, mesh=mesh)
        # It begins with a number of the pass, or it would not come after it.
        begin = jax.lax.stop_gradient(out.hidden[0, 0, 0])
        return out._replace(hidden=out.hidden + 0 * counted(begin, self.rounds))


@jax.jit
def counted(begin: Float[Array, ""], rounds: int | Int[Array, ""]) -> Float[Array, ""]:
    """A number that takes `rounds` rounds to find, each after the other."""
    return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.cos(x), begin)


@jax.jit
def _after(tokens: Int[Array, "B T"], said: Hidden) -> Int[Array, "B T"]:
    """The tokens, once the teacher has said that."""
    return tokens + (0 * said.hidden[0, 0, 0]).astype(tokens.dtype)


def rounds_per_second() -> float:
    """Of `counted`, by processor time, of which other threads of this process may take some: at its best of five."""
    begin, rounds, seconds = jnp.float32(0.5), 1_000_000, []
    counted(begin, rounds).block_until_ready()
    for _ in range(5):
        started = time.process_time()
        counted(begin, rounds).block_until_ready()
        seconds.append(time.process_time() - started)
    return rounds / min(seconds)


class Steps:
    """The ways to do a step, by a student and a teacher with a device each, or on one."""

    def __init__(self, arguments: Arguments, teacher_mesh: Mesh, mesh: Mesh):
        self._asked, self._mesh = arguments, mesh
        size, self._rounds_per_second = SIZES["tiny"], rounds_per_second()
        teacher, student = (
            dataclasses.replace(config, num_hidden_layers=1, vocab_size=256) for config in (size.teacher, size.student)
        )
        self._own, self._colocated = (
            Scorer(self._model(teacher, arguments.score_seconds, where), where, wanted_on=mesh)
            for where in (teacher_mesh, mesh)
        )
        transformation = optax.adamw(LEARNING_RATE)
        model = self._model(student, arguments.train_seconds, mesh)
        self._state = TrainState.start(model, transformation, mesh)
        self._train_step = TrainStep(
            transformation=transformation, loss=Loss(name="reverse_kl"), mesh=mesh, teacher_head=self._own.head
        )
        self._dispatcher = ThreadPoolExecutor(1, "scores")
        self._rows = _rows(student.vocab_size, arguments.microbatches)
        self._ready = self._scored(self._own)

    def ways(self) -> dict[str, Callable[[], None]]:
        """What is done in a step, by name; each waits until all of it is done."""
        return {
            "score alone": lambda: self._wait_for(self._score(self._own)),
            "train alone": lambda: self._train(self._ready),
            "colocated": lambda: self._train(self._scored(self._colocated)),
            "own meshes, one after the other": lambda: self._train(self._scored(self._own)),
            "own meshes": lambda: self._train(self._score(self._own)),
            "on-policy, colocated": lambda: self._on_policy(self._colocated),
            "on-policy, own meshes": lambda: self._on_policy(self._own),
        }

    def ahead(self, steps: int) -> Callable[[], None]:
        """Each of so many steps trains on what older weights generated, as the on-policy stage does with a lag of 1."""
        written = WrittenAhead(1, steps, lambda *_: self._write(), lambda _: [self._score(self._own)], threads=False)
        numbers = iter(range(steps))

        def step() -> None:
            written.rollouts(next(numbers), self._state.model)
            self._train(written.batches()[0])

        return step

    def _model(self, config: ModelConfig, seconds: float, mesh: Mesh) -> Counting:
        rounds = int(seconds * self._rounds_per_second)
        return make_placed(lambda key: Counting(config, key, rounds), jax.random.key(0), mesh)

    def _on_policy(self, scorer: Scorer) -> None:
        self._write()
        self._train(self._scored(scorer) if scorer is self._colocated else self._score(scorer))

    def _write(self) -> Written:
        seconds = self._asked.generate_seconds
        begin = jax.device_put(np.float32(0.5), self._mesh.devices.flat[0])
        counted(begin, int(seconds * self._rounds_per_second)).block_until_ready()
        return Written(rollouts=[], seconds=seconds)

    def _score(self, scorer: Scorer) -> list[Batch]:
        return self._dispatcher.submit(self._dispatch, scorer).result()

    def _dispatch(self, scorer: Scorer) -> list[Batch]:
        batches: list[Batch] = []
        for row in self._rows:
            tokens: Any = _after(row["tokens"], batches[-1].targets) if batches else row["tokens"]
            batches.append(Batch.of(row, scorer.hidden(tokens, row["positions"], row["segment_ids"])))
        return batches

    def _scored(self, scorer: Scorer) -> list[Batch]:
        batches = self._score(scorer)
        self._wait_for(batches)
        return batches

    def _wait_for(self, batches: list[Batch]) -> None:
        jax.block_until_ready([batch.targets for batch in batches])

    def _train(self, batches: Sequence[Batch]) -> None:
        self._state, _ = self._train_step(self._state, batches)


def _rows(vocabulary: int, count: int) -> list[dict[str, np.ndarray]]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, *_SHAPE)).astype(np.int32)
    positions = np.broadcast_to(np.arange(_SHAPE[1], dtype=np.int32), _SHAPE)
    rest = {"positions": positions, "segment_ids": np.ones_like(positions), "loss_mask": positions < _SHAPE[1] - 1}
    return [{"tokens": one, "mode": np.zeros(_SHAPE, np.uint8), **rest} for one in tokens]


def ideals(asked: Arguments) -> Mapping[str, tuple[float, float]]:
    """By way, the seconds of a step if nothing but the devices' own time counted, and that time of both devices."""
    score, train = (asked.microbatches * each for each in (asked.score_seconds, asked.train_seconds))
    both, written = score + train, asked.generate_seconds
    # The first microbatch is scored before any is trained on, the last one trained on after all are scored.
    piped = asked.score_seconds + asked.train_seconds + max(score - asked.score_seconds, train - asked.train_seconds)
    return {
        "score alone": (score, score),
        "train alone": (train, train),
        "colocated": (both, both),
        "own meshes, one after the other": (both, both),
        "own meshes": (piped, both),
        "on-policy, colocated": (written + both, written + both),
        "on-policy, own meshes": (written + piped, written + both),
        "on-policy, own meshes, generated ahead": (max(score, written + train), written + both),
    }


def thread_seconds() -> float:
    """Seconds for which the living threads of this Linux process have run, or would have run if they had had a core."""
    total = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            running, waiting, _ = (thread / "schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has ended, before it was opened or before it was read
            continue
        total += int(running) + int(waiting)
    return total / 1e9


def main(asked: Arguments) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    for row in measure(asked, jax.devices()):
        print(json.dumps(row | dataclasses.asdict(asked) | machine()), flush=True)


def measure(asked: Arguments, devices: list[jax.Device]) -> Iterator[dict[str, Any]]:
    """A row for each way, on two devices."""
    steps = Steps(asked, *own_mesh(MeshShape(data=1), MeshShape(data=1), devices))
    # One to compile, and no step is the last, which would have nothing to write for later ones.
    ways = steps.ways() | {"on-policy, own meshes, generated ahead": steps.ahead(asked.rounds + 2)}
    for step in ways.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    working: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, step in ways.items():
            begun = time.perf_counter(), thread_seconds()
            step()
            taken = time.perf_counter() - begun[0]
            seconds[name].append(taken)
            working[name].append((thread_seconds() - begun[1]) / taken)
    for name, (ideal, both) in ideals(asked).items():
        yield {
            "benchmark": "own_mesh",
            "way": name,
            "ideal_seconds": round(ideal, 3),
            "median_seconds": round(float(np.median(seconds[name])), 3),
            "fastest_seconds": round(min(seconds[name]), 3),
            "slowest_seconds": round(max(seconds[name]), 3),
            "ideal_devices_at_work": round(both / ideal, 2),
            "devices_at_work": round(float(np.median(working[name])), 2),
        }


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
