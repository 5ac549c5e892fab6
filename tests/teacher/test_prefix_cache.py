"""What sequences begin with is read once, and what is said about them is what is said without a cache."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import PAGE_SIZE
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.generation.pages import PagePool
from qwen3.sharding import MeshShape, make_mesh, shardings
from teacher.limits import Limits
from teacher.serve.batches import Batch, Unit
from teacher.serve.metrics import Metrics
from teacher.serve.packing import Packed
from teacher.serve.programs import Launched, Programs, shapes_of
from teacher.serve.queues import ScoringQueue
from teacher.serve.service import Served
from teacher.wire import KINDS, Answer, Kind, TargetsRequest
from tests.teacher.serving import ARCHITECTURE, make_folder

# float32 sums in another order, over a prefix that stands apart.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
VOCABULARY = 96
DENSE = {**ARCHITECTURE, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_key_value_heads": 2}
MOE = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
CHUNKS = {**DENSE, "dual_chunk_attention_config": {"chunk_size": 48, "local_size": 8}}
LIMITS = Limits(
    max_sequence_tokens=160,
    batch_tokens=160,
    max_top_k=4,
    max_ids=3,
    max_sampled_tokens=3,
    max_request_tokens=4_096,
    max_prompt_tokens=80,
    max_new_tokens=40,
    prefix_cache_tokens=1_024,
)


def make_programs(architecture: dict[str, Any], **shape: int) -> Programs:
    mesh = make_mesh(MeshShape(**shape), jax.devices()[: math.prod(shape.values())])
    model = jax.jit(Qwen3, static_argnums=0)(ModelConfig.from_hf(architecture), jax.random.key(0))
    return Programs(jax.device_put(model, shardings(model, mesh)), mesh, LIMITS)


def tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, count).astype(np.int32)


def continued(prefix: np.ndarray, *lengths: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.concatenate((prefix, tokens(rng, length))) for length in lengths]


def asked(kind: Kind, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> TargetsRequest:
    rng = np.random.default_rng(2)
    ids = seeds = None
    if kind == "at_ids":
        ids = [
            rng.integers(-1, VOCABULARY, (len(one) - start, 3)).astype(np.int32)
            for one, start in zip(sequences, starts, strict=True)
        ]
    elif kind == "sampled":
        seeds = [5 + index for index in range(len(sequences))]
    return TargetsRequest(
        targets=kind,
        sequences=sequences,
        starts=starts,
        entries=0 if kind == "hidden" else 3,
        ids=ids,
        seeds=seeds,
        top_k=2 if kind == "at_ids" else 0,
    )


def scored(programs: Programs, request: TargetsRequest) -> tuple[list[Answer], list[Launched]]:
    """By as many batches as it takes."""
    waiting = [Unit(request, index) for index in range(len(request.sequences))]
    answers: dict[int, Answer] = {}
    launched = []
    while waiting:
        batch = programs.batch()
        waiting = [unit for unit in waiting if not batch.take(unit)]
        launched.append(programs.launch(batch))
        answers |= {unit.index: answer for unit, answer in zip(batch.units, launched[-1].answers(), strict=True)}
    return [answers[index] for index in range(len(request.sequences))], launched


def check_same(found: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, array in theirs.items():
            assert mine[name].shape == array.shape
            if array.dtype.kind in "iu":
                np.testing.assert_array_equal(mine[name], array)
            else:
                np.testing.assert_allclose(mine[name], array, **TOLERANCE)


def scored_apart(programs: Programs, request: TargetsRequest) -> list[Answer]:
    """Each sequence in a batch of its own, with nothing known."""
    answers = []
    for index in range(len(request.sequences)):
        programs.forget()
        batch = programs.batch()
        assert batch.take(Unit(request, index))
        launched = programs.launch(batch)
        assert launched.read_tokens == len(request.sequences[index])
        answers += launched.answers()
    programs.forget()
    return answers


def read_tokens(launched: Sequence[Launched]) -> int:
    return sum(one.read_tokens for one in launched)


@pytest.fixture(scope="module")
def dense() -> Programs:
    return make_programs(DENSE)


@pytest.fixture(scope="module", params=["dense", "moe", "dual_chunk"])
def programs(request: pytest.FixtureRequest, dense: Programs) -> Programs:
    return dense if request.param == "dense" else make_programs({"moe": MOE, "dual_chunk": CHUNKS}[request.param])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_behind_a_known_prefix_are_those_without_one(programs, kind):
    """In the batch that reads it and in later ones; about positions behind the prefix and within it; of sequences that
    are known to their end, and of one that goes on from another's continuation."""
    rng = np.random.default_rng(KINDS.index(kind))
    prefix = tokens(rng, 70)
    first, second = continued(prefix, 40, 25)
    longer = continued(first[:96], 30, seed=3)[0]
    sequences = [first, second, tokens(rng, 33), first[:96], prefix[:64], longer]
    request = asked(kind, sequences, starts=[0, 64, 5, 40, 63, 10])
    wanted = scored_apart(programs, request)
    found, launched = scored(programs, request)
    check_same(found, wanted)
    # Pages of 32: of the second one 64 are known, of the fourth and fifth all, of the last 96.
    assert read_tokens(launched) == len(first) + (len(second) - 64) + 33 + 0 + 0 + 30
    again, launched = scored(programs, request)
    check_same(again, wanted)
    assert read_tokens(launched) == sum(len(one) % PAGE_SIZE for one in sequences)


