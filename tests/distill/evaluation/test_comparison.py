"""What students are compared by, against the same sums written out over whole distributions in float64."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from distill.evaluation.comparison import Comparison, perplexity, scoring_shape
from distill.monitor.progress import Progress
from distill.stages.context import EngineSizes, TeacherModel
from distill.stages.stopping import Interrupted
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3, random_model
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import MODES, NON_THINKING, THINKING, Mode, Rollout
from qwen3.sharding import MeshShape, make_mesh
from teacher.placement import own_mesh
from tests.distill.miniature import DENSE, MOE

VOCABULARY = 40
_PADDED = 128
SIZES = EngineSizes(batch_size=4, max_prompt_tokens=8, sampling=(SamplingParams(max_new_tokens=11),))


def config(architecture: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(
        architecture | {"num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    )


def rollout(rng: np.random.Generator, mode: Mode, index: int) -> Rollout:
    """A prompt and a response of random tokens, some of which the policy has not chosen."""
    prompt, length = int(rng.integers(1, 8)), int(rng.integers(9, 19))
    mask = rng.random(length) < 0.8
    mask[: prompt - 1] = mask[-1] = False
    return Rollout(
        tokens=rng.integers(0, VOCABULARY, length).astype(np.int32),
        prompt_length=prompt,
        loss_mask=mask,
        sampler_logprobs=np.zeros(length, np.float32),
        mode=mode,
        prompt_id=str(index),
        sample_index=0,
        policy_step=0,
        finished=True,
    )


@jax.jit
def logits(model: Qwen3, tokens: np.ndarray, real: np.ndarray) -> jax.Array:
    return model.logits(tokens[None], np.arange(len(tokens))[None], real[None])[0]


def logprobs(model: Qwen3, one: Rollout) -> np.ndarray:
    """[T, V], of one response by itself."""
    length = len(one.tokens)
    # Padded behind, where no earlier token looks, so that it compiles once.
    padded, real = np.zeros(_PADDED, np.int32), (np.arange(_PADDED) < length).astype(np.int32)
    padded[:length] = one.tokens
    found = np.asarray(logits(model, padded, real), np.float64)[:length]
    return found - np.log(np.sum(np.exp(found), axis=-1, keepdims=True))


def written_out(student: Qwen3, teacher: Qwen3, rollouts: list[Rollout]) -> dict[str, float]:
    """Means over the tokens that the policy chose."""
    parts: dict[str, list[np.ndarray]] = {"forward_kl": [], "reverse_kl": [], "surprise": [], "top_1_agreement": []}
    for one in rollouts:
        q, p, mask = logprobs(student, one), logprobs(teacher, one), one.loss_mask
        parts["forward_kl"].append(np.sum(np.exp(p) * (p - q), axis=-1)[mask])
        parts["reverse_kl"].append(np.sum(np.exp(q) * (q - p), axis=-1)[mask])
        parts["surprise"].append(-q[np.arange(len(q) - 1), one.tokens[1:]][mask[:-1]])
        parts["top_1_agreement"].append((q.argmax(-1) == p.argmax(-1))[mask])
    means = {name: float(np.mean(np.concatenate(values))) for name, values in parts.items()}
    return means | {"perplexity": float(np.exp(means.pop("surprise")))}


class Stop:
    """A stop that is asked for after so many looks."""

    def __init__(self, looks: int = 10**6):
        self.left = looks

    def agreed(self) -> bool:
        self.left -= 1
        return self.left < 0


def comparison(
    teacher: Qwen3, meshes: tuple[Mesh, Mesh], responses: list[Rollout], stop: Stop, progress: Progress
) -> Comparison:
    mesh, teacher_mesh = meshes
    model = TeacherModel(model=teacher, mesh=teacher_mesh, fingerprint="")
    context: Any = SimpleNamespace(
        load_teacher=lambda name: model,
        teachers=("",),
        scorers=lambda: {"": model.scorer(mesh)},
        mesh=mesh,
        progress=progress,
        stop=stop,
    )
    return Comparison(SIZES, context, responses)


def meshes_of(name: str) -> tuple[Mesh, Mesh]:
    """Of student and teacher."""
    if name == "own mesh":
        of_teacher, of_student = own_mesh(
            MeshShape(data=1, expert=2, tensor=2), MeshShape(fsdp=2, context=2), jax.devices()
        )
        return of_student, of_teacher
    shape = {"one device": MeshShape(), "shared": MeshShape(data=1, fsdp=2, context=2)}[name]
    mesh = make_mesh(shape, jax.devices()[: 1 if name == "one device" else 4])
    return mesh, mesh


@pytest.mark.parametrize("name", ["one device", "shared", "own mesh"])
def test_figures_are_those_of_whole_distributions(name: str) -> None:
    meshes, rng = meshes_of(name), np.random.default_rng(0)
    alone = [Qwen3(config(architecture), jax.random.key(seed)) for seed, architecture in enumerate((DENSE, MOE))]
    student, teacher = (
        random_model(model.config, jax.random.key(seed), mesh)
        for seed, (model, mesh) in enumerate(zip(alone, meshes, strict=True))
    )
    of_teacher = [rollout(rng, mode, index) for mode in MODES for index in range(13)]
    own = [rollout(rng, THINKING, index) for index in range(9)]
    with Progress() as progress:
        compares = comparison(teacher, meshes, of_teacher, Stop(), progress)
        found = compares.figures("student", student, THINKING, own)
        again = compares.figures("student", student, THINKING, own)
        nothing = compares.figures("student", student, NON_THINKING, [])
    assert found == again, "the same responses give the same figures to the last bit"
    thinking, others = of_teacher[:13], of_teacher[13:]
    expected = written_out(*alone, thinking) | {
        "reverse_kl_own": written_out(*alone, own)["reverse_kl"],
        "compared_tokens": sum(int(one.loss_mask.sum()) for one in thinking),
    }
    # float32 logits of other shapes and shares; the divergences, about 0.03 nats, are small differences of them.
    assert found == pytest.approx(expected, rel=2e-4)
    assert found["forward_kl"] != pytest.approx(found["reverse_kl"], rel=1e-3)
    del expected["reverse_kl_own"]
    assert nothing.keys() == expected.keys()
    assert nothing["forward_kl"] == pytest.approx(written_out(*alone, others)["forward_kl"], rel=2e-4)


def test_a_teacher_compared_with_itself_agrees() -> None:
    meshes, rng = meshes_of("one device"), np.random.default_rng(1)
    model = Qwen3(config(DENSE), jax.random.key(0))
    responses = [rollout(rng, THINKING, index) for index in range(3)]
    with Progress() as progress:
        found = comparison(model, meshes, responses, Stop(), progress).figures("it", model, THINKING, responses)
    assert found["top_1_agreement"] == 1
    assert max(abs(found[name]) for name in ("forward_kl", "reverse_kl", "reverse_kl_own")) < 1e-6
    assert found["perplexity"] == pytest.approx(written_out(model, model, responses)["perplexity"], rel=1e-5)


def test_weights_that_are_not_finite_are_said_in_one_line() -> None:
    meshes, rng = meshes_of("one device"), np.random.default_rng(1)
    model = Qwen3(config(DENSE), jax.random.key(0))
    broken = jax.tree.map(lambda weight: weight * np.nan, model)
    responses = [rollout(rng, THINKING, index) for index in range(3)]
    with (
        Progress() as progress,
        pytest.raises(UserError, match=r"evaluation of it: \w+ is nan; look for weights") as said,
    ):
        comparison(model, meshes, responses, Stop(), progress).figures("it", broken, THINKING, responses)
    assert "\n" not in str(said.value)
    assert perplexity(1e4) == math.inf


def test_a_stop_is_answered_between_batches() -> None:
    meshes, rng = meshes_of("one device"), np.random.default_rng(2)
    model = Qwen3(config(DENSE), jax.random.key(0))
    responses = [rollout(rng, THINKING, index) for index in range(13)]
    with (
        Progress() as progress,
        pytest.raises(Interrupted, match="evaluation of it: it starts again with the next run"),
    ):
        comparison(model, meshes, responses, Stop(1), progress).figures("it", model, THINKING, responses)


def test_rows_and_their_length_divide_over_both_meshes() -> None:
    mesh, teacher_mesh = own_mesh(MeshShape(data=3), MeshShape(data=1, fsdp=2, context=2), jax.devices()[:7])[::-1]
    # 19 tokens in two pieces; rows over 2 and over 3 devices, at least the 4 that are generated at once.
    assert scoring_shape(SIZES, mesh, teacher_mesh) == (6, 20)
    long = EngineSizes(batch_size=4, max_prompt_tokens=8, sampling=(SamplingParams(max_new_tokens=30_000),))
    assert scoring_shape(long, mesh, teacher_mesh) == (6, 30_008)
    many = EngineSizes(batch_size=128, max_prompt_tokens=2_048, sampling=(SamplingParams(max_new_tokens=2_048),))
    # 4,096 tokens on each of the two devices.
    assert scoring_shape(many, *[make_mesh(MeshShape(data=2), jax.devices()[:2])] * 2) == (2, 4_096)
