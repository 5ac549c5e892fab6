"""Generation for many clients: what comes joins what is under way, by programs that are compiled before the first."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence

from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.engine import Engine, Request
from qwen3.generation.sampling import Plan, SamplingParams, non_thinking_params, thinking_params
from qwen3.generation.slots import Written
from qwen3.hosts.launcher import Launcher, Work
from qwen3.rollout import NON_THINKING, Rollout
from teacher.limits import Limits
from teacher.serve.metrics import Metrics
from teacher.wire import Refused

MOST_TOP_K = 256
"""Largest top_k that is sampled from."""
_DISPATCH_TOKENS = 32
"""Tokens between two looks of the host, at which requests join and leave."""
_FOLLOWED_TOKENS = 8
"""The same where somebody reads along."""
OnWritten = Callable[[int, Written], bool]
"""Called with the place of a request among those submitted together and what has been written for it; says whether it
goes on. The thread that generates calls it: what takes long belongs elsewhere, and its answer into a later call."""


@dataclasses.dataclass(eq=False)
class _Job:
    requests: Sequence[Request]
    numbers: tuple[int, int]
    """Seed and step: requests that share them are generated together."""
    needed: Plan
    on_written: OnWritten | None
    dispatch_tokens: int
    future: "concurrent.futures.Future[list[Rollout]]"
    rollouts: list[Rollout | None]
    stopped: set[int] = dataclasses.field(default_factory=set)

    def end(self, place: int, rollout: Rollout) -> None:
        self.rollouts[place] = rollout
        whole = [one for one in self.rollouts if one is not None]
        if len(whole) == len(self.rollouts):
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # given up meanwhile
                self.future.set_result(whole)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)


class GenerationQueue:
    """Generates what is submitted. What shares seed and step with what is under way joins it, in the order in which it
    came; the first that does not waits until that has ended, and all behind it with it."""

    def __init__(
        self,
        model: Qwen3,
        tokenizer: ChatTokenizer,
        limits: Limits,
        metrics: Metrics,
        launcher: Launcher | None,
    ):
        """`launcher` is that of `qwen3.generation.engine.Engine`."""
        self._model, self._metrics = model, metrics
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
            launcher=launcher,
        )
        # As Qwen3's authors recommend, which is cheap, and in every other way, with the likeliest tokens told.
        recommended = Plan.of([thinking_params(1), non_thinking_params(1)], self._vocab_size)
        self._plans = (recommended, Plan.of_all(MOST_TOP_K, self._vocab_size, named=limits.max_top_k))
        self._waiting: collections.deque[_Job] = collections.deque()
        self._lock = threading.Lock()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "generate")

    def device_bytes(self) -> int | None:
        """What generating takes on a device beside the weights, at most; None where it is not known."""
        return self._engine.device_bytes(self._model, self._plans)

    def works(self) -> dict[str, Work]:
        """What is launched, by name, for a process that follows one that generates."""
        return self._engine.works(self._model)

    def compile(self) -> None:
        """Compiles what generates, by generating a token in each way."""
        params = SamplingParams(max_new_tokens=1)
        one = Request(prompt_ids=[0, 0], prompt_id="", sample_index=0, mode=NON_THINKING, params=params)
        for plan in self._plans:
            self._engine.generate(self._model, [one], seed=0, policy_step=0, plan=plan)

    def submit(
        self,
        requests: Sequence[Request],
        *,
        seed: int,
        step: int = 0,
        named: int = 0,
        on_written: OnWritten | None = None,
        followed: bool = False,
    ) -> "concurrent.futures.Future[list[Rollout]]":
        """The rollouts, in the order of the requests, when all of them are there.

        They are those that `Engine.generate` gives for `seed` and `step`, whoever else asks meanwhile. Cancelling the
        future ends them.

        Args:
            requests: Sequences to be written.
            seed, step: Part of every random key.
            named: How many of the likeliest tokens `on_written` is told at every position, or more.
            on_written: Told of all that is written, part by part.
            followed: Whether somebody reads along, so that parts are short.

        Raises Refused for a request that the engine refuses.
        """
        for index, request in enumerate(requests):
            try:
                self._engine.check(request)
            except UserError as error:
                raise Refused(f"requests[{index}]", f"cannot be generated from: {error}") from None
        needed = Plan.of([request.params for request in requests], self._vocab_size)
        job = _Job(
            requests=requests,
            numbers=(seed, step),
            needed=dataclasses.replace(needed, named=min(named, self._vocab_size)),
            on_written=on_written,
            dispatch_tokens=_FOLLOWED_TOKENS if followed else _DISPATCH_TOKENS,
            future=concurrent.futures.Future(),
            rollouts=[None] * len(requests),
        )
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
            numbers = next((job.numbers for job in self._waiting if not job.future.done()), None)
        if numbers is None:
            return
        session = _Session(lambda: self._taken(numbers), self._plans, self._metrics)
        seed, step = numbers
        try:
            self._engine.follow(self._model, session, seed=seed, policy_step=0, step=step)
        except Exception as error:  # noqa: BLE001 - whatever it is, its clients must hear of it
            session.fail(error)

    def _taken(self, numbers: tuple[int, int]) -> list[_Job]:
        """Those that came first, as far as they have these numbers. Whoever has gone is passed over."""
        taken = []
        with self._lock:
            while self._waiting and (self._waiting[0].future.done() or self._waiting[0].numbers == numbers):
                job = self._waiting.popleft()
                if not job.future.done():
                    taken.append(job)
        return taken


class _Session:
    """Jobs of one seed and step on their way through the engine: its `qwen3.generation.live.Live`."""

    def __init__(self, coming: Callable[[], list[_Job]], plans: Sequence[Plan], metrics: Metrics):
        self._coming, self._plans, self._metrics = coming, plans, metrics
        self._jobs: dict[int, tuple[_Job, int]] = {}
        self._count = 0

    def joining(self) -> Sequence[Request]:
        requests: list[Request] = []
        for job in self._coming():
            for place, request in enumerate(job.requests):
                self._jobs[self._count] = job, place
                self._count += 1
                requests.append(request)
        return requests

    def next_dispatch(self) -> tuple[Plan, int]:
        jobs = [job for job, _ in self._jobs.values()]
        plan = next(plan for plan in self._plans if all(plan.covers(job.needed) for job in jobs))
        return plan, min((job.dispatch_tokens for job in jobs), default=_DISPATCH_TOKENS)

    def wanted(self, index: int) -> bool:
        job, place = self._jobs[index]
        return not job.future.done() and place not in job.stopped

    def written(self, index: int, part: Written) -> None:
        job, place = self._jobs[index]
        self._metrics.generated_tokens.inc(len(part.tokens))
        if job.on_written is not None and not job.on_written(place, part):
            job.stopped.add(place)

    def ended(self, index: int, rollout: Rollout) -> None:
        job, place = self._jobs.pop(index)
        job.end(place, rollout)

    def fail(self, error: Exception) -> None:
        self.joining()  # also whom it has kept from joining
        for job, _ in self._jobs.values():
            job.fail(error)
