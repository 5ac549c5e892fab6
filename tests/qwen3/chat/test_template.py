"""Renderings equal Qwen3's own template and transformers' renderer; bad templates and messages end in one line."""

import hashlib
import json
import threading
from datetime import datetime
from importlib import resources

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwen3.chat import sandbox
from qwen3.chat.template import ChatTemplate
from qwen3.errors import UserError

SOURCE = resources.files("qwen3.chat").joinpath("chat_template.jinja").read_text(encoding="utf-8")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Sum of <a> & 'b' – é",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content):
    return {"role": "tool", "content": content}


def calls(*arguments):
    return [{"type": "function", "function": {"name": "add", "arguments": one}} for one in arguments]


PROMPT = {"add_generation_prompt": True}
NO_THINKING = {"add_generation_prompt": True, "enable_thinking": False}

# name: (messages, tools, options)
CONVERSATIONS = {
    "plain": ([user("What is 2 + 2?")], None, PROMPT),
    "plain, no prompt": ([user("What is 2 + 2?")], None, {}),
    "non-thinking": ([user("What is 2 + 2?")], None, NO_THINKING),
    "thinking said": ([user("What is 2 + 2?")], None, {"add_generation_prompt": True, "enable_thinking": True}),
    "system": ([system("Be brief."), user("Hi")], None, PROMPT),
    "empty system": ([system(""), user("Hi")], None, PROMPT),
    "late system": ([user("Hi"), system("Be rude /think"), user("Again")], None, NO_THINKING),
    "flags": ([user("2? /no_think"), assistant("<think>\n\n</think>\n\n2"), user("3? /think")], None, PROMPT),
    "earlier thinking goes": (
        [user("a"), assistant("<think>\nlong\n</think>\n\nb"), user("c"), assistant("<think>\nmore\n</think>\n\nd")],
        None,
        {},
    ),
    "earlier reasoning goes": ([user("a"), assistant("b", reasoning_content="long"), user("c")], None, PROMPT),
    "final without thinking": ([user("a"), assistant("b")], None, {}),
    "final reasoning": ([user("a"), assistant("\n\nb\n", reasoning_content="\nwhy\n")], None, {}),
    "reasoning beats block": ([user("a"), assistant("<think>x</think>b", reasoning_content="y")], None, {}),
    "empty reasoning keeps block": (
        [user("a"), assistant("<think>x</think>b", reasoning_content=""), user("c")],
        None,
        PROMPT,
    ),
    "two blocks": ([user("a"), assistant("p<think>x</think>m<think>\ny\n</think>\n\n\nb")], None, {}),
    "only an end": ([user("a"), assistant("x\n</think>\nb")], None, {}),
    "only a start": ([user("a"), assistant("<think>x"), user("c")], None, {}),
    "last is assistant, prompt": ([user("a"), assistant("b")], None, PROMPT),
    "no user": ([system("s"), assistant("<think>\nx\n</think>\n\nb")], None, {}),
    "assistant first": ([assistant("b", reasoning_content="x"), user("c")], None, PROMPT),
    "two answers": ([user("a"), assistant("b"), assistant("c", reasoning_content="z")], None, {}),
    "tools": ([user("Add 1 and 2")], TOOLS, PROMPT),
    "tools and system": ([system("Be brief."), user("Add")], TOOLS, NO_THINKING),
    "no tools": ([user("a")], [], PROMPT),
    "call": ([user("a"), assistant("", tool_calls=calls({"a": 1, "b": "<é>"}))], TOOLS, {}),
    "call as text": ([user("a"), assistant("Let me.", tool_calls=calls('{"a": 1}'))], TOOLS, {}),
    "flat call": ([user("a"), assistant("", tool_calls=[{"name": "now", "arguments": {}}])], None, {}),
    "calls and results": (
        [
            system("Be brief."),
            user("Add 1 to 2 and 3 to 4"),
            assistant("Two sums.", reasoning_content="Call twice.", tool_calls=calls({"a": 1, "b": 2}, '{"a": 3}')),
            tool("3"),
            tool("7"),
            assistant("", reasoning_content="Once more.", tool_calls=calls({"a": 3, "b": 7})),
            tool("10"),
            assistant("3 and 7, <b>10</b> together.", reasoning_content="Done."),
        ],
        TOOLS,
        {},
    ),
    "results wait": ([user("a"), assistant("", tool_calls=calls({})), tool("1"), tool("2")], TOOLS, PROMPT),
    "results then question": (
        [user("a"), assistant("", reasoning_content="r", tool_calls=calls({})), tool("1"), assistant("b"), user("c")],
        TOOLS,
        PROMPT,
    ),
    "result as user": (
        [
            user("a"),
            assistant("b", reasoning_content="kept"),
            user("<tool_response>\n1\n</tool_response>"),
            assistant("c", reasoning_content="kept too"),
        ],
        None,
        {},
    ),
    "question that quotes a result": (
        [user("a"), assistant("b", reasoning_content="goes"), user("<tool_response>1</tool_response> is right?")],
        None,
        PROMPT,
    ),
    "no tool calls": ([user("a"), assistant("b", tool_calls=[])], None, {}),
}

