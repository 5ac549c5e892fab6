import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill.training.checkpoint import Checkpointer, _device_bit_sums, _host_bit_sum, _leave_later_failures_unsaid
from qwen3.errors import UserError

METADATA = {"data": {"parent": {"next_index": 12}}, "stage": "off_policy", "loss": 0.1}


class Layer(nnx.Module):
    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.weight = nnx.Param(jnp.asarray(random.normal(size=(8, 16)), jnp.float32))
        self.scale = nnx.Param(jnp.asarray(random.normal(size=16), jnp.bfloat16))


def training_tree() -> dict[str, Any]:
    """What a run keeps: a module, optax's named tuples, random state, counters on the host, odd values."""
    model = Layer()
    return {
        "model": model,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(model),
        "key": jax.random.key_data(jax.random.key(3)),
        "step": 7,
        "ema": np.array([np.nan, -0.0, np.inf, 5e-324]),
        "flags": (np.array([True, False]), np.int8(-3)),
        "small": jnp.array([1e-40, -0.0, jnp.nan], jnp.float32),
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.eval_shape(lambda: x) if isinstance(x, jax.Array) else x, tree)


def assert_identical(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if not isinstance(a, jax.Array):
            assert type(a) is type(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, training_tree(), METADATA)
        checkpointer.save(2, {**training_tree(), "step": 8}, METADATA)
    return tmp_path / "checkpoints"


def test_every_bit_comes_back(saved: Path) -> None:
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.latest_step() == 2
        arrays, metadata = checkpointer.restore(abstract(training_tree()))
        assert_identical(arrays, {**training_tree(), "step": 8})
        assert metadata == METADATA
        assert arrays["step"] == 8
        arrays, _ = checkpointer.restore(abstract(training_tree()), step=1)
        assert_identical(arrays, training_tree())


def test_what_was_saved_may_be_donated_and_overwritten_at_once(tmp_path: Path) -> None:
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    device, host = jnp.zeros((512, 1024)), np.zeros((512, 1024))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"device": device, "host": host}, {})
        for _ in range(20):
            device = advance(device)
        host[:] = 1
        arrays, _ = checkpointer.restore({"device": device, "host": host})
    assert not np.asarray(arrays["device"]).any()
    assert not arrays["host"].any()


def test_restores_onto_another_sharding(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    wide = jax.make_mesh((8,), ("data",))
    square = jax.make_mesh((4, 2), ("data", "tensor"))
    before = NamedSharding(wide, PartitionSpec("data", None))
    after = NamedSharding(square, PartitionSpec("tensor", "data"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jax.device_put(values, before)}, {})
        like = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=after)}
        restored = checkpointer.restore(like)[0]["w"]
        assert restored.sharding == after
        np.testing.assert_array_equal(restored, values)
        like = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype)}
        assert checkpointer.restore(like)[0]["w"].devices() == {jax.devices()[0]}


def test_classes_may_change_as_long_as_paths_stay(saved: Path) -> None:
    layer = training_tree()["model"]
    plain = {"weight": {"value": layer.weight[...]}, "scale": {"value": layer.scale[...]}}
    with Checkpointer(saved) as checkpointer:
        restored = checkpointer.restore({**training_tree(), "model": plain})[0]["model"]
    assert_identical(restored, plain)


def test_what_does_not_fit_is_named_by_path(saved: Path) -> None:
    like = training_tree()
    del like["key"]
    like["small"] = jnp.zeros(4, jnp.float32)
    like["ema"] = like["ema"].astype(np.float32)
    like["new"] = {"moment": jnp.zeros(2)}
    with Checkpointer(saved) as checkpointer, pytest.raises(UserError) as error:
        checkpointer.restore(like)
    message = str(error.value)
    assert "lacks new/moment" in message
    assert "holds also key" in message
    assert "ema (float64[4] saved, float32[4] expected)" in message
    assert "small (float32[3] saved, float32[4] expected)" in message
    assert "\n" not in message


