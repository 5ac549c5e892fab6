"""Prompts, modes, flags, stop text and splitting, on a tokenizer trained here and loaded beside transformers' own."""

import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qwen3.chat.chat import (
    MODE_FLAGS,
    STOP_THINKING_TEXT,
    ChatTokenizer,
    join_response,
    last_flag,
    split_response,
    with_flag,
)
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.chat.vocabulary import check_same_vocabulary, check_vocabulary
from qwen3.errors import UserError
from qwen3.rollout import MODES, NON_THINKING, THINKING

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1? /no_think"},
    {"role": "assistant", "content": "<think>\n\n</think>\n\n2"},
    {"role": "user", "content": "2 + 2? /think"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([f"What is {i} + {i}? The total is {2 * i}." for i in range(50)], 300, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer.from_folder(folder)


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder with other entries in tokenizer_config.json; None removes one."""

    def change(**entries):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "tokenizer_config.json").read_text()) | entries
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return change


@pytest.fixture
def without_thinking_tokens(changed):
    folder = changed()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"content": "<think>"', '"content": "<other>"'))
    return ChatTokenizer.from_folder(folder)


def test_prompts_equal_transformers(folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in (QUESTION, HISTORY):
        for tools in (None, TOOLS):
            for mode in MODES:
                expected = theirs.apply_chat_template(
                    messages,
                    tools=tools,
                    add_generation_prompt=True,
                    enable_thinking=mode == THINKING,
                    return_dict=False,
                )
                assert tokenizer.prompt_ids(messages, mode, tools=tools) == expected


def test_ids(tokenizer):
    assert tokenizer.vocab_size == max(tokenizer.tokens_by_id()) + 1
    assert [tokenizer.decode([one]) for one in tokenizer.eos_ids] == ["<|im_end|>"]
    assert tokenizer.decode([tokenizer.pad_id]) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.think_start_id, tokenizer.think_end_id]) == "<think></think>"
    assert tokenizer.turn_end_id == tokenizer.eos_ids[0]


def test_decoding(tokenizer):
    ids = tokenizer.encode("<|im_start|>a<think>b</think><tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b</think><tool_call>"
    # Models pad their embedding, so a sampler can pick ids without text.
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 5]) == "a"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("messages", [QUESTION, HISTORY])
def test_prompt_and_response_make_the_whole_conversation(tokenizer, messages, mode):
    thinking = "Two and two." if mode == THINKING else None
    answer = {"role": "assistant", "content": "4", "reasoning_content": thinking}
    ids = tokenizer.prompt_ids(messages, mode) + tokenizer.response_ids(thinking, "4", mode)
    assert tokenizer.decode(ids) + "\n" == tokenizer.render([*messages, answer])


def test_response_needs_thinking_just_in_thinking_mode(tokenizer):
    assert tokenizer.decode(tokenizer.response_ids("", "4", THINKING)) == "<think>\n\n</think>\n\n4<|im_end|>"
    with pytest.raises(ValueError, match="non_thinking mode"):
        tokenizer.response_ids("x", "4", NON_THINKING)
    with pytest.raises(ValueError, match="in thinking mode"):
        tokenizer.response_ids(None, "4", THINKING)


def test_earlier_thinking_is_not_rendered(tokenizer):
    first = {"role": "assistant", "content": "4", "reasoning_content": "SECRET"}
    assert "SECRET" in tokenizer.render([*QUESTION, first])
    assert "SECRET" not in tokenizer.render([*QUESTION, first, {"role": "user", "content": "Sure?"}])


def test_stop_thinking_text(tokenizer):
    assert STOP_THINKING_TEXT == (
        "\n\nConsidering the limited time by the user, I have to give the solution "
        "based on the thinking directly now.\n</think>\n\n"
    )
    ids = list(tokenizer.stop_thinking_ids)
    assert tokenizer.decode(ids) == STOP_THINKING_TEXT
    assert ids.count(tokenizer.think_end_id) == 1
    thinking, answer = split_response("<think>\nhm" + STOP_THINKING_TEXT + "4")
    assert (thinking.startswith("hm\n\nConsidering"), answer) == (True, "4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", (None, "4")),
        ("<think>\nwhy\n</think>\n\n4", ("why", "4")),
        ("<think>\n\n</think>\n\n4", ("", "4")),
        ("\n<think>a\n\nb</think>4\n", ("a\n\nb", "4\n")),
        ("why\n</think>\n\n4", ("why", "4")),
        ("<think>\nwhy", ("why", "")),
        ("<think>a</think>b</think>c", ("a</think>b", "c")),
        ("4 <think>", (None, "4 <think>")),
        ("", (None, "")),
    ],
)
def test_splitting(text, expected):
    assert split_response(text) == expected


def test_splitting_what_started_in_thinking():
    assert split_response("why", started_in_thinking=True) == ("why", "")
    assert split_response("why\n</think>\n\n4", started_in_thinking=True) == ("why", "4")


@pytest.mark.parametrize("thinking", [None, "", "a", "a\n\nb"])
def test_joining_inverts_splitting(thinking):
    assert split_response(join_response(thinking, "4\n5")) == (thinking, "4\n5")


def test_splitting_ids(tokenizer):
    ids = tokenizer.response_ids("why", "4", THINKING)
    assert tokenizer.split_response_ids(ids, THINKING) == ("why", "4")
    assert tokenizer.split_response_ids(ids[:-3], THINKING)[1] == ""
    assert tokenizer.split_response_ids(tokenizer.response_ids(None, "4", NON_THINKING), NON_THINKING) == (None, "4")


def test_flags():
    assert with_flag("2 + 2?", "no_think") == "2 + 2? /no_think"
    assert last_flag(HISTORY) == "think"
    assert last_flag(HISTORY[:-1]) == "no_think"
    assert last_flag(QUESTION) is None
    assert last_flag([{"role": "user", "content": with_flag("/think", MODE_FLAGS[NON_THINKING])}]) == "no_think"
    assert last_flag([{"role": "system", "content": "/no_think"}, *QUESTION]) == "no_think"
    # What an assistant or a tool says switches nothing.
    assert last_flag([*QUESTION, {"role": "assistant", "content": "/think"}, {"role": "tool", "content": None}]) is None


@pytest.mark.parametrize(
    "text", ["see /thinking", "a/think/b", "/think/x", "x.org/no_think", "/think-tank", "</think>"]
)
def test_not_flags(text):
    assert last_flag([{"role": "user", "content": text}]) is None


@pytest.mark.parametrize("text", ["/think", "Go (/think).", "/no_think /think!", "a\n/think\nb"])
def test_flags_before_punctuation(text):
    assert last_flag([{"role": "user", "content": text}]) == "think"


def test_stop_tokens_of_generation_follow_the_tokenizers_own(changed, tokenizer):
    folder = changed(pad_token=None)
    end, other = tokenizer.encode("<|im_end|><|endoftext|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}))
    with_both = ChatTokenizer.from_folder(folder)
    assert with_both.eos_ids == (end, other)
    assert with_both.pad_id == end


def test_base_checkpoints_end_turns_with_another_token(changed):
    tokenizer = ChatTokenizer.from_folder(changed(eos_token="<|endoftext|>"))
    assert tokenizer.decode(tokenizer.eos_ids) == "<|endoftext|>"
    assert tokenizer.decode([tokenizer.turn_end_id]) == "<|im_end|>"


def test_no_end_token(changed):
    with pytest.raises(UserError, match="no end token"):
        ChatTokenizer.from_folder(changed(eos_token=None))


def test_special_token_outside_the_vocabulary(changed):
    with pytest.raises(UserError, match=r"eos_token '<end>' is not in tokenizer\.json"):
        ChatTokenizer.from_folder(changed(eos_token="<end>"))


def test_missing_template(changed):
    tokenizer = ChatTokenizer.from_folder(changed(chat_template=None))
    assert tokenizer.decode(tokenizer.encode("raw text")) == "raw text"
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render(QUESTION)


def test_tool_template_where_there_is_one(changed):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = ChatTokenizer.from_folder(changed(chat_template=named))
    assert (tokenizer.render(QUESTION), tokenizer.render(QUESTION, tools=TOOLS)) == ("plain", "1")


def test_templates_write_the_special_tokens(changed):
    named = changed(bos_token="<|endoftext|>", chat_template="{{ bos_token }}{{ eos_token }}{{ messages[0].content }}")
    assert ChatTokenizer.from_folder(named).render([{"role": "user", "content": "a"}]) == "<|endoftext|><|im_end|>a"


def test_encoding_adds_nothing(changed, tokenizer):
    folder = changed()
    start = tokenizer.tokens_by_id()[tokenizer.pad_id], tokenizer.pad_id
    file = json.loads((folder / "tokenizer.json").read_text())
    adding = TemplateProcessing(single=f"{start[0]} $A", pair=None, special_tokens=[start])
    file["post_processor"] = json.loads(adding.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert ChatTokenizer.from_folder(folder).encode("a") == tokenizer.encode("a")


def test_template_without_turn_end(changed):
    tokenizer = ChatTokenizer.from_folder(changed(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(UserError, match="ends no turn"):
        _ = tokenizer.turn_end_id


def test_thinking_needs_its_tokens(without_thinking_tokens):
    assert without_thinking_tokens.think_start_id is None
    for refused in (
        lambda: without_thinking_tokens.prompt_ids(QUESTION, THINKING),
        lambda: without_thinking_tokens.stop_thinking_ids,
    ):
        with pytest.raises(UserError, match="<think> and </think> as tokens"):
            refused()
    without_thinking_tokens.prompt_ids(QUESTION, NON_THINKING)


def test_thinking_only_checkpoints(changed, tokenizer):
    source = json.loads((changed() / "tokenizer_config.json").read_text())["chat_template"]
    opened = source[: source.rindex("{%- if enable_thinking")] + "{{- '<think>\\n' }}{%- endif %}"
    thinker = ChatTokenizer.from_folder(changed(chat_template=opened))
    assert thinker.starts_in_thinking(THINKING)
    assert not tokenizer.starts_in_thinking(THINKING)
    ids = thinker.response_ids("why", "4", THINKING)
    assert thinker.prompt_ids(QUESTION, THINKING) + ids == (
        tokenizer.prompt_ids(QUESTION, THINKING) + tokenizer.response_ids("why", "4", THINKING)
    )
    assert thinker.split_response_ids(ids, THINKING) == ("why", "4")
    assert thinker.split_response_ids(ids[:2], THINKING)[1] == ""
    with pytest.raises(UserError, match="non_thinking mode is not possible"):
        thinker.prompt_ids(QUESTION, NON_THINKING)


def test_unknown_mode(tokenizer):
    with pytest.raises(UserError, match="mode 'think': unknown"):
        tokenizer.prompt_ids(QUESTION, "think")


def test_save(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, tokenizer.vocab_size + 64)
    with pytest.raises(UserError, match=rf"{tokenizer.vocab_size} entries, .* {tokenizer.vocab_size - 1};"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_vocabularies_must_agree(folder, tokenizer, tmp_path):
    check_same_vocabulary(tokenizer, ChatTokenizer.from_folder(folder))
    train_byte_level_bpe(["other words make other entries " * 9], 300, tmp_path)
    with pytest.raises(UserError, match=r"id 256 is 'is' to the teacher, 'er' to the student"):
        check_same_vocabulary(tokenizer, ChatTokenizer.from_folder(tmp_path))
