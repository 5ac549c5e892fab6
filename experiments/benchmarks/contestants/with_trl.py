"""TRL's side of `against_peers`: GKDTrainer, all of whose rows lie in one microbatch.

lmbda says who generates (0 the data, 1 the student), beta the direction: 0 is forward KL, 1 reverse KL.
"""

import itertools
import tempfile
import time

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from experiments.benchmarks.turns import LEARNING_RATE, Turns, Work

_MOST_STEPS = 1000
_IGNORED = -100  # a label that is not trained

work, turns = Work.from_argument(), Turns("torch", "transformers", "trl", "accelerate")
torch.set_num_threads(work.cores)
on_policy = work.mode == "on"
student, teacher = (
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (work.student, work.teacher)
)
student.generation_config.eos_token_id = None  # every continuation has its full length
steps = itertools.count()


def collate(rows: list) -> dict[str, torch.Tensor]:
    """The next step's tokens; the rows of the data set only number them."""
    tokens = torch.tensor(work.tokens(next(steps)).astype("int64"))
    labels = tokens.clone()
    if on_policy:
        labels[:, : work.prompt_tokens] = _IGNORED
    prompts = tokens[:, : work.prompt_tokens]
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "prompts": prompts,
        "prompt_attention_mask": torch.ones_like(prompts),
    }


class TakesTurns(TrainerCallback):
    """The loss is logged after a step's end, so it is told with the next one's."""

    loss: float | None = None
    sampling_seconds: float | None = None

    def on_step_begin(self, *args, **kwargs):
        turns.begin()

    def on_step_end(self, *args, **kwargs):
        turns.end(loss=self.loss, sampling_seconds=self.sampling_seconds)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)


class Trainer(GKDTrainer):
    """GKDTrainer that notes how long the student generates."""

    @staticmethod
    def generate_on_policy_outputs(*args, **kwargs):
        started = time.perf_counter()
        written = GKDTrainer.generate_on_policy_outputs(*args, **kwargs)
        callback.sampling_seconds = time.perf_counter() - started
        assert written[0].shape == (work.rows, work.sequence_tokens), written[0].shape
        return written


callback = TakesTurns()
trainer = Trainer(
    model=student,
    teacher_model=teacher,
    args=GKDConfig(
        lmbda=1.0 if on_policy else 0.0,
        beta=1.0 if on_policy else 0.0,
        temperature=1.0,
        max_new_tokens=work.new_tokens,
        max_length=work.sequence_tokens,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.rows,
        max_steps=_MOST_STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # nobody clips
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    ),
    data_collator=collate,
    train_dataset=datasets.Dataset.from_dict({"prompt": ["-"] * work.rows * _MOST_STEPS}),
    processing_class=AutoTokenizer.from_pretrained(work.tokenizer),
    callbacks=[callback],
)
trainer.generation_config.eos_token_id = None
trainer.train()
