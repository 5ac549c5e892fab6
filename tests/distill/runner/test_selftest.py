"""The self-test lets agreeing models through and stops the others, naming what to do."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distill.monitor.progress import Progress
from distill.runner import selftest
from distill.runner.teachers import Teachers
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.kernels import Kernels
from qwen3.errors import UserError
from qwen3.sharding import MeshShape, make_mesh
from tests.distill import miniature


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(miniature.make_teacher(tmp_path_factory.mktemp("teacher")))


def edited(folder: Path, target: Path, name: str, **fields: object) -> Path:
    """A copy of the tokenizer's files with some JSON fields replaced."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(raw | fields))
    return target


def test_a_student_like_its_teacher_passes(teacher: Path) -> None:
    tokenizer, config = ChatTokenizer.from_folder(teacher), ModelConfig.from_folder(teacher)
    found = selftest.check_tokenizers(tokenizer, config, tokenizer, config)
    assert [agreement.check for agreement in found] == ["vocabulary", "chat template", "end tokens"]
    assert all("same for both" in agreement.finding for agreement in found)


def test_other_end_tokens_and_templates_are_reconciled_to_the_teachers(teacher: Path, tmp_path: Path) -> None:
    tokenizer, config = ChatTokenizer.from_folder(teacher), ModelConfig.from_folder(teacher)
    base = edited(teacher, tmp_path / "base", "tokenizer_config.json", eos_token="<|endoftext|>")
    (base / "generation_config.json").unlink()
    found = selftest.check_tokenizers(ChatTokenizer.from_folder(base), config, tokenizer, config)
    end = next(agreement for agreement in found if agreement.check == "end tokens")
    assert f"stopped at the teacher's {list(tokenizer.eos_ids)}" in end.finding
    other = edited(
        teacher,
        tmp_path / "template",
        "tokenizer_config.json",
        chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    )
    (other / "chat_template.jinja").unlink(missing_ok=True)
    found = selftest.check_tokenizers(ChatTokenizer.from_folder(other), config, tokenizer, config)
    assert "asked in the teacher's" in next(a.finding for a in found if a.check == "chat template")


@pytest.mark.parametrize("template", [None, "{{ '<|im_start|>' + messages[-1].content + '<|im_end|>' }}"])
def test_a_student_without_a_template_or_with_fewer_modes_is_asked_in_the_teachers(
    teacher: Path, tmp_path: Path, template: str | None
) -> None:
    tokenizer, config = ChatTokenizer.from_folder(teacher), ModelConfig.from_folder(teacher)
    base = ChatTokenizer.from_folder(
        edited(teacher, tmp_path / "base", "tokenizer_config.json", chat_template=template)
    )
    assert base.modes != tokenizer.modes
    found = selftest.check_tokenizers(base, config, tokenizer, config)
    assert "asked in the teacher's" in next(a.finding for a in found if a.check == "chat template")


