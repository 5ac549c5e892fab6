"""A teacher of a few texts by heart: after each token of a text it expects the next, and is nearly sure of it.

Its head knows which token follows each; attention adds a little, so that log-probabilities depend on the context."""

import itertools
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from tokenizers import AddedToken, Tokenizer

from qwen3.chat.chat import STOP_THINKING_TEXT, ChatTokenizer
from qwen3.chat.tokenizer import MIN_VOCABULARY, train_byte_level_bpe
from qwen3.checkpoint import hf
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from tests.teacher.serving import ARCHITECTURE

THINKING = "\nBoth are small.\n"
SAID = "\n\nI add."
CALL = '\n{"name": "add", "arguments": {"terms": [2, 3], "label": "ü"}}\n'
ANSWER = "Hi ü🙂wxyz"
_MERGED = 40
_WIDTH, _SURE = 64, 0.3


def make_reciting_folder(folder: Path) -> str:
    """As a Hugging Face folder named reciting. Behind an opened turn it thinks, says something and calls a tool; behind
    a think block that is closed, or an "H", it recites `ANSWER`."""
    path, texts = folder / "reciting", folder / "tokenizer"
    train_byte_level_bpe([STOP_THINKING_TEXT, *["\n\n"] * 20] * 9, MIN_VOCABULARY + _MERGED, texts)
    whole = Tokenizer.from_file(str(texts / "tokenizer.json"))
    whole.add_tokens([AddedToken(text, normalized=False) for text in (THINKING, SAID, CALL)])
    whole.save(str(texts / "tokenizer.json"))
    tokenizer = ChatTokenizer.from_folder(texts)
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": _WIDTH, "max_position_embeddings": 1024}
    weights = {"initializer_range": 0.02, "tie_word_embeddings": False}
    config = ModelConfig.from_hf(ARCHITECTURE | sizes | weights)
    hf.save(path, jax.jit(lambda: Qwen3(config, jax.random.key(0)))())
    tokenizer.save(path)
    embed = np.random.default_rng(0).normal(size=(config.vocab_size, _WIDTH)).astype(np.float32)
    head = np.zeros_like(embed)
    called = ["\n", "<think>", THINKING, "</think>", SAID, "<tool_call>", CALL, "</tool_call>", "<|im_end|>"]
    for text in ("".join(called), f"\n\n{ANSWER}<|im_end|>"):
        for one, following in itertools.pairwise(tokenizer.encode(text)):
            head[following] += _SURE * embed[one]
    file = path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return str(path)
