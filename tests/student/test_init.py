"""Students from a checkpoint and from scratch, and the export that closes the circle."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import TURN_END, train_byte_level_bpe
from qwen3.errors import UserError
from qwen3.sharding import MeshShape, make_mesh
from student.export import export
from student.init import FromCheckpoint, FromScratch

ARCHITECTURE = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(["one and two and three"] * 20, 300, folder)
    return folder


@pytest.fixture(scope="module")
def student(tokenizer_folder):
    return FromScratch(architecture=ARCHITECTURE, tokenizer=str(tokenizer_folder)).build(jax.random.key(0))


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_tokenizer_completes_an_architecture(tokenizer_folder):
    tokenizer = ChatTokenizer.from_folder(tokenizer_folder)
    less = {key: value for key, value in ARCHITECTURE.items() if key != "vocab_size"}
    config = FromScratch(architecture=less, tokenizer=str(tokenizer_folder)).model_config()
    assert config.vocab_size == tokenizer.vocab_size
    assert config.eos_token_id == tokenizer.encode(TURN_END)[0]
    assert config.pad_token_id == tokenizer.pad_id
    given = FromScratch(architecture=ARCHITECTURE | {"eos_token_id": 7}, tokenizer=str(tokenizer_folder))
    assert (given.model_config().vocab_size, given.model_config().eos_token_id) == (320, 7)


def test_random_weights_depend_on_the_key_and_not_on_the_mesh(student, tokenizer_folder):
    recipe = FromScratch(architecture=ARCHITECTURE, tokenizer=str(tokenizer_folder))
    mesh = make_mesh(MeshShape(fsdp=4, tensor=2))
    placed = recipe.build(jax.random.key(0), mesh)
    for mine, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(student), strict=True):
        # The inverse error function is vectorised differently: one unit in the last place.
        np.testing.assert_allclose(mine, theirs, rtol=3e-7)
    assert placed.embed[...].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    other = recipe.build(jax.random.key(1), param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    assert other.embed[...].dtype == other.compute_dtype == jnp.bfloat16
    assert not np.array_equal(other.embed[...], student.embed[...].astype(jnp.bfloat16))


def test_export_and_load_again(student, tokenizer_folder, tmp_path):
    folder = tmp_path / "export"
    tokenizer = ChatTokenizer.from_folder(tokenizer_folder)
    export(folder, student, tokenizer, {"temperature": 0.6, "top_p": 0.95})
    again = FromCheckpoint(path=str(folder)).build(jax.random.key(9))
    assert_equal(again, student)
    assert again.config == student.config
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.top_p) == (0.6, 0.95)
    assert (generation.eos_token_id, generation.pad_token_id) == (list(tokenizer.eos_ids), tokenizer.pad_id)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("one and two").input_ids == tokenizer.encode("one and two")
    assert theirs.chat_template
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 320
    export(folder, student, tokenizer)
    assert "temperature" not in json.loads((folder / "generation_config.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_architecture_from_a_file(tokenizer_folder, tmp_path):
    path = tmp_path / "config.json"
    recipe = FromScratch(architecture=str(path), tokenizer=str(tokenizer_folder))
    with pytest.raises(UserError, match=f"{path} does not exist; name a config.json"):
        recipe.model_config()
    path.write_text("{")
    with pytest.raises(UserError, match=f"{path} is not valid JSON"):
        recipe.model_config()
    path.write_text("[]")
    with pytest.raises(UserError, match=f"{path} holds list"):
        recipe.model_config()
    path.write_text(json.dumps(ARCHITECTURE))
    assert (
        recipe.model_config() == FromScratch(architecture=ARCHITECTURE, tokenizer=str(tokenizer_folder)).model_config()
    )


def test_what_cannot_be_is_refused(student, tokenizer_folder, tmp_path):
    folder = str(tokenizer_folder)
    with pytest.raises(UserError, match="the model's vocab_size is 100"):
        FromScratch(architecture=ARCHITECTURE | {"vocab_size": 100}, tokenizer=folder).build(jax.random.key(0))
    with pytest.raises(UserError, match="hidden_act 'gelu'"):
        FromScratch(architecture=ARCHITECTURE | {"hidden_act": "gelu"}, tokenizer=folder).build(jax.random.key(0))
    with pytest.raises(UserError, match="path is empty"):
        FromCheckpoint(path="")
    with pytest.raises(UserError, match="architecture is empty"):
        FromScratch(architecture={}, tokenizer=folder)
    with pytest.raises(UserError, match=r"config\.json does not exist|not found"):
        FromCheckpoint(path=str(tmp_path / "nowhere")).build(jax.random.key(0))
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        export(occupied, student, ChatTokenizer.from_folder(folder))