# Recorded from the template that Qwen3 checkpoints ship.
GOLDEN = {
    "non-thinking": ("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "system": ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    "flags": (
        "<|im_start|>user\n"
        "2? /no_think<|im_end|>\n"
        "<|im_start|>assistant\n"
        "2<|im_end|>\n"
        "<|im_start|>user\n"
        "3? /think<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "earlier thinking goes": (
        "<|im_start|>user\n"
        "a<|im_end|>\n"
        "<|im_start|>assistant\n"
        "b<|im_end|>\n"
        "<|im_start|>user\n"
        "c<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "more\n"
        "</think>\n"
        "\n"
        "d<|im_end|>\n"
    ),
    "final reasoning": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nb\n<|im_end|>\n"
    ),
    "two blocks": ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nb<|im_end|>\n"),
    "tools": (
        "<|im_start|>system\n"
        "# Tools\n"
        "\n"
        "You may call one or more functions to assist with the user query.\n"
        "\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        "<tools>\n"
        '{"type": "function", "function": {"name": "add", "description": "Sum of <a> & \'b\' – é", "p'
        'arameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "numb'
        'er"}}}}}\n'
        '{"type": "function", "function": {"name": "now", "parameters": {}}}\n'
        "</tools>\n"
        "\n"
        "For each function call, return a json object with function name and arguments within <tool"
        "_call></tool_call> XML tags:\n"
        "<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n"
        "Add 1 and 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "calls and results": (
        "<|im_start|>system\n"
        "Be brief.\n"
        "\n"
        "# Tools\n"
        "\n"
        "You may call one or more functions to assist with the user query.\n"
        "\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        "<tools>\n"
        '{"type": "function", "function": {"name": "add", "description": "Sum of <a> & \'b\' – é", "p'
        'arameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "numb'
        'er"}}}}}\n'
        '{"type": "function", "function": {"name": "now", "parameters": {}}}\n'
        "</tools>\n"
        "\n"
        "For each function call, return a json object with function name and arguments within <tool"
        "_call></tool_call> XML tags:\n"
        "<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n"
        "Add 1 to 2 and 3 to 4<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "Call twice.\n"
        "</think>\n"
        "\n"
        "Two sums.\n"
        "<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
        "</tool_call>\n"
        "<tool_call>\n"
        '{"name": "add", "arguments": {"a": 3}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n"
        "<tool_response>\n"
        "3\n"
        "</tool_response>\n"
        "<tool_response>\n"
        "7\n"
        "</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "Once more.\n"
        "</think>\n"
        "\n"
        "<tool_call>\n"
        '{"name": "add", "arguments": {"a": 3, "b": 7}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n"
        "<tool_response>\n"
        "10\n"
        "</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "Done.\n"
        "</think>\n"
        "\n"
        "3 and 7, <b>10</b> together.<|im_end|>\n"
    ),
    "result as user": (
        "<|im_start|>user\n"
        "a<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "kept\n"
        "</think>\n"
        "\n"
        "b<|im_end|>\n"
        "<|im_start|>user\n"
        "<tool_response>\n"
        "1\n"
        "</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n"
        "kept too\n"
        "</think>\n"
        "\n"
        "c<|im_end|>\n"
    ),
}
# sha256 of the JSON list of all renderings by that template.
GOLDEN_DIGEST = "63bba98819df07a20264b01ebb185d220f6e70499fb503e3360bdeb635d81e1f"


