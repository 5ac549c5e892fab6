"""Tokenizer files: reading them from a checkpoint folder, copying them to an export, making a small one from text.

The folder's own files stay the truth: they are kept as bytes and written back as bytes, so that an export tokenizes
for every other program as the original did.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen3.errors import UserError
from qwen3.field_types import MOST, shown
from qwen3.folder import check_whole_model
from qwen3.json_fields import parse_object, read_object

_REQUIRED_FILES = ("tokenizer.json", "tokenizer_config.json")
_OPTIONAL_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_TEMPLATES_FOLDER = "additional_chat_templates"
"""Where transformers keeps the templates that have names; other folders it does not read."""

# Qwen2's and Qwen3's: contractions, words with at most one leading sign, single digits, signs, line ends, blanks.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
_SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|{kind}_{side}|>" for kind in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Content rather than control: decoding with skip_special_tokens keeps these.
_CONTENT_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
MIN_VOCABULARY = 256 + len(_SPECIAL_TOKENS) + len(_CONTENT_TOKENS)
"""All bytes and Qwen3's 26 added tokens: the smallest vocabulary that encodes any text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a checkpoint folder says about its tokenizer."""

    folder: Path
    contents: Mapping[str, bytes]
    """The files as found, by name relative to the folder."""
    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    """Text by role, such as eos_token and pad_token; roles that the folder leaves empty are absent."""
    templates: Mapping[str, str]
    """Chat templates by name; the usual one is "default"."""

    def save(self, folder: str | Path) -> None:
        """Writes the files byte for byte into `folder`, which is made if needed.

        Raises:
            UserError: The folder cannot be written.
        """
        _write(Path(folder), self.contents)


def read_tokenizer(folder: str | Path) -> TokenizerFiles:
    """Reads tokenizer.json, tokenizer_config.json and the files beside them.

    Template files win over the templates in tokenizer_config.json, as in transformers: chat_template.jinja is the
    usual one, and those in additional_chat_templates/ are known by their names.

    Raises:
        UserError: A file is missing or malformed, or the two disagree about the id of an added token.
    """
    folder = Path(folder)
    contents = _read_files(folder)
    config = parse_object(folder / "tokenizer_config.json", contents["tokenizer_config.json"])
    special_tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in contents:
            special_tokens |= _special_tokens(parse_object(folder / name, contents[name]))
    tokenizer = _build(folder, contents["tokenizer.json"], config)
    return TokenizerFiles(
        folder=folder,
        contents=contents,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        templates=_templates(folder, contents, config),
    )


def tokenizer_paths(folder: str | Path) -> list[Path]:
    """The files in `folder` that `read_tokenizer` reads: those of them that are there."""
    named = [Path(folder) / name for name in (*_REQUIRED_FILES, *_OPTIONAL_FILES)]
    return [path for path in (*named, *sorted((Path(folder) / _TEMPLATES_FOLDER).glob("*.jinja"))) if path.is_file()]


def stop_ids_of_generation(folder: str | Path) -> tuple[int, ...]:
    """The eos_token_id entries of generation_config.json; empty where the folder has no such file or entry.

    Raises:
        UserError: The file is malformed or the entry is neither an id nor a list of ids.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return ()
    ids = read_object(path, "name a folder in Hugging Face format").get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(one) is int and 0 <= one <= MOST for one in ids):
        raise UserError(f"{path}: eos_token_id is {shown(ids)}; expected a token id or a list of token ids")
    return tuple(ids)


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> int:
    """Makes a Qwen3-like tokenizer from text and writes it where transformers loads it too.

    Same normaliser, digit by digit splitting, added tokens and chat template as Qwen3, and every byte in the
    vocabulary, so that any text encodes. Depends on the texts only, not on chance.

    Args:
        texts: The text to learn merges from; added tokens in it separate, they are not learned from.
        vocab_size: The most entries wanted, added tokens included; at least `MIN_VOCABULARY`.
        folder: Gets tokenizer.json and tokenizer_config.json.

    Returns:
        Entries of the vocabulary: fewer than `vocab_size` where the text runs out of repeated pairs.

    Raises:
        UserError: vocab_size is below `MIN_VOCABULARY`, or the folder cannot be written.
    """
    if vocab_size < MIN_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size}: bytes and added tokens alone need {MIN_VOCABULARY}; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = (*_SPECIAL_TOKENS, *_CONTENT_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(added, texts), trainer)
    # Added afterwards, they follow the learned entries, as in Qwen3.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in _CONTENT_TOKENS])
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [token for token in _SPECIAL_TOKENS if token != END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in _SPECIAL_TOKENS,
            }
            for token in added
        },
        "chat_template": resources.files("qwen3.chat").joinpath("chat_template.jinja").read_text(encoding="utf-8"),
    }
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    _write(Path(folder), contents)
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _without(tokens: Iterable[str], texts: Iterable[str]) -> Iterator[str]:
    pattern = re.compile("|".join(re.escape(token) for token in tokens))
    for text in texts:
        yield from pattern.split(text)


def _read_files(folder: Path) -> dict[str, bytes]:
    for name in _REQUIRED_FILES:
        path = folder / name
        if not path.is_file():
            check_whole_model(folder)
            raise UserError(
                f"{path}: not found; a model folder needs {' and '.join(_REQUIRED_FILES)} "
                "(transformers' AutoTokenizer.save_pretrained writes both)"
            )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in tokenizer_paths(folder)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for role, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(text, str):
            tokens[role] = text
    return tokens


def _build(folder: Path, content: bytes, config: Mapping[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    parse_object(path, content)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer ({error}); fetch the file again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        declared = {int(key): AddedToken(**token) for key, token in config.get("added_tokens_decoder", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: malformed added_tokens_decoder ({error}); fetch the file again"
        ) from error
    for token_id, token in sorted(declared.items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise UserError(
                f"{folder}: tokenizer_config.json gives {token.content!r} the id {token_id}, tokenizer.json "
                f"{tokenizer.token_to_id(token.content)}; take both files from the same checkpoint"
            )
    return tokenizer


def _templates(folder: Path, contents: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    declared = config.get("chat_template")
    if declared is None:
        templates = {}
    elif isinstance(declared, str):
        templates = {"default": declared}
    else:
        try:
            templates = {entry["name"]: entry["template"] for entry in declared}
            if not all(isinstance(text, str) for pair in templates.items() for text in pair):
                raise TypeError
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of "
                '{"name", "template"}; take the file of the original model'
            ) from error
    files = {}
    for name, content in contents.items():
        if name.endswith(".jinja"):
            try:
                files["default" if name == "chat_template.jinja" else Path(name).stem] = content.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{folder / name}: not UTF-8 ({error}); fetch the file again") from error
    return files or templates


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror}); choose a writable folder") from error
