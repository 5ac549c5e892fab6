"""A stage learns from a store that is given to it, as from one of its own, and takes none of another kind."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages import OffPolicy
from distill.stages.stopping import StopRequest
from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError
from qwen3.rollout import MODES, Rollout
from qwen3.sharding import make_mesh
from student.init import FromScratch
from teacher.identity import tokenizer_hashes
from teacher.scored_rollout import ScoredRollout
from teacher.store import TargetStore, TargetStoreWriter
from teacher.store.target_store import merged
from tests.distill.faults import scalars
from tests.distill.miniature import DENSE, make_teacher
from tests.distill.miniature import experiment as miniature

pytestmark = pytest.mark.usefixtures("charts_are_left_out")

ONE_LAYER = DENSE | {"num_hidden_layers": 1}
TOP_K, LONGEST = 4, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("teacher"), ONE_LAYER)


@pytest.fixture(scope="module")
def identity(folder: str) -> dict[str, Any]:
    tokenizer, template = tokenizer_hashes(folder)
    own = {"tokenizer": tokenizer, "template": template, "vocab_size": ChatTokenizer.from_folder(folder).vocab_size}
    return {"teacher": "one", **own, "top_k": TOP_K, "sampled_tokens": None}


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.experiment.make_mesh", lambda shape, _=None: make_mesh(shape, jax.devices()[:1]))


def write(directory: Path, identity: Mapping[str, Any], vocab_size: int, seed: int) -> TargetStore:
    """Nine responses of random tokens, with made-up targets."""
    rng, records = np.random.default_rng(seed), []
    for number, length in enumerate(rng.integers(10, LONGEST, 9)):
        mask = (np.arange(length) >= 4) & (np.arange(length) < length - 1)
        logprobs = -np.sort(rng.gamma(2.0, 2.0, (length, TOP_K)).astype(np.float32), axis=1) - 1
        rollout = Rollout(
            tokens=rng.integers(0, vocab_size, length).astype(np.int32), prompt_length=5, loss_mask=mask,
            sampler_logprobs=np.zeros(length, np.float32), mode=MODES[number % 2], prompt_id=f"{seed}-{number}",
            sample_index=0, policy_step=0, finished=True,
        )  # fmt: skip
        records.append(
            ScoredRollout(
                rollout=rollout,
                ids=np.array([rng.permutation(vocab_size)[:TOP_K] for _ in range(length)], np.int32),
                logprobs=logprobs,
                log_tail=np.log1p(-np.exp(logprobs).sum(axis=1)),
            )
        )
    writer = TargetStoreWriter(directory, {**identity, "seed": seed})
    writer.write_shard(0, records)
    writer.finish()
    return TargetStore.open(directory)


def learning_from(store: Path, folder: str, **changed: Any) -> Experiment:
    """Three steps from a store, without a teacher."""
    whole = miniature(folder)
    training = dataclasses.replace(whole.stages["off_policy"].training, steps=3, rows=2, row_length=128)
    return dataclasses.replace(
        whole,
        teacher=None,
        student=FromScratch(architecture=ONE_LAYER, tokenizer=folder),
        stages={"given": OffPolicy(store=str(store), training=training, **({"top_k": TOP_K} | changed))},
        export_stage=None,
        evaluation=dataclasses.replace(whole.evaluation, problems=0),
    )


def run(experiment: Experiment, directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    with StopRequest().listening() as stop:
        execute(experiment, directory, Progress(Console(file=io.StringIO())), stop)
    return scalars(directory)


def test_merged_stores_teach_without_a_teacher_and_are_those_that_the_run_began_with(
    folder: str, identity: dict[str, Any], one_device: None, tmp_path: Path
) -> None:
    vocab_size = ChatTokenizer.from_folder(folder).vocab_size
    stores = [write(tmp_path / str(seed), identity, vocab_size, seed) for seed in (0, 1)]
    merged(stores, tmp_path / "both")
    found = run(learning_from(tmp_path / "both", folder), tmp_path / "run")
    assert found.keys() == {("given", step) for step in (1, 2, 3)}
    assert np.all(np.isfinite([values["loss"] for values in found.values()]))
    assert not (tmp_path / "run" / "targets").exists()
    # The same command again has nothing left to do.
    assert run(learning_from(tmp_path / "both", folder), tmp_path / "run") == found
    index = tmp_path / "both" / "index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(UserError, match=r"index\.json \(stages\.given\.store\) has changed since this run began"):
        run(learning_from(tmp_path / "both", folder), tmp_path / "run")


def test_what_is_no_store_of_this_kind_is_refused_before_anything_is_spent(
    folder: str, identity: dict[str, Any], tmp_path: Path
) -> None:
    def refused(
        match: str, *, teachers: Mapping[str, str] = {"": "one"}, other: Mapping[str, Any] = {}, **changed: Any
    ) -> None:
        stage = learning_from(store, folder, **changed).stages["given"]
        assert isinstance(stage, OffPolicy)
        with pytest.raises(UserError, match=match) as raised:
            stage.check_store("stages.given", {**here, **other}, teachers)
        assert "\n" not in str(raised.value)

    here = {name: identity[name] for name in ("tokenizer", "template", "vocab_size")}
    store = tmp_path / "nowhere"
    refused("is not a target store")
    store = write(tmp_path / "store", identity, 300, 0).directory
    refused("was written with another tokenizer than the experiment's", other={"tokenizer": "another"})
    refused("was written with another template than the experiment's", other={"template": "another"})
    refused(r"was written with another vocab_size than the experiment's \(\d+, here 7\)", other={"vocab_size": 7})
    refused("was written by teacher one, but the experiment's is two; name that", teachers={"": "two"})
    refused(
        "was written by teacher one, but the experiment's is {'math': 'one', 'ch", teachers={"math": "one", "chat": "2"}
    )
    refused(r"keeps top_k 4; set stages\.given\.top_k to that", top_k=5)
    refused(r"keeps top_k 4; .*\.top_k to that, and stages\.given\.sampled_tokens to None", sampled_tokens=4)
    short = dataclasses.replace(learning_from(store, folder).stages["given"].training, row_length=16)
    with pytest.raises(UserError, match=r"the longest response .* training\.row_length is 16; raise it"):
        OffPolicy(store=str(store), top_k=TOP_K, training=short).check_store("x", here, {})
    stage = OffPolicy(store=str(store), top_k=TOP_K, training=short)
    with pytest.raises(UserError, match=r"targets_of is 'a' and store .*, but a stage reads one of them; leave the"):
        dataclasses.replace(stage, targets_of="a")


@pytest.mark.long
def test_a_given_store_teaches_what_the_stage_that_wrote_it_learned(
    folder: str, one_device: None, tmp_path: Path
) -> None:
    whole = miniature(folder)
    writing = dataclasses.replace(whole.stages["off_policy"], prompts=8)
    experiment = dataclasses.replace(
        learning_from(tmp_path, folder), teacher=whole.teacher, stages={"off_policy": writing}
    )
    expected = run(experiment, tmp_path / "writes")
    store = tmp_path / "writes" / "targets" / "off_policy"
    reading = dataclasses.replace(experiment, stages={"off_policy": dataclasses.replace(writing, store=str(store))})
    assert run(reading, tmp_path / "reads") == expected