def test_only_the_latest_are_kept_and_steps_grow(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        with pytest.raises(UserError, match="no checkpoint in"):
            checkpointer.restore({"x": jnp.zeros(1)})
        assert checkpointer.latest_step() is None
        for step in (1, 5, 9):
            checkpointer.save(step, {"x": jnp.full(1, step)}, {})
        with pytest.raises(ValueError, match="step is 9"):
            checkpointer.save(9, {"x": jnp.zeros(1)}, {})
        with pytest.raises(UserError, match=r"no checkpoint 1 .* holds \[5, 9\]"):
            checkpointer.restore({"x": jnp.zeros(1, int)}, step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        import jax.numpy as jnp
        from distill.training.checkpoint import Checkpointer
        checkpointer = Checkpointer(sys.argv[1])
        checkpointer.save(1, {"x": jnp.full((1024, 1024), 1.0)}, {"step": 1})
        checkpointer.wait()
        # A checkpoint is complete once its folder has its final name.
        os.rename = os.replace = lambda *_, **__: time.sleep(60)
        checkpointer.save(2, {"x": jnp.full((1024, 1024), 2.0)}, {"step": 2})
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "the save was over before the kill"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        arrays, metadata = checkpointer.restore({"x": jnp.zeros((1024, 1024))})
        assert metadata == {"step": 1}
        assert (np.asarray(arrays["x"]) == 1).all()
        checkpointer.save(2, arrays, {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_of_many_arrays_that_cannot_be_read_one_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    # Another Checkpointer of this process may have done so for the hook before.
    _leave_later_failures_unsaid.cache_clear()
    weights = {str(n): np.random.default_rng(n).normal(size=(200, 300)).astype(np.float32) for n in range(30)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, weights, {})
    for file in tmp_path.glob("1/arrays/**/d/*"):
        cut(file)
    for _ in range(5):
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="is damaged") as refused:
            checkpointer.restore(weights)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 800
    time.sleep(0.2)
    assert not printed


def test_each_damaged_file_is_not_needed_or_named_in_one_line(tmp_path: Path) -> None:
    tree = {"weights": np.arange(64, dtype=np.float32)}
    with Checkpointer(tmp_path / "whole") as checkpointer:
        checkpointer.save(1, tree, METADATA)
    named = {}
    for file in sorted(path for path in (tmp_path / "whole" / "1").rglob("*") if path.is_file()):
        content = file.read_bytes()
        for damage in (content[: len(content) // 2], b"", b"\xff\x07" * 300, b'[1, {"a": "b"}]'):
            file.write_bytes(damage)
            try:
                with Checkpointer(tmp_path / "whole") as checkpointer:
                    assert_identical(checkpointer.restore(tree)[0], tree)
            except UserError as error:
                named[file.name] = str(error)
        file.write_bytes(content)
    for line in named.values():
        assert re.fullmatch(rf"[^\n]*{tmp_path}/whole[^\n]* is damaged: [^\n]+; delete [^\n]+", line)
    assert {"metadata", "manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA"} <= named.keys()


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("victim", ["largest data file", "array index", "record"])
def test_damage_is_refused_and_the_checkpoint_named(tmp_path: Path, victim: str, damage: Any) -> None:
    weights = {"weights": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, weights, {"stage": "off_policy"})
        checkpointer.save(4, weights, {"stage": "off_policy"})
    folder = tmp_path / "4"
    damage(
        {
            "largest data file": max(folder.glob("arrays/**/d/*"), key=lambda path: path.stat().st_size),
            "array index": folder / "arrays" / "manifest.ocdbt",
            "record": folder / "record" / "metadata",
        }[victim]
    )
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match=rf"checkpoint {re.escape(str(folder))} is damaged: .*; delete this folder"):
            checkpointer.restore(weights)
        checkpointer.restore(weights, step=3)
    shutil.rmtree(folder)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3


def test_an_unusable_directory_and_a_full_disk_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path / "checkpoints", keep=0)
    random = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32)}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, random, {})
        checkpointer.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a fifth of the array
        try:
            checkpointer.save(2, random, {})
            with pytest.raises(UserError, match=r"cannot be written: .*"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, random, {})
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 2


def test_trees_without_distinct_names_and_typed_keys_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"a/b.* do not name one array each"):
            checkpointer.save(1, {"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, {})
        with pytest.raises(ValueError, match="do not name one array each"):
            checkpointer.save(1, np.zeros(1), {})
        with pytest.raises(ValueError, match="key is a typed random key"):
            checkpointer.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match=r"x has shape \(0, 3\)"):
            checkpointer.save(1, {"x": np.zeros((0, 3))}, {})
        with pytest.raises(TypeError):
            checkpointer.save(1, {"x": np.zeros(1)}, {"not json": object()})
        assert checkpointer.latest_step() is None


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "bfloat16", "float16", "float32", "int32", "uint32"])
def test_bit_sums_agree_on_host_and_device_under_any_sharding(dtype: str) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (8, 6)).astype(jnp.dtype(dtype))
    spread = jax.device_put(values, NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")))
    expected = sum(int(bits) for bits in values.view(f"u{values.itemsize}").ravel()) % 2**32
    sums = _device_bit_sums({"one device": jnp.asarray(values), "spread": spread})
    assert {_host_bit_sum(values), *(int(bit_sum) for bit_sum in sums.values())} == {expected}
    double = np.array([1.5, -2.0])
    assert _host_bit_sum(double) == sum(int(half) for half in double.view(np.uint32)) % 2**32


def test_orbax_is_quiet(tmp_path: Path) -> None:
    script = "import sys, jax.numpy as jnp\nfrom distill.training.checkpoint import Checkpointer\n" + textwrap.dedent(
        """
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"x": jnp.zeros(3)}, {})
            checkpointer.restore({"x": jnp.zeros(3)})
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "orbax" not in run.stderr.lower()
    assert run.stdout == ""
