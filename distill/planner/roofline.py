"""How long a program takes at best: what it computes, moves through memory and sends, against what a chip can.

FLOPs are analytic and those that the program does: with what rematerialising computes again, heads in both directions,
and attention as its implementation has it, masked scores included where it does not skip them. Memory traffic is
analytic and coarse: weights once a pass, every activation written and read once, logits, and all of the cache that a
decoding step looks at with its scores. Collectives are those of the compiled program. Efficiency within a kernel,
launches and the host are left out: the roof is a bound and no forecast.
"""

import dataclasses
import math

import jax

from distill.experiment import Experiment, asks_for_hidden
from distill.planner.collectives import Traffic
from distill.planner.program import EVALUATION, Program, trained_places
from distill.stages import Grpo
from distill.training.flops import executed_training_flops, forward_flops
from kernels_pallas.attention import attended_pairs, backward_products
from kernels_pallas.chips import Chip
from qwen3.decoder.config import ModelConfig
from qwen3.sharding import batch_shares, row_shares

_SOFTMAX_PASSES = 3
"""Times that float32 logits, or scores of attention that is no kernel, go through memory: written, and read for their
largest and for their sum."""
_UPDATE_BYTES = 28
"""A parameter's float32 weight, two moments and gradient read, all but the gradient written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a program does; of a program that writes, one token of every sequence."""

    flops: float
    """On all devices."""
    device_bytes: float
    """Through the memory of each device."""
    tokens: float
    """That go through the model, on all devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """Seconds of one call at full speed, and what bounds it."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float | None
    """None where the program was not compiled, which says what is sent."""

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds or 0.0)

    @property
    def bound(self) -> str:
        if self.seconds == self.compute_seconds:
            return "compute"
        return "memory" if self.seconds == self.memory_seconds else "network"


def roof(work: Work, devices: int, chip: Chip, sent: Traffic | None) -> Roof:
    """The roof of a program that spreads over so many devices evenly."""
    return Roof(
        compute_seconds=work.flops / devices / chip.flops_per_s,
        memory_seconds=work.device_bytes / chip.bytes_per_s,
        network_seconds=None if sent is None else sent.seconds,
    )


def work_of(program: Program, experiment: Experiment) -> Work:
    """What one call does, from shapes alone."""
    config, rows, length = program.model, program.rows, program.length
    stage = experiment.stages.get(program.stage)
    on_policy = stage is not None and asks_for_hidden(stage)
    # Whoever compares with hidden states makes logits of them.
    hidden_alone = on_policy or program.stage == EVALUATION
    head = 2 * config.hidden_size * config.vocab_size
    adapters = program.adapter_parameters
    if program.purpose == "student_updates":
        count = adapters or parameters(config)
        return Work(flops=12.0 * count, device_bytes=_UPDATE_BYTES * count / program.mesh.size, tokens=0)
    forward = forward_flops(config, adapters)
    traffic = _MemoryTraffic(program)
    match program.purpose:
        case "teacher_scores":
            flops = rows * (forward.executed(length, _row_pairs(program)) - (length * head if hidden_alone else 0))
            moved = traffic.weights(1) + traffic.activations(1) + (0 if hidden_alone else traffic.logits(1))
            return Work(flops=flops, device_bytes=moved, tokens=rows * length)
        case "student_scores" if program.stage != EVALUATION:
            # Log-probabilities of its own tokens.
            flops = rows * forward.executed(length, _row_pairs(program))
            moved = traffic.weights(1) + traffic.activations(1) + traffic.logits(1)
            return Work(flops=flops, device_bytes=moved, tokens=rows * length)
        case "student_scores":
            # The student's logits for both divergences and the cross-entropy, the teacher's for both divergences.
            teachers_head = 2 * _teacher_width(program) * config.vocab_size
            compared = rows * length * (2 * head + 2 * teachers_head)
            moved = traffic.weights(1) + traffic.activations(1) + traffic.logits(5)
            flops = rows * forward.executed(length, _row_pairs(program)) + compared
            return Work(flops=flops, device_bytes=moved, tokens=rows * length)
        case "teacher_prefills" | "student_prefills" | "student_routes":
            flops = rows * (forward.executed(length, _row_pairs(program)) - length * head)
            return Work(flops=flops, device_bytes=traffic.weights(1) + traffic.activations(1), tokens=rows * length)
        case "teacher_generates" | "student_generates":
            flops = rows * forward.executed(1, decoded_pairs(config, length))
            moved = traffic.weights(program.groups) + traffic.cache() + traffic.logits(1)
            return Work(flops=flops, device_bytes=moved, tokens=rows)
        case "student_trains":
            training = experiment.stages[program.stage].training
            width = _teacher_width(program) if on_policy else None
            with jax.set_mesh(program.mesh):
                products = backward_products(program.models[0].kernels.attention)
            step = executed_training_flops(
                config,
                rematerialise=training.rematerialise,
                teacher_width=width,
                adapter_parameters=adapters,
                attention_backward_products=products,
            )
            # A policy gradient multiplies the head out forward and again backward; beside a divergence, twice more for
            # the gradients, too.
            again = 0 if not isinstance(stage, Grpo) or stage.objective is None else (4 if on_policy else 1)
            # Forward and once for each operand's gradient; a frozen weight's is not needed.
            passes = (2 if adapters else 3) + training.rematerialise
            # Gradients are added to those of the microbatches before: read, read and written.
            heads = trained_places(program)
            moved = traffic.weights(passes) + traffic.activations(3 + training.rematerialise)
            moved += traffic.logits(2) * heads / length
            return Work(
                flops=rows * (step.executed(length, _row_pairs(program), heads) + heads * again * head),
                device_bytes=moved + 3 * 4 * (adapters or parameters(config)) / program.mesh.size,
                tokens=rows * length,
            )