def render(name, source=SOURCE):
    messages, tools, options = CONVERSATIONS[name]
    variables = {key: value for key, value in options.items() if key == "enable_thinking"}
    prompt = options.get("add_generation_prompt", False)
    return ChatTemplate(source, "model").render(
        messages, tools=tools, add_generation_prompt=prompt, variables=variables
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_our_template_says_what_qwen3_says(name):
    assert render(name) == GOLDEN[name]


def test_our_template_equals_qwen3_on_every_conversation():
    renderings = [render(name) for name in CONVERSATIONS]
    assert hashlib.sha256(json.dumps(renderings).encode()).hexdigest() == GOLDEN_DIGEST


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_transformers(name):
    messages, tools, options = CONVERSATIONS[name]
    [expected], _ = render_jinja_template([messages], tools=tools, chat_template=SOURCE, **options)
    assert render(name) == expected


# What other families' templates use beyond Qwen3's.
OTHER_TEMPLATES = {
    "generation": "{% for m in messages %}\n  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}\nend",
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages | tojson(ensure_ascii=True) }}",
    "date": "{{ strftime_now('%Y') }}",
    "variables": "{{ tools is none }}{{ documents is defined }}{{ enable_thinking is defined }}{{ eos_token }}",
    "aliases": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{{ m.reasoning }};{% endfor %}",
    "sums and products": "{{ 'a' + 'b' * 2 }}{{ 2 ** 10 + 3 * 4 }}{{ 1.5 * 2 }}{{ [1] + [2] * 2 }}{{ 1 ~ none ~ 'a' }}",
    "loops that filter": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "filters in filters": "{{ messages | map(attribute='role') | select('equalto', 'user') | map('upper') | join }}",
    "macros": "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for m in messages %}{{ f(m.role) }}{% endfor %}",
    "blocks": "{% block a %}{{ messages | length }}{% endblock %}{{ self.a() }}",
    "absent": "{% for m in messages %}{{ m.tool_calls is defined }}{% endfor %}",
}


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_other_families_equal_transformers(name):
    messages = [user("<é> & 'x'"), {"role": "assistant", "content": "b", "reasoning": "why"}, user("c")]
    source = OTHER_TEMPLATES[name]
    [expected], _ = render_jinja_template([messages], tools=TOOLS, chat_template=source, eos_token="<e>")
    rendered = ChatTemplate(source, "model").render(messages, tools=TOOLS, variables={"eos_token": "<e>"})
    assert rendered == expected


def test_none_counts_as_absent():
    with_none = assistant("b", reasoning_content=None, tool_calls=None)
    source = OTHER_TEMPLATES["absent"]
    assert ChatTemplate(source, "model").render([with_none]) == "False"
    # OpenAI's form of a call without text.
    silent_call = assistant(None, tool_calls=calls({}))
    expected = ChatTemplate(SOURCE, "model").render([user("a"), assistant("", tool_calls=calls({}))])
    assert ChatTemplate(SOURCE, "model").render([user("a"), silent_call]) == expected


def test_rendering_leaves_the_messages_alone():
    messages = [user("a"), {"role": "assistant", "content": "b", "reasoning": "c", "tool_calls": None}]
    before = json.dumps(messages)
    ChatTemplate(SOURCE, "model").render(messages)
    assert json.dumps(messages) == before


def test_syntax_error_names_origin_and_line():
    with pytest.raises(UserError, match=r"models/x: chat template, line 2: "):
        ChatTemplate("ok\n{% if %}", "models/x")


