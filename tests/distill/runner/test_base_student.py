"""A base student without a teacher: it ends where its template ends a turn, and is told the day on which its run began.

Its checkpoint is like Qwen3's base ones, which end texts with another token than turns, and its template has one mode.
"""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import pytest
import transformers

from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner import execute as runner
from distill.stages import Sft
from distill.stages.loop import Training
from distill.stages.stopping import StopRequest
from distill.tasks import PromptFile
from distill.tasks.requests import ModeMix
from distill.training.optimizer import Optimizer
from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from qwen3.sharding import make_mesh
from student.init import FromScratch
from tests.distill import miniature

pytestmark = pytest.mark.usefixtures("charts_are_left_out")

DATED = (
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Every question has one answer, so that a few steps teach it."""
    folder = tmp_path_factory.mktemp("base")
    train_byte_level_bpe(["Is it 3? Today Date: system user assistant"] * 20, 320, folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "chat_template": DATED}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    for name, numbers in (("train", range(20)), ("held_out", range(20, 24))):
        rows = (json.dumps({"prompt": f"Is it {number}?", "answer": "yes"}) + "\n" for number in numbers)
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return Experiment(
        name="base",
        description="A base student learns turns.",
        student=FromScratch(
            architecture=miniature.DENSE | {"num_hidden_layers": 1}, tokenizer=str(folder / "tokenizer")
        ),
        tasks={"yes": PromptFile(path=str(folder / "train.jsonl"), held_out_path=str(folder / "held_out.jsonl"))},
        stages={
            "sft": Sft(
                problems=20,
                modes=ModeMix(thinking_fraction=0),
                training=Training(
                    steps=30, rows=4, row_length=128, optimizer=Optimizer(learning_rate=2e-2), rematerialise=False
                ),
            )
        },
        evaluation=Evaluation(
            problems=4,
            samples_per_problem=1,
            pass_at=(1,),
            modes=("non_thinking",),
            non_thinking=SamplingParams(max_new_tokens=8, temperature=0),
            batch_size=4,
            max_prompt_tokens=64,
        ),
        compute_dtype="float32",
        export_dtype="float32",
    )


@contextlib.contextmanager
def on(today: datetime) -> Iterator[None]:
    """On that day, and on one device."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            del tz
            return today

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("distill.experiment.make_mesh", lambda shape, _: make_mesh(shape, jax.devices()[:1]))
        patched.setattr("distill.monitor.run_identity.datetime", Day)
        patched.setattr("qwen3.chat.chat.datetime", Day)
        yield


def test_it_ends_its_turns_and_is_told_the_day_on_which_the_run_began(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(datetime(2024, 2, 29, 23, 59, 59)), runner.RunDirectory.claim(tmp_path, experiment) as begun:
        begun.begin(None)
    asked, preflight = [], runner.preflight

    def noted(*arguments: Any) -> None:
        asked.append(next(one for one in arguments if isinstance(one, ChatTokenizer)))
        preflight(*arguments)

    monkeypatch.setattr(runner, "preflight", noted)
    with on(datetime(2024, 3, 1, 0, 0, 1)), Progress() as progress:
        runner.execute(experiment, tmp_path, progress, StopRequest())
    prompt = asked[0].render([{"role": "user", "content": "Is it 3?"}], add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\nToday Date: 29 Feb 2024<|im_end|>")

    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["model"]: row["pass_at_1"] for row in rows} == {"student_initial": 0, "sft": 1}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for name in ("generation_config.json", "config.json"):
        ends = json.loads((tmp_path / "export" / name).read_text())["eos_token_id"]
        assert theirs.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = theirs(prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert theirs.decode(written) == "yes<|im_end|>"


def test_a_damaged_day_is_named(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "began").write_text("yesterday")
    damaged = pytest.raises(UserError, match=r"began is damaged; write into it when the run began, as in 20")
    with damaged, runner.RunDirectory.claim(tmp_path, experiment):
        pass
