"""What a teacher in eight bits says differently: KL(bfloat16 ‖ quantised) in nats a token, and what it still solves.

    python -m experiments.benchmarks.quantised_teacher
    python -m experiments.benchmarks.quantised_teacher --random

prints one line of JSON for each text and each way to keep the weights. Texts are answers to held-out problems of the
quickstart in both modes, written by its teacher, kept and computed in bfloat16, and by its student before it is taught;
only tokens that the policy chose count. float32 stands beside the eight bits to show how far bfloat16's own rounding
goes. With `--random` a wider MoE of random weights scores random tokens instead: its answers are close to uniform, so
it shows what rounding does at its width, and nothing about a trained model."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

from distill.evaluation.pass_at_k import mean_pass_at_k, pass_at_1_standard_error
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import prompt_ids
from distill.tasks.samples import judge
from distill.training.host_memory import keep_freed_memory
from experiments.benchmarks.machine import machine
from experiments.quickstart import STUDENT, TEACHER
from experiments.quickstart_task import MAX_PROMPT_TOKENS, arithmetic, evaluation
from kernels_pallas.linear_kl import Divergence, linear_kl_full
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3, random_model
from qwen3.generation.engine import Engine, Request
from qwen3.rollout import MODES, Mode, Rollout

RANDOM = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    num_experts=32,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
)
_RANDOM_SHAPE = (4, 256)
_KEPT: Mapping[str, tuple[Any, Quantisation | None]] = {
    "bfloat16": (jnp.bfloat16, None),
    "float32": (jnp.float32, None),
    "int8": (jnp.bfloat16, "int8"),
    "fp8": (jnp.bfloat16, "fp8"),
}
"""Ways to keep the weights, each with the dtype that is computed in; the first is what the others are held against."""
_EXACT, *_OTHERS = _KEPT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    problems: int = 200
    """Held-out problems, each asked in both modes."""
    random: bool = False
    """Take random weights of a wider MoE, and random tokens."""


def main(arguments: Arguments) -> None:
    for row in random() if arguments.random else quickstart(arguments.problems):
        print(json.dumps(row | machine()), flush=True)


def quickstart(problems: int) -> Iterator[dict[str, Any]]:
    """The rows of the teacher that the repository carries, with what every kind of weights solves itself."""
    exact, student = load(TEACHER, _EXACT), load(STUDENT, _EXACT)
    teacher_generates, student_generates = Solving(exact.config, problems), Solving(student.config, problems)
    texts = {mode: (teacher_generates.write(exact, mode), student_generates.write(student, mode)) for mode in MODES}
    for mode, (own, _) in texts.items():
        yield _row("quickstart_teacher", _EXACT, exact) | {"mode": mode} | teacher_generates.solved(own)
    for kept in _OTHERS:
        model = load(TEACHER, kept)
        for mode, (own, students) in texts.items():
            row = _row("quickstart_teacher", kept, model) | {"mode": mode}
            solved = teacher_generates.solved(teacher_generates.write(model, mode))
            yield row | {"text_of": "teacher"} | differences(exact, model, *padded(own)) | solved
            yield row | {"text_of": "student"} | differences(exact, model, *padded(students))


def random() -> Iterator[dict[str, Any]]:
    """The rows of `RANDOM`."""
    tokens = np.random.default_rng(0).integers(0, RANDOM.vocab_size, _RANDOM_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model"
        hf.save(path, random_model(RANDOM, jax.random.key(0), param_dtype=jnp.bfloat16))
        exact = load(path, _EXACT)
        for kept in _OTHERS:
            model = load(path, kept)
            yield _row("random_weights", kept, model) | differences(exact, model, tokens, np.ones(tokens.shape, bool))


def load(folder: str, kept: str) -> Qwen3:
    """The checkpoint's model, its weights kept in one of the ways."""
    dtype, quantisation = _KEPT[kept]
    return hf.load(folder, param_dtype=dtype, compute_dtype=dtype, quantisation=quantisation)


