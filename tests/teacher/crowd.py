"""Many clients at once, each of which must get what the teacher says of its own sequences, once."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from teacher.client import TeacherClient
from teacher.wire import Answer, TargetsRequest

# float32 sums in another order.
TOLERANCE = {"atol": 3e-5, "rtol": 1e-5}
_LONGEST, _AT_ONCE = 24, 250


class Crowd:
    """Clients with a thread each; requests of one sequence, of which no two are alike."""

    def __init__(self, folder: str, urls: Sequence[str], *, clients: int, requests: int):
        """`urls` are those of servers of the model in `folder`."""
        self._model = hf.load(folder)
        rng, vocab_size = np.random.default_rng(0), self._model.config.vocab_size
        self._requests: list[TargetsRequest] = []
        for index, length in enumerate(rng.integers(2, _LONGEST, requests)):
            tokens = rng.integers(0, vocab_size, length).astype(np.int32)
            start = int(rng.integers(0, length))
            asked: dict = (
                {"targets": "top_k", "entries": 3},
                {
                    "targets": "at_ids",
                    "entries": 2,
                    "ids": [rng.integers(0, vocab_size, (length - start, 2), np.int32)],
                },
                {"targets": "hidden"},
            )[index % 3]
            self._requests.append(TargetsRequest(sequences=[tokens], starts=[start], **asked))
        self._answers: dict[int, Answer] = {}
        self._clients = [TeacherClient(urls) for _ in range(clients)]

    def ask(self, until: int, on_answers: Callable[[int], None] = lambda _: None) -> None:
        """Asks all requests up to `until` that have not been asked. `on_answers` is called with how many have been
        answered, after each."""
        left = queue.SimpleQueue[int]()
        for index in range(len(self._answers), until):
            left.put(index)
        lock, failures = threading.Lock(), list[BaseException]()

        def work(client: TeacherClient) -> None:
            try:
                while not failures:
                    index = left.get_nowait()
                    (answer,) = client.targets(self._requests[index])
                    with lock:
                        assert index not in self._answers
                        self._answers[index] = answer
                        on_answers(len(self._answers))
            except queue.Empty:
                pass
            except BaseException as error:  # noqa: BLE001 - it is raised again where all have ended
                failures.append(error)

        threads = [threading.Thread(target=work, args=(client,)) for client in self._clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def check(self) -> None:
        """Holds every answer against the model's own logits."""
        assert self._answers.keys() == set(range(len(self._requests)))
        head = np.asarray(self._model.head)
        for index, logprobs in enumerate(self._reference()):
            answer, request = self._answers[index], self._requests[index]
            if request.targets == "hidden":
                found = np.asarray(jax.nn.log_softmax(answer["hidden"] @ head.T))
                np.testing.assert_allclose(found, logprobs, **TOLERANCE)
                continue
            ids, named = answer["ids"], answer["logprobs"]
            known = ids >= 0
            expected = np.where(known, np.take_along_axis(logprobs, np.maximum(ids, 0), 1), -np.inf)
            np.testing.assert_allclose(named, expected, **TOLERANCE)
            if request.targets == "top_k":
                np.testing.assert_allclose(named, -np.sort(-logprobs, axis=1)[:, :3], **TOLERANCE)
            else:
                assert request.ids is not None
                assert all(set(row) - {-1} == set(asked) for row, asked in zip(ids, request.ids[0], strict=True))
            tail = np.log1p(-np.exp(expected).sum(axis=1))
            np.testing.assert_allclose(answer["log_tail"], tail, **TOLERANCE)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _reference(self) -> Iterator[np.ndarray]:
        logits = jax.jit(Qwen3.logits)
        for first in range(0, len(self._requests), _AT_ONCE):
            requests = self._requests[first : first + _AT_ONCE]
            tokens, segments = (np.zeros((_AT_ONCE, _LONGEST), np.int32) for _ in range(2))
            for row, request in enumerate(requests):
                (sequence,) = request.sequences
                tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
            positions = np.broadcast_to(np.arange(_LONGEST, dtype=np.int32), tokens.shape)
            logprobs = np.asarray(jax.nn.log_softmax(logits(self._model, tokens, positions, segments)))
            for row, request in zip(logprobs, requests, strict=False):
                yield row[request.starts[0] : len(request.sequences[0])]