def _teacher_width(program: Program) -> int:
    """Of its hidden states, which are the targets of the one argument that has some."""
    return next(a.targets.hidden.shape[-1] for a in program.arguments if hasattr(a, "targets"))


def _row_pairs(program: Program) -> int:
    """Of a query and a key of a row, which training and scoring may spread over devices."""
    chunks, mesh, whole = program.model.dual_chunk, program.mesh, program.purpose.endswith("prefills")
    with jax.set_mesh(mesh):
        return attended_pairs(
            program.length,
            rows=program.rows // (row_shares(mesh) if whole else batch_shares(mesh)),
            heads=program.model.num_attention_heads // mesh.shape["tensor"],
            chunk_tokens=None if chunks is None else chunks.chunk_tokens,
            devices=1 if whole else mesh.shape["context"],
            implementation=program.models[0].kernels.attention,
        )


def decoded_pairs(config: ModelConfig, slots: int) -> float:
    """Of a new token and the slots of its sequence. All keys are scored for every kind of queries; the weighted values,
    the other half of a pair's FLOPs, are summed once."""
    return slots * (_decoded_kinds(config, slots) + 1) / 2


def _decoded_kinds(config: ModelConfig, slots: int) -> int:
    """Of queries: those of Dual Chunk Attention (`kernels_pallas.attention.dual_chunk`), or the one kind."""
    chunks = config.dual_chunk
    return 1 if chunks is None or slots <= chunks.chunk_tokens else 3


def parameters(config: ModelConfig) -> int:
    """Of all matrices; norms and biases are left out."""
    return _dense_parameters(config) + _expert_parameters(config)


def _dense_parameters(config: ModelConfig) -> int:
    width, size = config.hidden_size, config.head_dim
    attention = width * size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    feed_forward = sum(
        count * (width * config.num_experts if moe else 3 * width * config.intermediate_size)
        for moe, count in config.layer_runs()
    )
    heads = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * attention + feed_forward + heads * width * config.vocab_size


def _expert_parameters(config: ModelConfig) -> int:
    layers = sum(count for moe, count in config.layer_runs() if moe)
    return layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size


class _MemoryTraffic:
    """Bytes through each device's memory in one call of a program."""

    def __init__(self, program: Program):
        self._program, self._config = program, program.model
        self._shape = program.mesh.shape
        model = next(one for one in program.models if one.embed is not None)
        self._stored = model.embed.get_value().dtype.itemsize
        self._computed = 4 if model.compute_dtype == "float32" else 2
        self._generates = program.purpose.endswith("generates")
        self._shares = math.prod(self._shape[axis] for axis in ("data", "fsdp", "expert", "context"))

    def weights(self, passes: int) -> float:
        """Each pass reads what a device computes with, but for the input embedding, which is looked up. Where a device
        holds a part of that alone, the rest is gathered: written and read once more; for many tokens at once, and so
        left out, by programs that write."""
        config, shape = self._config, self._shape
        experts = _expert_parameters(config) / shape["tensor"] / shape["expert"]
        if self._generates and config.num_experts:
            # A few tokens do not reach all experts.
            seen = self._program.rows / self._program.groups / (self._shares / shape["expert"])
            experts *= 1 - (1 - config.num_experts_per_tok / config.num_experts) ** seen
        looked_up = 0 if config.tie_word_embeddings else config.hidden_size * config.vocab_size
        dense = (_dense_parameters(config) - looked_up) / shape["tensor"]
        if self._shares == 1:
            read = self._stored
        else:
            read = self._computed if self._generates else self._stored + 2 * self._computed
        return passes * (dense + experts) * read

    def activations(self, passes: int) -> float:
        config, tensor = self._config, self._shape["tensor"]
        width, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
        entries = 0.0
        for moe, count in config.layer_runs():
            inner = config.num_experts_per_tok * config.moe_intermediate_size if moe else config.intermediate_size
            copies = 6 * width + (4 * config.num_experts_per_tok * width if moe else 0)
            entries += count * (copies + (2 * heads * config.head_dim + 3 * inner) / tensor)
        return passes * 2 * self._computed * entries * self._program.rows * self._program.length / self._shares

    def logits(self, passes: int) -> float:
        tokens = self._program.rows * (1 if self._generates else self._program.length) / self._shares
        return passes * _SOFTMAX_PASSES * 4 * tokens * self._config.vocab_size / self._shape["tensor"]

    def cache(self) -> float:
        """Keys and values up to the end of the longest sequence and, without a kernel that reads pages, their scores;
        keys and scores once for each kind of queries."""
        config, length = self._config, self._program.length
        kinds = _decoded_kinds(config, length)
        bytes_of_slot = (kinds + 1) * self._computed * config.num_key_value_heads * config.head_dim
        if self._program.models[0].kernels.paged_attention is None:
            bytes_of_slot += kinds * _SOFTMAX_PASSES * 4 * config.num_attention_heads
        slots = self._program.rows * length / self._shares
        return slots * config.num_hidden_layers * bytes_of_slot / self._shape["tensor"]