def test_a_teacher_whose_turns_never_end_is_refused(teacher: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(teacher)
    folder = edited(teacher, tmp_path / "endless", "tokenizer_config.json", eos_token="<|endoftext|>")
    (folder / "generation_config.json").unlink()
    endless = ChatTokenizer.from_folder(folder)
    with pytest.raises(UserError, match="would never stop"):
        selftest.check_tokenizers(endless, config, endless, config)


def test_vocabularies_must_be_one(teacher: Path) -> None:
    tokenizer, config = ChatTokenizer.from_folder(teacher), ModelConfig.from_folder(teacher)
    padded = dataclasses.replace(config, vocab_size=config.vocab_size + 128)
    with pytest.raises(UserError, match="pad the smaller embedding"):
        selftest.check_tokenizers(tokenizer, padded, tokenizer, config)
    smaller = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
    with pytest.raises(UserError, match="same checkpoint"):
        selftest.check_tokenizers(tokenizer, smaller, tokenizer, config)


def test_numerics_hold_and_their_check_can_fail(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = selftest._measured.__wrapped__

    def replace(patch: pytest.MonkeyPatch, name: str, other: object) -> None:
        """What is compiled knows nothing of it: a program of its own measures with it."""
        patch.setattr(selftest, name, other)
        patch.setattr(selftest, "_measured", jax.jit(functools.partial(measured), static_argnames=("mesh", "rewards")))

    mesh = make_mesh(MeshShape(data=4, fsdp=2))
    model, tokenizer = hf.load(teacher, mesh=mesh), ChatTokenizer.from_folder(teacher)
    model = jax.tree.map(lambda leaf: leaf * 20, model)  # far from the uniform distribution of fresh weights
    assert len(selftest.check_numerics(model, tokenizer, "thinking", mesh, rewards=True)) == 3

    def own_tokens(tokens: jax.Array) -> jax.Array:
        return tokens

    with monkeypatch.context() as patch:
        replace(patch, "following_tokens", own_tokens)
        with pytest.raises(UserError, match="policy gradient's log-probabilities are off"):
            selftest.check_numerics(model, tokenizer, "thinking", mesh, rewards=True)

    def shifted(tokens: jax.Array) -> object:
        return one_hot(jax.numpy.roll(tokens, 1, axis=1))

    one_hot = selftest.one_hot
    replace(monkeypatch, "one_hot", shifted)
    with pytest.raises(UserError, match="not at the predicting position"):
        selftest.check_numerics(model, tokenizer, "thinking", mesh)


def overflowing(folder: Path, target: Path, tensor: str) -> Path:
    """A checkpoint of finite weights, one tensor of which is so large that products with it are not."""
    edited(folder, target, "config.json")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = np.full_like(tensors[tensor], 3e38)
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_teacher_that_scores_nan_is_found_as_it_is_loaded(teacher: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    spoilt = str(overflowing(teacher, tmp_path / "spoilt", name))
    experiment, tokenizer = miniature.experiment(str(teacher)), ChatTokenizer.from_folder(teacher)
    assert experiment.teacher is not None
    for mesh in (make_mesh(MeshShape(), jax.devices()[:1]), make_mesh(MeshShape(fsdp=2, tensor=1, context=4))):
        assert Teachers(experiment, tokenizer, mesh, Progress()).load("").mesh == mesh
        bad = dataclasses.replace(experiment, teacher=dataclasses.replace(experiment.teacher, path=spoilt))
        with pytest.raises(UserError) as caught:
            Teachers(bad, tokenizer, mesh, Progress()).load("")
        assert f"the teacher's log-probabilities are NaN: its weights in {spoilt} compute no" in str(caught.value)
        assert f"({name} goes up to 3e+38)" in str(caught.value)


def test_a_student_that_computes_nan_is_told_from_an_error_of_the_kernels(teacher: Path, tmp_path: Path) -> None:
    spoilt = overflowing(teacher, tmp_path / "spoilt", "model.layers.0.self_attn.v_proj.weight")
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    with pytest.raises(
        UserError, match=r"student's log-probabilities are NaN: .*\(model.layers.0.self_attn.v_proj.weight goes"
    ):
        selftest.check_numerics(hf.load(spoilt, mesh=mesh), ChatTokenizer.from_folder(teacher), "thinking", mesh)


def test_numerics_are_those_of_the_kernels_that_train(teacher: Path) -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2), jax.devices()[:4])
    model, tokenizer = hf.load(teacher, mesh=mesh), ChatTokenizer.from_folder(teacher)
    model.kernels = Kernels(linear_kl="tpu")
    with pytest.raises(ValueError, match="'tpu' of linear_kl needs TPU"):
        selftest.check_numerics(model, tokenizer, "thinking", mesh)
    model.kernels = Kernels(linear_kl="xla")
    assert len(selftest.check_numerics(model, tokenizer, "thinking", mesh)) == 2
