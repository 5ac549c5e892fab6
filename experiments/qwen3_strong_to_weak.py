"""What the experiments with the published Qwen3 checkpoints share: data, lengths, modes, stages, learning rates, mesh.

The recipe is Qwen3's own (arXiv 2505.09388, section 4.5): first the teacher generates in both modes and the student
learns what it said (off-policy), then the student generates and the teacher judges every token (on-policy).

What the report does not tell is taken from the open reproduction with the same models (tinker-cookbook,
recipes/distillation: DeepMath prompts, of full fine-tuning a learning rate of 1e-4 off-policy and 5e-5 on-policy, found
for 8B; for other sizes a start).

Once, before a run, on a machine with a few hundred GB of disk:

    hf download Qwen/Qwen3-235B-A22B --local-dir models/Qwen3-235B-A22B        (teacher and student, named in each file)
    hf download zwhe99/DeepMath-103K --repo-type dataset --local-dir data/deepmath
    python -c "import pyarrow.dataset as d, pyarrow.parquet as p; p.write_table(d.dataset('data/deepmath/data')\\
        .to_table(columns=['question', 'final_answer']), 'data/deepmath.parquet')"

A plan needs none of it: it goes by experiments/qwen3_configs until the checkpoints are there. The hours in each file
are those of

    python -m distill.plan experiments/NAME.py --topology TOPOLOGY --no-compile

under the plan's own assumptions: half of every roof and a quarter of decoding's, responses and prompts a quarter of
their limits. Without a compiler it does not know what devices send each other, which added less than 1 % to
qwen3_235b_to_8b on v5p:4x4x4, and 10 % on h100:8x8, whose hosts are joined by a network. Nothing of it was measured.
"""

from pathlib import Path

from distill import (
    Evaluation,
    Experiment,
    FromCheckpoint,
    Loss,
    MeshShape,
    OffPolicy,
    OnPolicy,
    Optimizer,
    PromptFile,
    SamplingParams,
    Teacher,
    Training,
    non_thinking_params,
    thinking_params,
)

ROW_TOKENS = 32_768
PROMPT_TOKENS = 2_048
THINKING_TOKENS = ROW_TOKENS - PROMPT_TOKENS
ANSWER_TOKENS = 8_192

SHARDED_TEACHER = MeshShape(expert=8, tensor=4, context=2)
"""64 devices hold a 235B teacher in equal parts, 6.9 GiB of bfloat16 each: its 4 key/value heads allow tensor = 4, a
batch of 8 rows expert = 8, and two devices share each row. More devices make further copies (data)."""


def strong_to_weak(
    *,
    name: str,
    description: str,
    teacher: str,
    student: str,
    mesh: MeshShape = SHARDED_TEACHER,
    rows: int = 8,
    microbatches_per_step: int = 4,
    sequences: int = 64,
    off_policy_learning_rate: float = 1e-4,
    on_policy_learning_rate: float = 5e-5,
) -> Experiment:
    """Off-policy, then on-policy distillation of the checkpoint models/`student` from models/`teacher`.

    Args:
      rows: of ROW_TOKENS in a microbatch; as many as, or a multiple of, mesh.data × fsdp × expert.
      microbatches_per_step: of the off-policy stage; 4 of 8 rows make a million tokens a step.
      sequences: that a model generates at once, and prompts of an on-policy step. A 235B teacher's cache of one takes 6
      GB
        at full length, and as much again while a dispatch writes.
    """
    return Experiment(
        name=name,
        description=description,
        teacher=Teacher(path=f"models/{teacher}", planned_as=_config(teacher)),
        student=FromCheckpoint(path=f"models/{student}", planned_as=_config(student)),
        tasks={
            "deepmath": PromptFile(
                path="data/deepmath.parquet",
                prompt_column="question",
                answer_column="final_answer",
                verifier="math",
                held_out_fraction=0.01,
            )
        },
        stages={
            # Some 32,768 answers of about 6,000 tokens, half of them short: 190M tokens, twice over in 400 steps.
            # Their targets take 100 GB of disk.
            "off_policy": OffPolicy(
                prompts=32_768,
                thinking=thinking_params(THINKING_TOKENS),
                non_thinking=non_thinking_params(ANSWER_TOKENS),
                max_prompt_tokens=PROMPT_TOKENS,
                batch_size=sequences,
                top_k=64,
                loss=Loss(name="forward_kl"),
                microbatches_per_step=microbatches_per_step,
                training=_training(steps=400, rows=rows, learning_rate=off_policy_learning_rate),
            ),
            "on_policy": OnPolicy(
                prompts_per_step=sequences,
                thinking=SamplingParams(max_new_tokens=THINKING_TOKENS),
                non_thinking=SamplingParams(max_new_tokens=ANSWER_TOKENS),
                max_prompt_tokens=PROMPT_TOKENS,
                loss=Loss(name="reverse_kl"),
                training=_training(steps=200, rows=rows, learning_rate=on_policy_learning_rate),
            ),
        },
        evaluation=Evaluation(
            problems=128,
            samples_per_problem=4,
            pass_at=(4,),
            thinking=thinking_params(THINKING_TOKENS),
            non_thinking=non_thinking_params(ANSWER_TOKENS),
            max_prompt_tokens=PROMPT_TOKENS,
            batch_size=sequences,
        ),
        mesh=mesh,
    )


def _config(checkpoint: str) -> str:
    """The folder with the public config.json of a checkpoint, and nothing else of it."""
    return str(Path(__file__).parent / "qwen3_configs" / checkpoint)


def _training(*, steps: int, rows: int, learning_rate: float) -> Training:
    return Training(
        steps=steps,
        rows=rows,
        row_length=ROW_TOKENS,
        optimizer=Optimizer(learning_rate=learning_rate, schedule="cosine", warmup_fraction=0.05, final_fraction=0.1),
        checkpoint_every_steps=20,
    )
