"""Reading and writing checkpoint folders: shards, dtypes, meshes, memory, and damage that is named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf, streaming
from qwen3.checkpoint.hf_names import leaves_of
from qwen3.checkpoint.safetensors_folder import SafetensorsFolder
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.folder import complete_folder
from qwen3.sharding import MeshShape, make_mesh, shardings

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    mlp_only_layers=(1,),
    eos_token_id=(3, 1),
    pad_token_id=1,
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    """Every weight differs from every other, norms included."""
    shapes = jax.eval_shape(lambda: Qwen3(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


@pytest.fixture
def folder(model, tmp_path):
    hf.save(tmp_path / "model", model)
    return tmp_path / "model"


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_single_file(folder, model):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]
    assert_equal(hf.load(folder), model)
    assert hf.load(folder).config == CONFIG
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [3, 1], "pad_token_id": 1}
    header = (folder / WEIGHTS).read_bytes()[8:].split(b"}", 1)[0]
    assert b'"__metadata__":{"format":"pt"' in header


def test_shards(model, tmp_path):
    limit = 1500
    hf.save(tmp_path, model, max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    total = 0
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sorted(tensors) == sorted(name for name, at in index["weight_map"].items() if at == file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert_equal(hf.load(tmp_path), model)

    tokens = np.arange(12)[None] % 16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = theirs(torch.tensor(tokens)).logits.detach().numpy()
    # float32 sums in another order.
    np.testing.assert_allclose(model.logits(tokens, np.arange(12)[None], np.ones_like(tokens)), logits, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(model, tmp_path, dtype):
    hf.save(tmp_path, model, dtype=dtype)
    assert {tensor.dtype.name for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    assert_equal(hf.load(tmp_path), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored))
    kept = hf.load(tmp_path, param_dtype=jnp.dtype(dtype), compute_dtype=jnp.bfloat16)
    assert_equal(kept, stored)
    assert kept.compute_dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_a_mesh_gets_every_part_where_it_belongs(folder, model, shape):
    placed = hf.load(folder, mesh=make_mesh(MeshShape(**shape)))
    assert_equal(placed, model)
    gate = placed.stacks[0].ffn.gate[...]
    assert gate.addressable_shards[0].data.shape == (
        1,
        4 // shape.get("expert", 1),
        8 // shape.get("fsdp", 1),
        12 // shape["tensor"],
    )
    assert len({shard.device for shard in gate.addressable_shards}) == 8


def test_fused_experts_on_a_mesh(folder, model):
    def fuse(tensors):
        for layer in (0, 2):
            names = [f"model.layers.{layer}.mlp.experts.{{}}.{kind}_proj.weight" for kind in ("gate", "up", "down")]
            gate, up, down = (np.stack([tensors.pop(name.format(e)) for e in range(4)]) for name in names)
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate((gate, up), axis=1)
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = down

    change(folder, fuse)
    assert_equal(hf.load(folder), model)
    assert_equal(hf.load(folder, mesh=make_mesh(MeshShape(expert=4, tensor=2))), model)


@pytest.mark.parametrize("shape", [None, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_slabs_of_a_layer_and_pieces_of_a_row_make_the_same_weights(model, tmp_path, monkeypatch, shape):
    monkeypatch.setattr(streaming, "SLAB_BYTES", 1)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1)
    hf.save(tmp_path, model, dtype="bfloat16", max_shard_bytes=1500)
    mesh = None if shape is None else make_mesh(MeshShape(**shape))
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = hf.load(tmp_path, param_dtype=dtype, mesh=mesh)
        assert_equal(loaded, jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), stored))
    if mesh is not None:
        placed = shardings(loaded, mesh)
        for leaf, sharding in zip(jax.tree.leaves(loaded), jax.tree.leaves(placed), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_progress_counts_every_stored_byte_once(folder, model):
    for mesh in (None, make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))):
        told = []
        hf.load(folder, mesh=mesh, on_read=lambda done, total, told=told: told.append((done, total)))
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert {total for _, total in told} == {sum(leaf.nbytes for leaf in jax.tree.leaves(model))}
        assert told[-1][0] == told[-1][1]


def test_experts_of_other_hosts_are_not_read(folder, model, monkeypatch):
    """As on the first of two hosts with the first half of the devices each."""
    mesh = make_mesh(MeshShape(expert=2, tensor=2, data=2))
    of_host = set(mesh.devices[:, :, 0].flat)
    everywhere = NamedSharding.addressable_devices_indices_map

    def of_this_host(sharding, shape):
        return {device: index for device, index in everywhere(sharding, shape).items() if device in of_host}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", of_this_host)
    files = SafetensorsFolder(folder)
    read = []
    monkeypatch.setattr(
        files, "read", lambda name, *where: read.append(name) or SafetensorsFolder.read(files, name, *where)
    )
    leaf = next(leaf for leaf in leaves_of(model) if leaf.module_name == "gate_proj" and len(leaf.tensors[0].lead) == 2)
    layout = streaming._Layout(files, leaf, mesh)
    (slab,) = layout.slabs()
    outs = [np.zeros([stop - start for start, stop in bounds], np.float32) for bounds in slab]
    for piece in layout.pieces(slab):
        layout.fill(piece, slab, outs)
    assert {name.split(".")[5] for name in read} == {"0", "1"}
    whole = np.asarray(leaf.param.get_value())
    for bounds, out in zip(slab, outs, strict=True):
        np.testing.assert_array_equal(out, whole[tuple(slice(*bound) for bound in bounds)])


def test_saving_from_a_mesh(folder, model, tmp_path):
    hf.save(tmp_path / "again", hf.load(folder, mesh=make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))))
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_buffers_of_old_llama_checkpoints_are_ignored(folder, model):
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}))
    with pytest.raises(UserError, match="F64"):
        hf.load(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    assert_equal(hf.load(folder), model)


@pytest.fixture
def tied(tmp_path):
    """A dense model with tied embeddings, as a folder."""
    config = dataclasses.replace(CONFIG, model_type="qwen3", num_experts=0, tie_word_embeddings=True)
    hf.save(tmp_path / "tied", Qwen3(config, jax.random.key(0)))
    return tmp_path / "tied"


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_beside_tied_embeddings_must_be_the_same(tied, monkeypatch):
    monkeypatch.setattr(hf, "_COMPARED_ENTRIES", 7)
    before = hf.load(tied)
    change(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    assert_equal(hf.load(tied), before)
    # Of another dtype but the same values.
    change(tied, lambda tensors: tensors.update({EMBEDDING: tensors[HEAD].astype(np.float16)}))
    change(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].astype(np.float32)}))
    hf.load(tied)
    change(tied, lambda tensors: tensors[HEAD].__setitem__((-1, -1), 5))
    for read in (hf.load, hf.check):
        with pytest.raises(UserError, match=r"lm_head\.weight is stored and differs .* tie_word_embeddings to false"):
            read(tied)
    # The remedy gives what transformers makes of both.
    tokens = np.arange(12)[None] % 16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype="float32")(torch.tensor(tokens)).logits
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ours = hf.load(tied).logits(tokens, np.arange(12)[None], np.ones_like(tokens))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-4)  # float32 sums in another order
    change(tied, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(UserError, match=r"missing: lm_head\.weight; if its head is its embedding, set tie_word_"):
        hf.load(tied)


def test_tied_embeddings_of_another_shape_or_name_are_refused(tied):
    change(tied, lambda tensors: tensors.update({HEAD: np.ones((16, 4), np.float32)}))
    with pytest.raises(UserError, match="is stored and differs"):
        hf.check(tied)
    change(tied, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    with pytest.raises(UserError, match=r"missing: model\.embed_tokens\.weight"):
        hf.check(tied)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(folder, name):
    (folder / name).write_text("{}")
    for read in (hf.load, hf.check):
        with pytest.raises(UserError, match=rf"holds an adapter \({name}\) beside the weights, .* merge it into them"):
            read(folder)


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ('{"base_model_name_or_path": "Qwen/Qwen3-8B"}', "'Qwen/Qwen3-8B'"),
        ('{"base_model_name_or_path": null}', "a base that it does not name"),
        ("[]", "a base that it does not name"),
        ("{", "a base that it does not name"),
    ],
)
def test_an_adapter_without_its_base_is_named(tmp_path, config, base):
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").touch()
    message = rf"holds an adapter of {base} \(adapter_config.json, adapter_model.safetensors\) and no model; merge it"
    for read in (hf.load, ModelConfig.from_folder, ChatTokenizer.from_folder):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


def test_all_that_does_not_fit_is_named_at_once(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.bias"] = np.zeros(16, np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((16, 9), np.float32)

    change(folder, spoil)
    with pytest.raises(UserError) as caught:
        hf.load(folder)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: lm_head.bias" in message
    assert "wrong shape: model.embed_tokens.weight [16, 9] instead of [16, 8]" in message
    assert "\n" not in message


def test_many_faults_are_counted(folder):
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name])
    with pytest.raises(UserError, match=r"missing: .*experts.* and 20 more"):
        hf.load(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def overwrite(path):
    path.write_bytes(b"no tensors here, whatever the name says")


@pytest.mark.parametrize("damage", [truncate, overwrite, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_named(folder, damage):
    damage(folder / WEIGHTS)
    with pytest.raises(UserError, match=f"{folder / WEIGHTS} is truncated or no safetensors file"):
        hf.load(folder)


def test_a_damaged_shard_is_named(model, tmp_path):
    hf.save(tmp_path, model, max_shard_bytes=3000)
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    truncate(shard)
    with pytest.raises(UserError, match=f"{shard} is truncated"):
        hf.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_no_weight_has_are_named(folder, model, dtype, bad):
    hf.save(folder, model, dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors[name].__setitem__((11, 7), bad))
    with pytest.raises(UserError, match=f"{WEIGHTS}: {name} holds values that are no"):
        hf.load(folder)


def test_the_largest_finite_values_are_weights(folder, model):
    largest = np.finfo(np.float32).max
    change(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(slice(0, 2), (largest, -largest)))
    assert np.asarray(hf.load(folder).final_norm[...])[:2].tolist() == [largest, -largest]


def test_a_download_that_goes_on_is_named(folder):
    (folder / f"{WEIGHTS}.aria2").touch()
    with pytest.raises(UserError, match=f"{folder / WEIGHTS} is not downloaded to its end .*{WEIGHTS}.aria2.* finish"):
        hf.load(folder)


def test_missing_files_are_named(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{folder} has neither {WEIGHTS} nor {INDEX}"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"{folder / 'config.json'} does not exist"):
        hf.load(folder)


def index_of(content):
    return lambda index, folder: content


def without_first_shard(index, folder):
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    return index


def with_a_tensor_elsewhere(index, folder):
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    return index


def with_a_file_outside(index, folder):
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    return index


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_first_shard, r"index.json names model-00001-of-\d+.safetensors, absent from the folder"),
        (with_a_tensor_elsewhere, "places model.norm.weight in model-00001-of-.*, which does not hold"),
        (with_a_file_outside, "names ../other.safetensors; shards must lie in the same folder"),
        (index_of({}), "is no safetensors index with a weight_map"),
        (index_of([]), "holds list, not a JSON object"),
        (index_of({"weight_map": {"model.norm.weight": 3}}), "names 3, absent from the folder"),
        (index_of({"weight_map": {}}), "missing: "),
    ],
)
def test_a_wrong_index_is_named(model, tmp_path, edit, message):
    hf.save(tmp_path, model, max_shard_bytes=3000)
    index = edit(json.loads((tmp_path / INDEX).read_text()), tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path)


def test_quantised_tensors_are_refused(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(8, np.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight is I8; only"):
        hf.load(folder)


def test_a_failed_save_leaves_the_old_folder_and_no_other(folder, model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = []

    def save_two(tensors, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(hf, "save_file", save_two)
    with pytest.raises(UserError, match=f"{folder} cannot be written .No space left"):
        hf.save(folder, model, max_shard_bytes=3000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_kill_between_renames_loses_nothing(folder, model):
    folder.rename(folder.with_name(".model.previous"))
    folder.with_name(".model.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), complete_folder(folder):
        raise KeyboardInterrupt
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert_equal(hf.load(folder), model)


def test_what_the_writer_does_not_own_stays(folder):
    (folder / "README.md").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"mine")
    (folder / "link").symlink_to("plots")
    (folder / "config.json").write_text("changed by hand")
    inode = (folder / "README.md").stat().st_ino
    with complete_folder(folder, own=[WEIGHTS, "generation_config.json"]) as partial:
        for name in (WEIGHTS, "config.json"):
            (partial / name).write_text("new")
    assert (folder / WEIGHTS).read_text() == "new"
    assert not (folder / "generation_config.json").exists()
    assert (folder / "config.json").read_text() == "changed by hand"
    assert (folder / "plots" / "loss.png").read_bytes() == b"mine"
    assert (folder / "link").is_symlink()
    # Not copied: what lies there may be large.
    assert (folder / "README.md").stat().st_ino == inode
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_is_replaced_but_nothing_else(folder, model):
    hf.save(folder, model, max_shard_bytes=3000)
    assert not (folder / WEIGHTS).exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is no part of a model"):
        hf.save(folder, model)
    assert (folder / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        hf.save(folder / "thesis.tex", model)
    with pytest.raises(UserError, match="cannot be written"):
        hf.save(folder / "thesis.tex" / "model", model)


MEMORY = """
import json, sys
import jax, numpy as np
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf, streaming
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3

