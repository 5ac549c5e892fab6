"""One loaded teacher with its queues: all that the HTTP endpoints ask."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.vocabulary import check_vocabulary
from qwen3.checkpoint import hf
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.decoder.kernels import Kernels
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.hosts.launcher import Launcher, Work
from qwen3.hosts.lifelines import Lifelines
from qwen3.hosts.processes import is_first, require_same
from qwen3.sharding import MeshShape, check_rows, make_mesh
from teacher.identity import TeacherIdentity
from teacher.limits import Limits
from teacher.serve.batches import Unit
from teacher.serve.generation import GenerationQueue
from teacher.serve.metrics import Metrics
from teacher.serve.programs import Programs, names_of, shapes_of
from teacher.serve.queues import Admission, ScoringQueue
from teacher.wire import TargetsRequest

_HEAD_ROWS = 4_096
"""Of the output matrix at once: no device ever holds all of a matrix that several have."""
OnStep = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, from which folder and how."""

    model: str
    """Folder in Hugging Face format; its last part is the model's name to clients."""
    dtype: str = "bfloat16"
    quantisation: Quantisation | None = None
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    limits: Limits = dataclasses.field(default_factory=Limits)

    def check(self) -> Mesh:
        """The mesh that it is served on. Raises UserError, from file headers alone, for what could not be loaded."""
        mesh = make_mesh(self.mesh)
        config = hf.check(self.model, mesh)
        self.kernels.check(config, jnp.dtype(self.dtype), mesh)
        check_vocabulary(ChatTokenizer.from_folder(self.model), config.vocab_size)
        check_rows("--generation-batch-size", self.limits.generation_batch_size, mesh)
        if self.limits.prefix_cache_tokens and self.mesh.context > 1:
            raise UserError(
                f"--prefix-cache-tokens is {self.limits.prefix_cache_tokens}, but prefixes are kept for whole rows and "
                f"--mesh.context {self.mesh.context} cuts them; set it to 0, or leave --mesh.context"
            )
        for option, most in (
            ("--max-sequence-tokens", self.limits.max_sequence_tokens),
            ("--max-prompt-tokens + --max-new-tokens", self.limits.max_prompt_tokens + self.limits.max_new_tokens),
        ):
            if most > config.longest_context:
                raise UserError(
                    f"{option} is {most}, but the positions of {self.model} end at {config.longest_context} "
                    "(max_position_embeddings); lower it"
                )
        return mesh


