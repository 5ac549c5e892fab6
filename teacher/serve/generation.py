"""Generation for many clients: what waits is generated together, by programs that are compiled before the first."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import Plan, SamplingParams, non_thinking_params, thinking_params
from qwen3.rollout import NON_THINKING, Rollout
from teacher.limits import Limits
from teacher.serve.metrics import Metrics
from teacher.wire import Refused

MOST_TOP_K = 256
"""Largest top_k that is sampled from."""


@dataclasses.dataclass(eq=False)
class _Job:
    requests: Sequence[Request]
    numbers: tuple[int, int]
    """Seed and step: requests that share them are generated together."""
    future: "concurrent.futures.Future[list[Rollout]]"


class _Abandoned(Exception):
    """Ends a batch that nobody waits for any more."""


class GenerationQueue:
    """Generates what is submitted; several requests at once, those that came first before others.

    A batch begins when the one before it has ended: a request that comes meanwhile waits for it.
    """

    def __init__(
        self,
        model: Qwen3,
        tokenizer: ChatTokenizer,
        limits: Limits,
        metrics: Metrics,
        turn: contextlib.AbstractContextManager[Any],
    ):
        """`turn` is held while programs begin that must not mix with others on several devices."""
        self._model, self._metrics, self._turn = model, metrics, turn
        self._vocab_size = model.config.vocab_size
        thinks = tokenizer.think_end_id is not None
        self._engine = Engine(
            model.config,
            batch_size=limits.generation_batch_size,
            max_prompt_tokens=limits.max_prompt_tokens,
            max_new_tokens=limits.max_new_tokens,
            stop_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            stop_thinking_ids=tokenizer.stop_thinking_ids if thinks else (),
            think_end_id=tokenizer.think_end_id,
        )
        # As Qwen3's authors recommend, which is cheap, and in every other way.
        recommended = Plan.of([thinking_params(1), non_thinking_params(1)], self._vocab_size)
        self._plans = (recommended, Plan.of_all(MOST_TOP_K, self._vocab_size))
        self._waiting: collections.deque[_Job] = collections.deque()
        self._lock = threading.Lock()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "generate")

    def compile(self) -> None:
        """Compiles what generates, by generating a token in each way."""
        params = SamplingParams(max_new_tokens=1)
        one = Request(prompt_ids=[0, 0], prompt_id="", sample_index=0, mode=NON_THINKING, params=params)
        for plan in self._plans:
            self._engine.generate(self._model, [one], seed=0, policy_step=0, plan=plan)

    def submit(
        self, requests: Sequence[Request], *, seed: int, step: int = 0
    ) -> "concurrent.futures.Future[list[Rollout]]":
        """The rollouts, in the order of the requests, when all of them are there.

        They are those that `Engine.generate` gives for `seed` and `step`, whoever else asks meanwhile. Raises Refused
        for a request that the engine refuses."""
        for index, request in enumerate(requests):
            try:
                self._engine.check(request)
            except UserError as error:
                raise Refused(f"requests[{index}]", f"cannot be generated from: {error}") from None
        job = _Job(requests, (seed, step), concurrent.futures.Future())
        with self._lock:
            self._waiting.append(job)
        self._thread.submit(self._generate)
        return job.future

    def close(self) -> None:
        """Finishes what waits and ends the thread."""
        self._thread.shutdown()

    def _generate(self) -> None:
        """Generates for those that came first, and for all others of their seed and step."""
        with self._lock:
            live = [job for job in self._waiting if not job.future.done()]
            batch = [job for job in live if job.numbers == live[0].numbers]
            self._waiting = collections.deque(job for job in live if job not in batch)
        if not batch:
            return
        requests = [request for job in batch for request in job.requests]
        needed = Plan.of([request.params for request in requests], self._vocab_size)
        plan = next(plan for plan in self._plans if plan.covers(needed))
        seed, step = batch[0].numbers

        def on_progress(rollouts: int, tokens: int) -> None:
            self._metrics.generated_tokens.inc(tokens)
            if all(job.future.done() for job in batch):
                raise _Abandoned

        try:
            with self._turn:
                rollouts = iter(
                    self._engine.generate(
                        self._model, requests, seed=seed, policy_step=0, step=step, plan=plan, on_progress=on_progress
                    )
                )
        except _Abandoned:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, its clients must hear of it
            for job in batch:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    job.future.set_exception(error)
            return
        for job in batch:
            own = [next(rollouts) for _ in job.requests]
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # given up meanwhile
                job.future.set_result(own)