NEVER_ENDING = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that drop everything": "{% for a in range(99999) if range(99999) | join | length == 0 %}{% endfor %}",
    "recursive": "{% for a in [1] recursive %}{% if loop.depth < 99 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "calls": "{% macro f() %}{% for a in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% for a in range(99999) %}{% endfor %}{% endcall %}",
    "mapped filters": "{{ ([range(99999)] * 99999) | map('list') | map('length') | list }}",
    "selecting tests": "{{ ([range(9999) | list] * 999999) | select('in', [[1]]) | list }}",
}


@pytest.mark.parametrize("name", NEVER_ENDING)
def test_a_template_that_never_ends_is_stopped_in_any_thread(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    told = []

    def render_it():
        with pytest.raises(
            UserError, match=r"models/x: the chat template does not end within .* 1 messages; take"
        ) as caught:
            ChatTemplate(NEVER_ENDING[name], "models/x").render([user("a")])
        told.append(str(caught.value))

    thread = threading.Thread(target=render_it)
    thread.start()
    thread.join()
    assert len(told) == 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 10 ** 100000000 }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_what_would_fill_the_memory_is_not_made(source):
    with pytest.raises(UserError, match=r"cannot render message 1 of 1 .*(larger than|too big|Range)"):
        ChatTemplate(source, "models/x").render([user("a")])


def test_a_conversation_has_its_time_anew(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    template = ChatTemplate("{% for a in range(1000) %}{{ messages[0].content }}{% endfor %}", "models/x")
    for _ in range(20):
        assert len(template.render([user("a")])) == 1_000


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ 1 | nothing }}",
    ],
)
def test_sources_that_do_not_compile_are_refused(source):
    with pytest.raises(UserError, match=r"models/x: chat template.*; take the original") as caught:
        ChatTemplate(source, "models/x")
    assert "\n" not in str(caught.value)


def test_an_error_of_several_lines_is_told_in_one():
    with pytest.raises(UserError, match=r"\(role 'user'\): no such role: a; correct that message$"):
        ChatTemplate("{{ raise_exception('no such\n  role: ' + messages[0].content) }}", "model").render([user("a")])


def test_the_date_is_the_one_that_is_given():
    source = "{% set date_string = strftime_now('%d %b %Y') %}Today: {{ date_string }} {{ strftime_now('%H:%M:%S') }}"
    template = ChatTemplate(source, "model", datetime(2024, 7, 26, 23, 59, 58))
    assert template.render([user("a")]) == "Today: 26 Jul 2024 23:59:58"


def test_raising_template_names_the_message():
    source = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"message 2 of 3 \(role 'tool'\): no tools"):
        ChatTemplate(source, "model").render([user("a"), tool("b"), user("c")])


def test_message_without_content_is_named():
    with pytest.raises(UserError, match=r"message 2 of 2 \(role 'user'\)"):
        ChatTemplate(SOURCE, "model").render([user("a"), {"role": "user"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_sandbox_refuses(source):
    with pytest.raises(UserError, match=r"cannot render message 1 of 1"):
        ChatTemplate(source, "model").render([user("a")])


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "without messages"),
        (["hi"], "message 1: expected"),
        ([user({1, 2})], "message 1: .*not JSON serializable"),
        ([user("a"), user(nested(10**5))], "message 2: lists and objects are nested too deeply"),
        ([user({"a": nested(10**5)})], "message 1: lists and objects are nested too deeply"),
        ([user("a"), user("half \ud83d")], "message 2: has half of a surrogate pair"),
    ],
)
def test_bad_messages_are_refused(messages, told):
    with pytest.raises(UserError, match=told):
        ChatTemplate(SOURCE, "model").render(messages)


def test_tools_are_held_to_the_same():
    with pytest.raises(UserError, match="tools: lists and objects are nested too deeply"):
        ChatTemplate(SOURCE, "model").render([user("a")], tools=[{"parameters": nested(10**5)}])
