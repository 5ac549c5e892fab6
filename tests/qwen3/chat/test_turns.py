"""Modes, ends of turns and responses of templates and tokenizers that are not Qwen3's."""

import json
import string
from datetime import datetime
from importlib import resources

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from qwen3.chat.chat import ChatTokenizer
from qwen3.chat.tokenizer import train_byte_level_bpe
from qwen3.chat.turns import Turns
from qwen3.errors import UserError
from qwen3.rollout import MODES, NON_THINKING, THINKING

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
QWEN3 = resources.files("qwen3.chat").joinpath("chat_template.jinja").read_text(encoding="utf-8")
_SWITCH = QWEN3.rindex("    {%- if enable_thinking")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
# Templates in the form of other families': the modes that they have, and their prompts' last line in each.
TEMPLATES = {
    "Qwen3": (QWEN3, MODES),
    "Qwen3 Instruct 2507": (QWEN3[:_SWITCH] + "{%- endif %}", (NON_THINKING,)),
    "Qwen3 Thinking 2507": (QWEN3[:_SWITCH] + "{{- '<think>\n' }}{%- endif %}", (THINKING,)),
    "Qwen3.5": (
        CHATML + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}",
        MODES,
    ),
    "SmolLM2": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
        + CHATML
        + "{% endif %}",
        (NON_THINKING,),
    ),
    "SmolLM3": (
        "{{ '<|im_start|>system\nReasoning mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}"
        + CHATML
        + "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}",
        MODES,
    ),
    "always an empty block": (CHATML + "{{ '<think>\n\n</think>\n\n' }}{% endif %}", (NON_THINKING,)),
    "DeepSeek V3.1": (CHATML + "{{ '<think>' if thinking else '</think>' }}{% endif %}", (NON_THINKING,)),
    "a system turn tells the mode": (
        "{{ '<|im_start|>system\ndetailed thinking ' + ('on' if enable_thinking else 'off') + '<|im_end|>\n' }}"
        + CHATML
        + "{% endif %}",
        MODES,
    ),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|vision_start|>' + m.role + '<|vision_end|>\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|vision_start|>assistant<|vision_end|>\n\n' }}{% endif %}",
        (NON_THINKING,),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe([f"What is {i} + {i}? The total is {2 * i}." for i in range(50)], 300, folder)
    return folder


@pytest.fixture
def with_template(folder, tmp_path):
    def change(template, **entries):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "tokenizer_config.json").read_text())
        changed = config | {"chat_template": template, "bos_token": "<|endoftext|>"} | entries
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
        return tmp_path

    return change


@pytest.mark.parametrize("name", TEMPLATES)
def test_modes_of_other_families(name, with_template):
    template, modes = TEMPLATES[name]
    tokenizer = ChatTokenizer.from_folder(with_template(template))
    assert tokenizer.modes == modes
    for mode in MODES:
        if mode in modes:
            assert tokenizer.prompt_ids(QUESTION, mode)
        else:
            with pytest.raises(UserError, match=r"the chat template (has no thinking|always opens).*; ask in \w+ mode"):
                tokenizer.prompt_ids(QUESTION, mode)


def test_without_tokens_or_template_there_is_no_mode(folder, with_template):
    tokenizer = ChatTokenizer.from_folder(with_template(None))
    assert tokenizer.modes == ()
    with pytest.raises(UserError, match="no chat template; add"):
        tokenizer.check_mode(THINKING)
    with pytest.raises(UserError, match=r'neither text nor a list of \{"name", "template"\}'):
        ChatTokenizer.from_folder(with_template([{"name": "rag", "template": "x"}, {"name": 5, "template": "y"}]))
    named = ChatTokenizer.from_folder(with_template([{"name": "rag", "template": "x"}]))
    assert named.modes == ()
    with pytest.raises(UserError, match="no chat template but rag; add"):
        named.check_mode(NON_THINKING)


@pytest.mark.parametrize(
    "template",
    ["", "hello", "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"],
)
def test_a_template_that_shows_no_question_is_refused(with_template, template):
    tokenizer = ChatTokenizer.from_folder(with_template(template))
    with pytest.raises(UserError, match="does not show the text of a user's turn; take one for texts"):
        tokenizer.prompt_ids(QUESTION, NON_THINKING)


def test_without_added_tokens_no_turn_has_an_end():
    turns = Turns.of(lambda messages, **_: "".join(f"{one['content']}\n" for one in messages), (), "here")
    assert (turns.end, turns.end_token) == (None, None)


