"""Trained tokenizers load in transformers with the same ids; a folder's files travel byte for byte or are refused."""

import json
import random

import pytest
from transformers import AutoTokenizer

from qwen3.chat.tokenizer import MIN_VOCABULARY, read_tokenizer, stop_ids_of_generation, train_byte_level_bpe
from qwen3.errors import UserError

TEXTS = [f"What is {i} + {i * 7 % 100} - {i % 9}?\n<think>\ntotal {i + 3}\n</think>\n\n{i}." for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(TEXTS, 300, folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(path, **entries):
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def random_texts(count):
    rng = random.Random(0)
    pieces = [
        *"abcXYZ 0123456789\n\r\t'<>|_/\u00a0\u3000\x00é中😀\ufffd",
        "e\u0301",
        "What is",
        "<think>",
        "<|im_end|>",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(count)]


def test_transformers_loads_it_with_the_same_ids(folder):
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_tokenizer(folder).tokenizer
    assert len(theirs) == ours.get_vocab_size(with_added_tokens=True)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    for text in [*TEXTS[:5], *random_texts(500)]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == ids
        for skip in (False, True):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip)


def test_any_text_encodes(folder):
    tokenizer = read_tokenizer(folder).tokenizer
    text = "".join(chr(code) for code in [*range(0x250), 0x4E2D, 0x1F600])
    normalized = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == normalized


def test_layout_is_qwen3s(folder):
    tokenizer = read_tokenizer(folder).tokenizer
    first = tokenizer.token_to_id("<|endoftext|>")
    added = tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(first, first + 26))
    # The published ids, counted from <|endoftext|> = 151643.
    published = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<tool_call>": 151657}
    published |= {"<|fim_prefix|>": 151659, "</tool_response>": 151666, "<think>": 151667, "</think>": 151668}
    assert {token: tokenizer.token_to_id(token) - first + 151643 for token in published} == published
    special = {token.content for token in added.values() if token.special}
    assert len(special) == 14
    assert not special & {"<think>", "</think>", "<tool_call>", "</tool_response>"}


def test_digits_stay_single_and_markers_unlearned(folder):
    tokenizer = read_tokenizer(folder).tokenizer
    assert [len(token) for token in tokenizer.encode("1234567").tokens] == [1] * 7
    learned = set(tokenizer.get_vocab(with_added_tokens=False))
    assert not {"think", "Ġthink", "<th", "hin"} & learned


def test_training_is_deterministic(folder, tmp_path):
    train_byte_level_bpe(TEXTS, 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_vocabulary_sizes(tmp_path):
    assert train_byte_level_bpe(TEXTS, MIN_VOCABULARY, tmp_path / "least") == MIN_VOCABULARY == 282
    assert train_byte_level_bpe(TEXTS, 290, tmp_path / "more") == 290
    assert train_byte_level_bpe(["ab ab"], 290, tmp_path / "few pairs") < 290
    with pytest.raises(UserError, match=r"vocab_size 281: .*282"):
        train_byte_level_bpe(TEXTS, 281, tmp_path)


def test_save_copies_bytes(copy, tmp_path):
    (copy / "chat_template.jinja").write_bytes(b"{{ 'x' }}\r\n")
    (copy / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (copy / "model.safetensors").write_text("not a tokenizer's file")
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    names.append("additional_chat_templates/tool_use.jinja")
    originals = {name: (copy / name).read_bytes() for name in names}
    files = read_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    files.save(tmp_path / "export" / "deep")
    saved = [path for path in (tmp_path / "export" / "deep").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "export" / "deep").as_posix(): path.read_bytes() for path in saved} == originals


def test_template_file_wins(copy):
    assert set(read_tokenizer(copy).templates) == {"default"}
    (copy / "chat_template.jinja").write_text("file")
    assert read_tokenizer(copy).templates == {"default": "file"}
    assert AutoTokenizer.from_pretrained(copy).chat_template == "file"


def test_named_templates(copy):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change(copy / "tokenizer_config.json", chat_template=named)
    assert read_tokenizer(copy).templates == {"default": "a", "tool_use": "b"}


def test_named_templates_as_transformers_writes_them(copy, tmp_path):
    named = {"default": "a", "tool_use": "b {{ tools | length }}", "rag": "c\n"}
    theirs = AutoTokenizer.from_pretrained(copy)
    theirs.chat_template = named
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "additional_chat_templates" / "tool_use.jinja").exists()
    files = read_tokenizer(tmp_path / "theirs")
    assert files.templates == named
    files.save(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == named
    # What is not transformers' folder, it does not read.
    (copy / "chat_templates").mkdir()
    (copy / "chat_templates" / "tool_use.jinja").write_text("d")
    assert "tool_use" not in read_tokenizer(copy).templates
    assert isinstance(AutoTokenizer.from_pretrained(copy).chat_template, str)


def test_special_tokens_from_the_map_and_as_objects(copy):
    config = copy / "tokenizer_config.json"
    change(config, eos_token=None, pad_token={"content": "<|im_end|>", "special": True})
    (copy / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}')
    assert read_tokenizer(copy).special_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}


