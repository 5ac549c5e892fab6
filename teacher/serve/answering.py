"""What is wanted becomes choices: tokens as the engine writes them, their text as far as it is final, and scores of the
prompts."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from qwen3.generation.slots import Written
from teacher.serve.calls import Call
from teacher.serve.text import GrowingText
from teacher.serve.wanted import Wanted, check_together
from teacher.wire import Answer, TargetsRequest


@dataclasses.dataclass(frozen=True)
class Token:
    """A generated token and what the model says about it, at temperature 1."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]]
    """The likeliest tokens, as many as are wanted."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has become final of a choice since its last piece."""

    choice: int
    text: str
    tokens: Sequence[Token]
    finish_reason: str | None
    """Of the choice's last piece: "stop" or "length"."""
    stop_reason: str | int | None


class Choice:
    """One continuation, as far as it has come.

    Attributes:
        place: Among all of the call.
        wanted: What it is a choice of.
        text: Final text.
        tokens: As many as belong to it: none behind its end.
        finish_reason: "stop" or "length"; None as long as it goes on.
        stop_reason: The stop string, or the client's stop token, that has ended it.
    """

    def __init__(self, place: int, wanted: Wanted, end_ids: Sequence[int]):
        self.place, self.wanted = place, wanted
        params = wanted.params
        self._stop_ids = frozenset(end_ids if params is None or params.stop_ids is None else params.stop_ids)
        self._end_ids = frozenset(end_ids)
        self._growing = GrowingText(wanted.spelling)
        self.text = ""
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None if wanted.new_tokens else "length"
        self.stop_reason: str | int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more belongs to it."""
        return self.finish_reason is not None

    def add(self, part: Written) -> Piece | None:
        """Takes what has been written for it. None behind its end."""
        if self.ended:
            return None
        first, text = len(self.tokens), ""
        named = self.wanted.logprobs or 0
        rows = zip(
            part.tokens.tolist(),
            part.chosen.tolist(),
            part.logprobs.tolist(),
            part.top_ids[:, :named].tolist(),
            part.top_logprobs[:, :named].tolist(),
            strict=True,
        )
        for token, chosen, logprob, ids, logprobs in rows:
            text += self._grown(Token(token, logprob, tuple(zip(ids, logprobs, strict=True))), chosen)
            if self.finish_reason is not None:
                break
        return self._piece(text, first)

    def add_one(self, answer: Answer) -> Piece:
        """Takes its only token: the likeliest, or one that is sampled, of which no more is told."""
        ids, named = answer["ids"][0].tolist(), self.wanted.logprobs or 0
        logprobs = answer["logprobs"][0].tolist() if "logprobs" in answer else [0.0]
        token = Token(ids[0], logprobs[0], list(zip(ids, logprobs, strict=True))[:named])
        return self._piece(self._grown(token, True), 0)

    def _piece(self, text: str, first: int) -> Piece:
        self.text += text
        return Piece(self.place, text, self.tokens[first:], self.finish_reason, self.stop_reason)

    def _grown(self, token: Token, chosen: bool) -> str:
        self.tokens.append(token)
        is_stop = chosen and token.id in self._stop_ids
        text = "" if is_stop and not self.wanted.spelling.keep_stop else self._growing.add(token.id)
        if self._growing.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", self._growing.stopped
        elif is_stop:
            self.finish_reason = "stop"
            self.stop_reason = None if token.id in self._end_ids else token.id
        elif len(self.tokens) == self.wanted.new_tokens:
            self.finish_reason = "length"
        if not self.ended:
            return text
        text += self._growing.end()
        if self._growing.stopped is not None:  # by what was held back until now
            self.finish_reason, self.stop_reason = "stop", self._growing.stopped
        return text


class Answering:
    """A call's prompts: checked and admitted by `begin`, scored by `scores`, gone on from by `pieces`.

    Attributes:
        choices: Those of the first prompt, those of the second, and so on.
    """

    def __init__(self, call: Call, wanted: Sequence[Wanted]):
        """Of what has been checked."""
        self._call, self._wanted = call, wanted
        end_ids = call.service.tokenizer.eos_ids
        owners = [one for one in wanted for _ in range(one.count)]
        self.choices = [Choice(place, one, end_ids) for place, one in enumerate(owners)]

    @classmethod
    async def begin(cls, call: Call, wanted: Sequence[Wanted]) -> "Answering":
        """Raises Refused for what is not served, and where too much waits."""
        service = call.service
        await asyncio.to_thread(check_together, wanted, service.limits, service.vocab_size)
        call.admit(sum(one.tokens for one in wanted))
        return cls(call, wanted)

    async def scored(self, request: TargetsRequest | None) -> Answer | None:
        """What the teacher says; nothing where nothing is asked."""
        if request is None:
            return None
        return await self._call.answer(self._call.service.scoring.submit(request))

    async def scores(self) -> list[tuple[Answer | None, Answer | None]]:
        """Of each prompt what its `top` and its `at_named` ask for."""
        vocab_size = self._call.service.vocab_size
        asked = [request for one in self._wanted for request in (one.top(vocab_size), one.at_named())]
        found = await asyncio.gather(*map(self.scored, asked))
        return list(zip(found[::2], found[1::2], strict=True))

    async def finish(self) -> None:
        """Waits for all choices."""
        async for _ in self.pieces(followed=False):
            pass

    async def pieces(self, *, followed: bool = True) -> AsyncIterator[Piece]:
        """Pieces of choices as they come. With `followed` they are short."""
        async for come in self.batches(followed=followed):
            for piece in come:
                yield piece

    async def batches(self, *, followed: bool = True) -> AsyncIterator[Sequence[Piece]]:
        """The same, together with what has come by the same time: of one choice there may be several."""
        service, loop = self._call.service, asyncio.get_running_loop()
        sampled = await asyncio.gather(*(self.scored(choice.wanted.one_token()) for choice in self.choices))
        for choice, answer in zip(self.choices, sampled, strict=True):
            if answer is not None:
                yield [choice.add_one(answer)]
        requests = [request for one in self._wanted for request in one.requests()]
        if not requests:
            return
        growing = [choice for choice in self.choices if not choice.ended]
        parts: asyncio.Queue[tuple[int, Written] | None] = asyncio.Queue()

        def on_written(index: int, part: Written) -> bool:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads any more
                loop.call_soon_threadsafe(parts.put_nowait, (index, part))
            return not growing[index].ended

        future = service.generation.submit(
            requests,
            seed=0,
            named=max(one.logprobs or 0 for one in self._wanted),
            on_written=on_written,
            followed=followed or any(one.spelling.stop for one in self._wanted),
        )
        # However its reader goes: a generator may be left where it stands.
        self._call.held.callback(future.cancel)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(parts.put_nowait, None))
        try:
            while not all(choice.ended for choice in growing):
                come = [await self._call.until(parts.get())]
                while not parts.empty():
                    come.append(parts.get_nowait())
                known = [(growing[one[0]], one[1]) for one in come if one is not None]
                yield await asyncio.to_thread(_added, known)
                if len(known) < len(come):
                    # Its end comes after all that it tells: what is open by then has failed.
                    future.result()
        finally:
            future.cancel()


def _added(come: Sequence[tuple[Choice, Written]]) -> list[Piece]:
    return [piece for choice, part in come if (piece := choice.add(part)) is not None]