# Of this process alone: ru_maxrss would begin at the parent's.
def status(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

folder = sys.argv[1]
config = ModelConfig(model_type="qwen3", vocab_size=4096, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=64)
if sys.argv[2] == "make":
    shapes = jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))
    hf.save(folder, jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes))
else:
    jax.block_until_ready(jax.device_put(np.ones(3)) + 1)
    start = status("VmRSS")
    model = jax.block_until_ready(hf.load(folder))
    loaded = status("VmHWM") - start
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    tensor = max(leaf[0].nbytes if leaf.ndim > 2 else leaf.nbytes for leaf in jax.tree.leaves(model))
    start = status("VmRSS")
    hf.save(folder + "_shards", model, max_shard_bytes=40_000_000)
    print(json.dumps({"kept": kept, "tensor": tensor, "load": loaded, "save": status("VmHWM") - start}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through Linux's /proc")
def test_memory_stays_near_one_tensor_above_what_is_kept(tmp_path):
    def run(stage):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), stage]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("make")
    measured = json.loads(run("load"))
    assert measured["kept"] > 190e6
    # Code and buffers of the first calls of jax and safetensors.
    slack = 15e6
    assert measured["load"] < measured["kept"] + measured["tensor"] + slack
    assert measured["save"] < 40e6 + 2 * measured["tensor"] + slack