@pytest.mark.parametrize("filters", ["lower", "upper", "trim", "replace('\n', ' ')"])
def test_what_a_template_does_to_texts_hides_no_end(with_template, filters):
    template = CHATML.replace("m['content']", f"m['content'] | {filters}") + "{% endif %}"
    tokenizer = ChatTokenizer.from_folder(with_template(template))
    assert tokenizer.decode(tokenizer.response_ids(None, "4", NON_THINKING)) == "4<|im_end|>"
    silent = "{% for m in messages if m.role == 'user' %}{{ '<|im_end|>' + m.content }}{% endfor %}"
    with pytest.raises(UserError, match="ends no turn with a special token"):
        ChatTokenizer.from_folder(with_template(silent)).response_ids(None, "4", NON_THINKING)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_response_are_what_transformers_makes_of_the_conversation(name, with_template):
    template, modes = TEMPLATES[name]
    folder = with_template(template)
    tokenizer, theirs = ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    if NON_THINKING not in modes or name in ("DeepSeek V3.1", "always an empty block", "Qwen3.5", "SmolLM3"):
        return  # their conversations are not what their prompts begin
    ids = tokenizer.prompt_ids(QUESTION, NON_THINKING) + tokenizer.response_ids(None, "4", NON_THINKING)
    whole = [*QUESTION, {"role": "assistant", "content": "4"}]
    expected = theirs.apply_chat_template(whole, enable_thinking=False, return_dict=False)
    if name == "Qwen3 Instruct 2507":
        # Its template shows an empty block before a last answer, which no prompt has and the model never writes.
        expected = tokenizer.encode(tokenizer.decode(expected).replace("<think>\n\n</think>\n\n", ""))
    assert ids == expected[: len(ids)]
    assert tokenizer.decode(ids[-1:]) == "<|im_end|>"


def test_a_base_checkpoint_stops_where_its_turns_end(with_template):
    tokenizer = ChatTokenizer.from_folder(with_template(QWEN3, eos_token="<|endoftext|>"))
    stopping = tokenizer.stopping_at_turns()
    assert tokenizer.decode(tokenizer.eos_ids) == "<|endoftext|>"
    assert tokenizer.decode(stopping.eos_ids) == "<|endoftext|><|im_end|>"
    assert stopping.stopping_at_turns().eos_ids == stopping.eos_ids
    assert stopping.pad_id == tokenizer.pad_id
    # What ends no turn or has no turns stops as before.
    for template in (None, "{{ messages[0].content }}", "{{ messages[-1].content }}!"):
        plain = ChatTokenizer.from_folder(with_template(template))
        assert plain.stopping_at_turns().eos_ids == plain.eos_ids


def test_the_date_of_a_template_is_the_one_that_is_given(with_template):
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'Today Date: ' + date_string + '\n' }}" + CHATML + "{% endif %}"
    )
    folder = with_template(dated)
    began = datetime(2024, 2, 29, 23, 59, 59)
    prompt = ChatTokenizer.from_folder(folder, now=began).prompt_ids(QUESTION, NON_THINKING)
    assert ChatTokenizer.from_folder(folder).decode(prompt).startswith("Today Date: 29 Feb 2024\n")
    assert prompt == ChatTokenizer.from_folder(folder, now=began).prompt_ids(QUESTION, NON_THINKING)


# As Llama 2's tokenizer was published, and as newer sentencepiece-style ones are.
SENTENCEPIECE = {
    "normaliser": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=True)),
    "never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=True)),
}
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LINES = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ':\n' + m.content + (eos_token if m.role == 'assistant' else '')"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.fixture(params=SENTENCEPIECE)
def sentencepiece(request, tmp_path):
    normalizer, pre_tokenizer = SENTENCEPIECE[request.param]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=tokens, initial_alphabet=list(string.printable[:95]), show_progress=False
    )
    texts = [f"[INST] What is {i} + {i}? [/INST] The total is {2 * i}. user: assistant: think" for i in range(50)]
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])

    def with_template(template):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return tmp_path

    return with_template


@pytest.mark.parametrize("template", [LLAMA_2, LINES])
@pytest.mark.parametrize("answer", ["4", "The total is 4.", "x = 2\n\n - y", "é"])
def test_sentencepiece_responses_have_the_tokens_that_they_have_behind_a_prompt(sentencepiece, template, answer):
    folder = sentencepiece(template)
    tokenizer, theirs = ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    whole = [*QUESTION, {"role": "assistant", "content": answer}]
    ids = tokenizer.prompt_ids(QUESTION, NON_THINKING) + tokenizer.response_ids(None, answer, NON_THINKING)
    assert ids == theirs.apply_chat_template(whole, return_dict=False)[: len(ids)]
    assert tokenizer.tokens_by_id()[ids[-1]] == "</s>"


def test_a_response_that_would_merge_with_its_prompt_stays_apart_from_it(sentencepiece):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    tokenizer = ChatTokenizer.from_folder(
        sentencepiece(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    )
    ids = tokenizer.prompt_ids(QUESTION, NON_THINKING) + tokenizer.response_ids(None, "The total", NON_THINKING)
    assert tokenizer.decode(ids).endswith("assistant: The total</s>")


def test_the_stop_text_begins_with_its_line_ends(sentencepiece):
    tokenizer = ChatTokenizer.from_folder(sentencepiece(LINES))
    text = tokenizer.decode([*tokenizer.encode("so"), *tokenizer.stop_thinking_ids])
    assert text.startswith("so\n\nConsidering the limited time")


def test_a_tokenizer_that_merges_all_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ':') }}{% endfor %}"
    config = {"eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTokenizer.from_folder(tmp_path).encode("ab cd") == [0]
    with pytest.raises(UserError, match="merges 'four</s>' with whatever stands before it"):
        ChatTokenizer.from_folder(tmp_path).response_ids(None, "four", NON_THINKING)
