"""Checkpoints that come back bit for bit, onto any sharding, or not at all.

Orbax writes and reads; this file adds what a resumed run relies on: arrays are stored by key path alone, so that
classes may change between versions; what differs from the expected arrays is named; and a sum of each array's bits
is stored beside it, because the array files themselves carry no check and a flipped bit would load as a weight.
"""

import functools
import json
import logging
import os
import sys
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qwen3.errors import UserError

PyTree = TypeVar("PyTree")


class Checkpointer:
    """The checkpoints of one run: a directory with a folder per step, the latest `keep` of them.

    One job writes a directory; debris of a killed save is removed when the next one opens it. Use as a context
    manager, or call `close`, which waits for the last save.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        """Opens or creates `directory` (a path or a `gs://` address); UserError if that is not possible."""
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept to resume from")
        logging.getLogger("absl").addFilter(_not_orbax_chatter)
        _leave_later_failures_unsaid()
        address = os.fspath(directory)
        self.directory = address if "://" in address else os.path.abspath(address)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(f"checkpoint directory {self.directory} cannot be used: {_one_line(error)}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # Orbax reads a note about each step first of all, needs nothing of it, and stumbles over what is no note.
            raise UserError(
                f"a file {self.directory}/*/_CHECKPOINT_METADATA is damaged: {_one_line(error)}; delete that file"
            ) from error

    def save(self, step: int, arrays: Any, metadata: Mapping[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON-serialisable mapping as `step`, which must exceed every saved step.

        Returns when `arrays` may be donated or overwritten; the writing goes on in the background, and its errors
        come up at the next save, `wait` or `close`. Until all is written, the previous checkpoint is the latest.
        Leaves are jax or NumPy arrays or Python numbers; keep random keys as `jax.random.key_data`.
        Raises UserError when the disk refuses.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"step is {step}, but {self.directory} already holds step {latest}; steps must grow")
        named = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in _named(arrays)}
        sums = _bit_sums(named)
        description = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "bit_sum": sums[name]}
            for name, leaf in named.items()
        }
        # Here rather than in orbax, whose error would come up later and elsewhere.
        contents = json.loads(json.dumps({"metadata": dict(metadata), "arrays": description}))
        record = {**contents, "crc32": _crc32(contents)}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(named), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {step} in {self.directory} cannot be written: {_one_line(error)}") from error

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, None if there is none; waits for a save that is under way."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """The arrays and metadata saved as `step` (None: the latest).

        `like` has the saved arrays' key paths, shapes and dtypes; each leaf says what to return. An array or a
        ShapeDtypeStruct with a sharding gives a jax array on that sharding, one without a sharding on the first local
        device, a NumPy array or a number the same again. Node types are those of `like`.
        Raises UserError if there is no such checkpoint, if it does not fit `like` (naming paths), or if it is damaged.
        """
        latest = self.latest_step()
        if latest is None:
            raise UserError(f"no checkpoint in {self.directory}; start the run that writes it first")
        step = latest if step is None else step
        if step not in self._manager.all_steps():
            raise UserError(f"no checkpoint {step} in {self.directory}; it holds {sorted(self._manager.all_steps())}")
        named_like = dict(_named(like))
        record = self._restore_item(step, "record", ocp.args.JsonRestore())
        if not isinstance(record, dict) or record.pop("crc32", None) != _crc32(record):
            raise UserError(self._damaged(step, "its record has changed"))
        self._check_fits(step, record["arrays"], named_like)
        targets = {name: _restore_args(leaf) for name, leaf in named_like.items()}
        restored = self._restore_item(
            step, "arrays", ocp.args.PyTreeRestore(item=dict.fromkeys(targets, 0), restore_args=targets)
        )
        sums = _bit_sums(restored)
        changed = [name for name, bit_sum in sums.items() if bit_sum != record["arrays"][name]["bit_sum"]]
        if changed:
            raise UserError(self._damaged(step, f"the bits of {_listed(changed)} have changed"))
        leaves = [_as(leaf, restored[name]) for name, leaf in named_like.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), record["metadata"]

    def wait(self) -> None:
        """Returns when the last save is on disk; raises UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"a checkpoint in {self.directory} cannot be written: {_one_line(error)}") from error

    def close(self) -> None:
        """Waits for the last save and gives up the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _restore_item(self, step: int, name: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]
        # Orbax reports a damaged file as any of ten types, bare Exception among them.
        except Exception as error:
            raise UserError(self._damaged(step, _one_line(error))) from error

    def _check_fits(self, step: int, saved: Mapping[str, Any], named_like: Mapping[str, Any]) -> None:
        differences = []
        if missing := sorted(named_like.keys() - saved.keys()):
            differences.append(f"lacks {_listed(missing)}")
        if extra := sorted(saved.keys() - named_like.keys()):
            differences.append(f"holds also {_listed(extra)}")
        changed = []
        for name in named_like.keys() & saved.keys():
            leaf = named_like[name]
            here = (list(np.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype))
            there = (saved[name]["shape"], saved[name]["dtype"])
            if here != there:
                changed.append(f"{name} ({there[1]}{there[0]} saved, {here[1]}{here[0]} expected)")
        if changed:
            differences.append(f"differs in {_listed(sorted(changed))}")
        if differences:
            raise UserError(
                f"checkpoint {step} in {self.directory} does not fit this run: it {'; it '.join(differences)}; use the "
                "model and optimiser that wrote it, or another run directory"
            )

    def _damaged(self, step: int, what: str) -> str:
        return (
            f"checkpoint {os.path.join(self.directory, str(step))} is damaged: {what}; delete this folder to resume "
            "from the one before"
        )


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Leaves by key path, such as model/layers/wq."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    names = [name for name, _ in named]
    if len(set(names)) < len(names) or "" in names:
        double = sorted({name for name in names if names.count(name) > 1 or not name})
        raise ValueError(f"key paths {double} do not name one array each; put the arrays into a tree of distinct names")
    for name, leaf in named:
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{name} is a typed random key; save jax.random.key_data of it")
        if np.size(leaf) == 0:
            raise ValueError(f"{name} has shape {np.shape(leaf)}; orbax stores no empty arrays, leave it out")
    return named


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _as(leaf: Any, value: Any) -> Any:
    """`value` as an array, or as the kind of number that `leaf` is."""
    return value if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray) else type(leaf)(value.item())


def _bit_sums(named: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Sum modulo 2³² of each array's bits read as unsigned integers (64-bit values as two).

    It is the same for every sharding, costs one pass over memory where the array lives, and changes with
    any one bit.
    """
    # On this host's CPU, NumPy sees the same memory, and there is no program to compile for each shape.
    here = {name: array for name, array in named.items() if not _lies_elsewhere(array)}
    # One program for all others: of a program for each, more may wait than a device takes in, and then devices of
    # several processes wait for each other.
    elsewhere = _device_bit_sums({name: array for name, array in named.items() if name not in here})
    return {name: int(bit_sum) for name, bit_sum in jax.device_get(elsewhere).items()} | {
        name: _host_bit_sum(np.asarray(array)) for name, array in here.items()
    }