def differences(exact: Qwen3, model: Qwen3, tokens: np.ndarray, mask: np.ndarray) -> dict[str, float | int]:
    """KL(exact ‖ model) over the whole vocabulary at the positions of `mask`, in nats, and how often both name the same
    token first."""
    statistics = jax.device_get(_compared(exact, model, tokens.astype(np.int32), mask.astype(np.float32)))
    divergence = statistics["divergence"][mask]
    return {
        "positions": int(mask.sum()),
        "kl_mean_nats": float(divergence.mean()),
        "kl_median_nats": float(np.median(divergence)),
        "kl_99th_percentile_nats": float(np.percentile(divergence, 99)),
        "kl_largest_nats": float(divergence.max()),
        "top1_agreement": round(float(statistics["top1_agreement"][mask].mean()), 5),
        "entropy_nats": round(float(statistics["teacher_entropy"][mask].mean()), 4),
    }


@jax.jit
def _compared(
    exact: Qwen3, model: Qwen3, tokens: Array, mask: Float[Array, "B T"]
) -> Mapping[str, Float[Array, "B T"]]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # Padding stands behind all that is read, where a causal model does not see it.
    segment_ids = jnp.ones_like(tokens)
    hidden, other = (one.hidden(tokens, positions, segment_ids) for one in (exact, model))
    return linear_kl_full(other, model.head, hidden, exact.head, mask, divergence=Divergence("forward_kl"))[1]


def padded(rollouts: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask of the first rollout to each problem, a row each."""
    first = [rollout for rollout in rollouts if rollout.sample_index == 0]
    tokens = np.zeros((len(first), max(len(rollout.tokens) for rollout in first)), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, rollout in enumerate(first):
        tokens[row, : len(rollout.tokens)], mask[row, : len(rollout.tokens)] = rollout.tokens, rollout.loss_mask
    return tokens, mask


class Solving:
    """Writes about the quickstart's held-out problems and judges what was written, as its evaluation does."""

    def __init__(self, config: ModelConfig, problems: int):
        """`config` is the writer's."""
        self._evaluation = evaluation(problems)
        self._tasks, self._tokenizer = TaskMixture({"arithmetic": arithmetic()}), ChatTokenizer.from_folder(TEACHER)
        self._problems = self._tasks.problems("held_out", problems, seed=0)
        self._engine = Engine(
            config,
            batch_size=problems,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_new_tokens=max(self._evaluation.sampling(mode).max_new_tokens for mode in MODES),
            stop_ids=self._tokenizer.eos_ids,
            pad_id=self._tokenizer.pad_id,
        )

    def write(self, model: Qwen3, mode: Mode) -> list[Rollout]:
        """The responses to every problem, those to one problem side by side."""
        requests = [
            Request(
                prompt_ids=prompt_ids(problem, mode, self._tokenizer),
                prompt_id=problem.problem_id,
                sample_index=sample,
                mode=mode,
                params=self._evaluation.sampling(mode),
            )
            for problem in self._problems
            for sample in range(self._evaluation.samples_per_problem)
        ]
        return self._engine.generate(model, requests, seed=0, policy_step=0)

    def solved(self, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
        """pass@1 in percent and its standard error over problems."""
        count = self._evaluation.samples_per_problem
        right = [
            sum(
                bool(judge(rollout, problem, self._tokenizer, self._tasks).correct)
                for rollout in rollouts[index * count : (index + 1) * count]
            )
            for index, problem in enumerate(self._problems)
        ]
        error = pass_at_1_standard_error(right, count)
        return {
            "pass_at_1_percent": round(100 * mean_pass_at_k(right, count, 1), 2),
            "pass_at_1_stderr_percent": None if error is None else round(100 * error, 2),
        }


def _row(name: str, kept: str, model: Qwen3) -> dict[str, Any]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"benchmark": "quantised_teacher", "model": name, "weights": kept, "weights_mb": round(size / 2**20, 2)}


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