class Service:
    """A teacher that is loaded, compiled and waiting for requests.

    Attributes:
        name: The model's name to clients.
        identity: Who it is.
        limits: What it takes.
        tokenizer: Its tokenizer and chat template.
        admission, scoring, generation: Where requests wait.
        device_bytes: What scoring and generating take on a device beside the weights, at most; None where it is not
            known.
    """

    def __init__(
        self,
        model: Qwen3,
        mesh: Mesh,
        tokenizer: ChatTokenizer,
        identity: TeacherIdentity,
        limits: Limits,
        *,
        name: str,
        on_step: OnStep | None = None,
        followers: Lifelines | None = None,
    ):
        """Compiles all programs, which takes seconds to minutes.

        Where several processes have the mesh, the first has `followers`, and the others do what it launches by `works`.

        Raises UserError where what these limits allow does not fit the devices' memory, or scoring gives no numbers.
        """
        self.name, self.identity, self.limits, self.tokenizer = name, identity, limits, tokenizer
        self.metrics = Metrics()
        self.admission = Admission(limits, self.metrics)
        self._model = model
        count, done = len(names_of(limits)) * len(shapes_of(limits, mesh)) + 1, 0

        def on_compiled() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step("compiling", done, count)

        # On one device scoring and generating need not wait for each other to begin.
        self._launcher = Launcher(followers)
        shared = self._launcher if mesh.size > 1 else None
        self._programs = Programs(model, mesh, limits, on_compiled, shared)
        self.generation = GenerationQueue(model, tokenizer, limits, self.metrics, shared)
        self.device_bytes = checked_memory(
            self._programs.temporary_bytes, self.generation.device_bytes(), mesh, prefixes=self._programs.prefix_bytes
        )
        self._head_rows = min(_HEAD_ROWS, self.vocab_size)
        self._some_head = jax.jit(
            functools.partial(_some_rows, rows=self._head_rows, dtype=model.compute_dtype),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        self.scoring = ScoringQueue(self._programs, self.metrics)
        if is_first():
            _check_scores(self._programs, name)
            self.generation.compile()
            on_compiled()

    @classmethod
    def load(
        cls, served: Served, mesh: Mesh, on_step: OnStep | None = None, followers: Lifelines | None = None
    ) -> "Service":
        """Reads the weights and compiles. Raises UserError where the folder cannot be read, or is another in another
        process."""
        identity = TeacherIdentity.of(served.model, dtype=served.dtype, quantisation=served.quantisation)
        options = dataclasses.asdict(dataclasses.replace(served, model=identity.digest))
        require_same("the teacher's files, or its options,", json.dumps(options).encode)
        dtype = jnp.dtype(served.dtype)
        reading = None if on_step is None else functools.partial(on_step, "reading weights")
        model = hf.load(
            served.model,
            param_dtype=dtype,
            compute_dtype=dtype,
            mesh=mesh,
            on_read=reading,
            quantisation=served.quantisation,
        )
        model.kernels = served.kernels
        return cls(
            model,
            mesh,
            ChatTokenizer.from_folder(served.model),
            identity,
            served.limits,
            name=Path(served.model).resolve().name,
            on_step=on_step,
            followers=followers,
        )

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @functools.cached_property
    def head(self) -> np.ndarray:
        """The output matrix [V, D] in the dtype of computing, on the host from the first request for it on."""
        parts = []
        for first in range(0, self.vocab_size, self._head_rows):
            # The last rows of the last part: it begins early enough to be whole.
            rows = min(self._head_rows, self.vocab_size - first)
            launched = self._launcher.launch("head", self._launch_head, [np.int32(first)])
            parts.append(self._launcher.results(launched)[-rows:])
        return np.concatenate(parts)

    @functools.cached_property
    def head_digest(self) -> str:
        """Hash of the head's bytes, 32 hexadecimal digits."""
        return hashlib.blake2b(np.ascontiguousarray(self.head).view(np.uint8).data, digest_size=16).hexdigest()

    def works(self) -> dict[str, Work]:
        """What is launched, by name, for a process that follows."""
        return {**self._programs.works(), **self.generation.works(), "head": self._launch_head}

    def _launch_head(self, arrays: Sequence[np.ndarray]) -> Array:
        (first,) = arrays
        return self._some_head(self._model.head, first)

    def close(self) -> None:
        """Finishes what waits."""
        self.scoring.close()
        self.generation.close()


def _some_rows(head: Float[Array, "V D"], first: Int[Array, ""], *, rows: int, dtype: DTypeLike) -> Array:
    return jax.lax.dynamic_slice_in_dim(head, first, rows).astype(dtype)


def _check_scores(programs: Programs, name: str) -> None:
    """Refuses a teacher whose weights give no numbers, before anybody learns from them."""
    probe = TargetsRequest(targets="top_k", sequences=[np.arange(2, dtype=np.int32)], starts=[0], entries=1)
    batch = programs.batch()
    batch.take(Unit(probe, 0))
    (said,) = programs.launch(batch).answers()
    if not np.isfinite(said["logprobs"]).all():
        raise UserError(f"teacher {name}: its log-probabilities are no finite numbers; check its weights")


def checked_memory(scoring: int | None, generating: int | None, mesh: Mesh, *, prefixes: int) -> int | None:
    """What two scored batches, one computed and one waiting, the prefixes that are kept for further ones, and all that
    is generated take on a device together.

    Raises UserError where that does not fit beside the weights. Devices that do not say what they have, such as CPUs,
    are not asked.
    """
    if scoring is None or generating is None:
        return None
    needed = 2 * scoring + prefixes + generating
    known = [stats for device in mesh.local_devices if "bytes_limit" in (stats := device.memory_stats() or {})]
    left = min((stats["bytes_limit"] - stats["bytes_in_use"] for stats in known), default=None)
    if left is not None and needed > left:
        raise UserError(
            f"scoring takes up to {2 * scoring / 2**30:.1f} GiB on a device beside the weights, prefixes "
            f"{prefixes / 2**30:.1f} and generating {generating / 2**30:.1f}, of {left / 2**30:.1f} that are left; "
            "lower --batch-tokens, --max-sequence-tokens, --prefix-cache-tokens, --generation-batch-size, "
            "--max-prompt-tokens or --max-new-tokens, or take more devices"
        )
    return needed
