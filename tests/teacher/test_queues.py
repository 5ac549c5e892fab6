"""Which requests are scored together, and when: batches are full, or begin when the devices have nothing else to do."""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from qwen3.generation.pages import PagePool
from teacher.serve import queues
from teacher.serve.batches import Batch, Room, Shape, Unit
from teacher.serve.metrics import Metrics
from teacher.serve.programs import filled_shape
from teacher.serve.queues import ScoringQueue
from teacher.wire import Answer, Kind, TargetsRequest

SHAPES = [Shape(1, 16), Shape(1, 64), Shape(2, 64), Shape(8, 64)]
SECONDS = 10.0


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3], Shape(1, 16)),
        ([17], Shape(1, 64)),
        ([3] * 9, Shape(1, 16)),  # 27 of 64 would be more padding than tokens
        ([3] * 11, Shape(1, 64)),
        ([64], Shape(1, 64)),
        ([64] * 3, Shape(2, 64)),
        ([64] * 4, Shape(2, 64)),
        ([64] * 5, Shape(8, 64)),
        ([64] * 50, Shape(8, 64)),
        ([3, 64], Shape(2, 64)),
        ([3, 61], Shape(1, 64)),
        ([3] * 3 + [64] * 5, Shape(8, 64)),
    ],
)
def test_a_batch_has_more_tokens_than_padding_where_something_smaller_would_do(lengths, expected):
    assert filled_shape(SHAPES, lengths) == expected
    assert Room(expected, 1).take(0, lengths[0]) is not None


@dataclasses.dataclass
class Begun:
    """What has been begun; it is computed until `end` is called."""

    kind: Kind
    units: Sequence[Unit]
    read_tokens = 0
    steps = ()
    _ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def end(self) -> None:
        self._ended.set()

    def answers(self) -> list[Answer]:
        assert self._ended.wait(SECONDS)
        return [{"tokens": unit.tokens[unit.start :]} for unit in self.units]


class Devices:
    """In the place of `Programs`."""

    shapes, at_once = SHAPES, 2

    def __init__(self) -> None:
        self.begun: queue.Queue[Begun] = queue.Queue()

    def check(self, request: TargetsRequest) -> None:
        pass

    def batch(self, shape: Shape) -> Batch:
        return Batch(shape, [PagePool(0, 128)], 0)

    def launch(self, batch: Batch) -> Begun:
        begun = Begun(batch.units[0].kind, batch.units)
        self.begun.put(begun)
        return begun

    def forget(self) -> None:
        pass

    def next(self) -> Begun:
        return self.begun.get(timeout=SECONDS)


@pytest.fixture
def devices() -> Devices:
    return Devices()


@pytest.fixture
def scoring(devices: Devices) -> Iterator[ScoringQueue]:
    programs: Any = devices
    scoring = ScoringQueue(programs, Metrics())
    yield scoring
    scoring.close()


def request(kind: Kind, first: int, length: int = 64) -> TargetsRequest:
    return TargetsRequest(targets=kind, sequences=[np.arange(first, first + length, dtype=np.int32)], starts=[1])


def firsts(batch: Begun) -> list[int]:
    return [int(unit.tokens[0]) for unit in batch.units]


def test_a_batch_that_would_be_padded_waits_for_the_devices_and_a_full_one_does_not(devices, scoring):
    futures = [scoring.submit(request("hidden", 0))]
    alone = devices.next()
    futures += [scoring.submit(request("hidden", first)) for first in range(1, 8)]
    assert devices.begun.empty()
    futures.append(scoring.submit(request("hidden", 8)))
    full = devices.next()
    assert (firsts(alone), firsts(full)) == ([0], list(range(1, 9)))
    # Two are all that devices and memory are asked to hold.
    futures += [scoring.submit(request("hidden", first)) for first in range(9, 20)]
    assert devices.begun.empty()
    alone.end()
    third = devices.next()
    assert firsts(third) == list(range(9, 17))
    full.end()
    assert devices.begun.empty()
    third.end()
    last = [devices.next()]
    last[0].end()
    last.append(devices.next())
    last[1].end()
    assert list(map(firsts, last)) == [[17, 18], [19]]
    for first, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(SECONDS)["tokens"], np.arange(first + 1, first + 64))


def test_what_another_kind_is_asked_waits_for_its_turn_and_what_is_given_up_takes_no_room(devices, scoring):
    first = scoring.submit(request("hidden", 0))
    alone = devices.next()
    given_up, other, same = (
        scoring.submit(request(kind, index)) for index, kind in enumerate(("top_k", "top_k", "hidden"), start=1)
    )
    assert given_up.cancel()
    alone.end()
    second = devices.next()
    assert (second.kind, firsts(second)) == ("top_k", [2])
    second.end()
    third = devices.next()
    assert (third.kind, firsts(third)) == ("hidden", [3])
    third.end()
    assert all(future.result(SECONDS) for future in (first, other, same))


def test_those_of_another_kind_do_not_fill_a_batch(devices, scoring):
    futures = [scoring.submit(request("hidden", 0))]
    alone = devices.next()
    futures += [scoring.submit(request(kind, index)) for index, kind in enumerate(["hidden", "top_k"] * 4, start=1)]
    assert devices.begun.empty()
    batches = [alone]
    for _ in range(4):
        batches[-1].end()
        batches.append(devices.next())
    batches[-1].end()
    assert list(map(firsts, batches)) == [[0], [1, 3], [2, 4], [5, 7], [6, 8]]
    assert all(future.result(SECONDS) for future in futures)


def test_whoever_finds_no_room_is_tried_again_but_not_all_that_wait_behind(devices, scoring, monkeypatch):
    monkeypatch.setattr(queues, "_MOST_LEFT", 2)
    futures = [scoring.submit(request("hidden", 0))]
    alone = devices.next()
    kinds = ["hidden", "top_k", "top_k", "hidden"]
    futures += [scoring.submit(request(kind, index)) for index, kind in enumerate(kinds, start=1)]
    batches = [alone]
    for _ in range(3):
        batches[-1].end()
        batches.append(devices.next())
    batches[-1].end()
    assert list(map(firsts, batches)) == [[0], [1], [2, 3], [4]]
    assert all(future.result(SECONDS) for future in futures)


def test_an_error_in_forming_a_batch_is_told_to_all_that_wait(devices, scoring, monkeypatch):
    def fail(shape: Shape) -> Batch:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(devices, "batch", fail)
        with pytest.raises(MemoryError, match="no more"):
            scoring.submit(request("hidden", 0)).result(SECONDS)
    future = scoring.submit(request("hidden", 1))
    devices.next().end()
    assert future.result(SECONDS)
