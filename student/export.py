"""A trained student as a folder that transformers, vLLM and llama.cpp load: weights, tokenizer, template, defaults.

Or its adapters alone, as a folder that PEFT and vLLM load onto their base."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.vocabulary import check_vocabulary
from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.folder import complete_folder
from student.lora import save_adapters


def export(
    folder: str | Path,
    model: Qwen3,
    tokenizer: ChatTokenizer,
    generation: Mapping[str, Any] | None = None,
    *,
    dtype: DTypeLike | None = None,
    adapters_of: str | Path | None = None,
    own: Collection[str] | None = None,
) -> list[str]:
    """Write model and tokenizer; the folder appears under its name once it is complete.

    Args:
        folder: A new, empty or model folder; a model that is already there is replaced.
        generation: Sampling defaults for generation_config.json in transformers' names, such as temperature and
            top_p. End and padding tokens are the tokenizer's unless given here.
        dtype: What weights are stored as; None keeps the model's dtype. Adapters are merged in float32 and rounded to
            this once: bfloat16 has been seen to move a logit by 3 % of the logits' standard deviation, float32 by 3e-6.
        adapters_of: The folder of the base: write the adapters alone, as PEFT loads them, instead of a whole model
            with the adapters merged.
        own: The files in `folder` that may be replaced; everything else there stays as it is. None: the folder is a
            model's, all of which may.

    Returns:
        The files that were written, by their paths in the folder; none in the processes that do not write.

    Raises:
        UserError: The folder cannot be written, or the tokenizer has more entries than the model.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    ends = {"eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    if model.config.bos_token_id is not None:
        ends["bos_token_id"] = model.config.bos_token_id

    def save_weights(folder: Path) -> None:
        if adapters_of is None:
            hf.save(folder, model, dtype=dtype)
        else:
            save_adapters(folder, model, adapters_of, dtype)

    if jax.process_index() != 0:
        save_weights(Path(folder))  # writes nothing here, but the first process needs this one's part
        return []
    with complete_folder(folder, own) as partial:
        save_weights(partial)
        tokenizer.save(partial)
        content = json.dumps(ends | dict(generation or {}), indent=2)
        (partial / "generation_config.json").write_text(content + "\n")
        return sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