def test_tokens_declared_only_in_the_config_are_added(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    declared = config["added_tokens_decoder"]
    new_id = max(map(int, declared)) + 1
    declared[str(new_id)] = {**declared[str(new_id - 1)], "content": "<extra>"}
    change(copy / "tokenizer_config.json", added_tokens_decoder=declared)
    assert read_tokenizer(copy).tokenizer.encode("a<extra>").ids[1:] == [new_id]
    assert AutoTokenizer.from_pretrained(copy)("a<extra>")["input_ids"][1:] == [new_id]


def test_padding_in_the_file_is_ignored(copy):
    tokenizer = read_tokenizer(copy).tokenizer
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=2)
    tokenizer.save(str(copy / "tokenizer.json"))
    assert len(read_tokenizer(copy).tokenizer.encode("1 2 3")) == 5


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, ()), ("{}", ()), ('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [7, 3]}', (7, 3))],
)
def test_stop_ids(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    assert stop_ids_of_generation(tmp_path) == expected


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"eos_token_id": "<|im_end|>"}', '{"eos_token_id": [1.5]}', '{"eos_token_id": true}'),
        *('{"eos_token_id": -1}', '{"eos_token_id": [[1]]}', f'{{"eos_token_id": {10**30}}}', '{"eos_token_id": {}}'),
        *('{"temperature": NaN}', '{"top_p": -Infinity}', '{"top_k": 1e999}', '{"top_k": 1, "top_k": 2}'),
        *('{"x": ' + "[" * 100_000, '{"x": ' + "[" * 500 + "]" * 500 + "}", '{"x": ' + "9" * 5000 + "}"),
    ],
)
def test_bad_generation_config(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json(:| is not| holds| has| nests) .*"):
        stop_ids_of_generation(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_or_malformed_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    for bad in (content[:-20], b"[1]", b"\xff\xfe"):
        (copy / name).write_bytes(bad)
        with pytest.raises(UserError, match=rf"{name} .*fetch"):
            read_tokenizer(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: not found"):
        read_tokenizer(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "[" * 100_000, "[" * 200 + "]" * 200, "9" * 5000])
def test_what_other_programs_could_not_read_is_named(copy, name, value):
    content = (copy / name).read_text().rstrip()
    (copy / name).write_text(f'{content[:-1]}, "added": {value}}}')
    with pytest.raises(UserError, match=rf"{name} (holds|nests|is not valid JSON)") as caught:
        read_tokenizer(copy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_json_that_is_no_tokenizer(copy):
    (copy / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        read_tokenizer(copy)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"added_tokens_decoder": {"5": {"content": "<think>"}}}, "'<think>' the id 5, tokenizer.json "),
        ({"added_tokens_decoder": {"x": {"content": "<think>"}}}, "malformed added_tokens_decoder"),
        ({"added_tokens_decoder": [1]}, "malformed added_tokens_decoder"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is neither"),
        ({"chat_template": 3}, "chat_template is neither"),
    ],
)
def test_bad_config_entries_are_refused(copy, entries, told):
    change(copy / "tokenizer_config.json", **entries)
    with pytest.raises(UserError, match=told):
        read_tokenizer(copy)


def test_template_file_that_is_not_text(copy):
    (copy / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8"):
        read_tokenizer(copy)


def test_unwritable_folder(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/tokenizer\.json: cannot write"):
        read_tokenizer(folder).save(tmp_path / "file")