def _lies_elsewhere(array: jax.Array | np.ndarray) -> bool:
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())
    )


def _host_bit_sum(array: np.ndarray) -> int:
    flat = np.ascontiguousarray(array).reshape(-1)
    return int(flat.view(f"u{min(flat.itemsize, 4)}").sum(dtype=np.uint64)) % 2**32


@jax.jit
def _device_bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bit_sum(array: jax.Array) -> jax.Array:
        if array.dtype != jnp.bool_:
            array = jax.lax.bitcast_convert_type(array, f"uint{min(array.dtype.itemsize, 4) * 8}")
        return jnp.sum(array.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bit_sum, arrays)


def _crc32(contents: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@functools.cache
def _leave_later_failures_unsaid() -> None:
    """Keeps reads and writes that are still under way when one fails from printing a traceback each.

    Orbax closes its event loop at the first failure, which is raised; those that fail as well, or end later and find
    it closed, Python reports as unraisable. Nobody knows when the last one ends, so this is once for all of the
    process.
    """
    report = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = filtered


def _one_line(error: BaseException) -> str:
    # TensorStore appends the whole specification of the array and places in its own source, orbax the former again.
    text = str(error).partition(" [tensorstore_spec=")[0].partition(" See full TensorStore details")[0]
    return " ".join(text.split()) or type(error).__name__


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    """A logging filter: orbax's notes to its own developers are not news to the user of a run."""
    return record.levelno > logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname
