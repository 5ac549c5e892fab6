"""Makes the quickstart's tokenizer: byte-level BPE on the task's texts, with Qwen3's special tokens and template.

python -m experiments.quickstart_tokenizer FOLDER
"""

import sys

from experiments.quickstart_task import arithmetic
from qwen3.chat.tokenizer import train_byte_level_bpe

VOCABULARY = 384


def main(folder: str) -> None:
    problems = arithmetic().problems("train", 4_000, seed=0)
    entries = train_byte_level_bpe(
        (f"{problem.prompt}\n{problem.solution}\n{problem.answer}" for problem in problems), VOCABULARY, folder
    )
    print(f"{folder}: {entries} entries")


if __name__ == "__main__":
    main(sys.argv[1])