def test_every_share_of_the_rows_has_prefixes_of_its_own(dense):
    spread = make_programs(DENSE, fsdp=2, tensor=2)
    rng = np.random.default_rng(7)
    prefixes = [tokens(rng, 64) for _ in range(2)]
    sequences = [one for prefix in prefixes for one in continued(prefix, 20, 30, 40, seed=int(prefix[0]))]
    request = asked("top_k", sequences, starts=[0, 70, 64] * 2)
    found, launched = scored(spread, request)
    check_same(found, scored_apart(dense, request))
    shares = {piece.unit.index: piece.share for one in launched for step in one.steps for piece in step.pieces}
    assert {shares[0], shares[3]} == {0, 1}
    assert read_tokens(launched) == 2 * (64 + 20 + 30 + 40)


def test_a_full_cache_forgets_what_was_not_asked_for_longest(dense):
    """32 pages hold eight sequences of 128; those that return the whole time are never read again."""
    rng = np.random.default_rng(5)
    kept = tokens(rng, 64)
    for turn in range(12):
        (sequence,) = continued(kept, 70, seed=turn)
        request = asked("hidden", [sequence, tokens(rng, 128)], starts=[0, 0])
        found, launched = scored(dense, request)
        assert read_tokens(launched) == (0 if turn else 64) + 70 + 128
    assert dense._pools[0].free == 32
    check_same(found, scored_apart(dense, request))
    assert dense.prefix_bytes == 33 * PAGE_SIZE * 4 * (2 * 2 * 2 * 16 + 16)


def test_after_a_failure_nothing_is_taken_for_known(dense, monkeypatch):
    """The batch fails once its pages are the program's: they are lost, and so is what stood in them."""
    request = asked("top_k", [tokens(np.random.default_rng(9), 100)], starts=[0])
    (wanted,) = scored_apart(dense, request)
    scored(dense, request)

    def failing(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        for shape in dense.shapes:
            patched.setitem(dense._compiled, ("top_k", shape), failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            scored(dense, request)
    found, launched = scored(dense, request)
    check_same(found, [wanted])
    assert read_tokens(launched) == 100


def test_who_leaves_holds_no_pages_and_hits_are_counted(dense):
    dense.forget()
    metrics = Metrics()
    queue = ScoringQueue(dense, metrics)
    request = asked("at_ids", continued(tokens(np.random.default_rng(3), 64), 9, 9, 9), starts=[64] * 3)
    queue._under_way = 1  # nothing begins
    left, stays = queue.submit(request), queue.submit(request)
    assert left.cancel()
    queue._end()
    assert stays.result(60)["ids"].shape == (27, 5)
    queue.close()
    assert dense._pools[0].free == 32
    text = metrics.text().decode()
    assert 'teacher_prefix_lookup_tokens_total{work="scoring"} 219.0' in text
    assert 'teacher_prefix_hit_tokens_total{work="scoring"} 128.0' in text
    assert "teacher_scored_tokens_total 219.0" in text


def test_prefixes_of_rows_that_several_devices_have_are_refused(tmp_path):
    limits = dataclasses.replace(LIMITS, prefix_cache_tokens=64, max_sequence_tokens=128)
    served = Served(model=make_folder(tmp_path), mesh=MeshShape(data=-1, context=2), limits=limits)
    with pytest.raises(UserError, match=r"--prefix-cache-tokens is 64, but .* --mesh.context 2 .* set it to 0"):
        served.check()


def test_a_prompt_of_16_continuations_costs_little_more_than_its_tokens():
    """1,024 tokens, and 64 behind them in each: as many go through the layers as there are different ones, in a batch
    of no more places, where each sequence read alone takes 17,408."""
    limits = Limits()
    shapes = shapes_of(limits, make_mesh(MeshShape(), jax.devices()[:1]))
    batch = Batch(shapes[-1], [PagePool(limits.prefix_cache_tokens // PAGE_SIZE, PAGE_SIZE)], 0)
    prompt = tokens(np.random.default_rng(0), 1_024)
    request = TargetsRequest(targets="hidden", sequences=continued(prompt, *[64] * 16), starts=[1_023] * 16)
    assert all(batch.take(Unit(request, index)) for index in range(16))
    assert sum(len(piece.positions) for piece in batch.read) == 1_024 + 16 * 64
    assert Packed.smallest(batch.read, shapes, 1).shape.tokens <= 1.3 * (1_024 + 16 * 64)
    assert sum(len(piece.positions) for piece in batch.recalled) == 15
