"""The requests of the OpenAI-compatible endpoints, with the fields of vLLM 0.33 beside OpenAI's.

What is not served is here too, with the one value that changes nothing: another is refused with the field's name.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from teacher.serve.schemas import Choices, MinP, Name, Natural, Seed, Stop, Temperature, TopK, TopP

_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
ID_LISTS: dict[str, Any] = {"anyOf": [_IDS, {"type": "array", "minItems": 1, "items": _IDS}]}
PROMPTS: dict[str, Any] = {"anyOf": [{"type": "array", "minItems": 1, "items": {"type": "string"}}, *ID_LISTS["anyOf"]]}
"""What may stand in lists of which msgspec tells no more than that they are lists."""
Ids = list[Natural]
Nothing = Annotated[dict[str, Any], Meta(max_length=0)]
NoText = Annotated[list[str], Meta(max_length=0)]


class StreamOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a stream holds beside the text."""

    include_usage: bool | None = False
    """A last event with the number of tokens."""
    continuous_usage_stats: Literal[False] | None = False


class TextFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    """Text as it comes; formats that constrain it are not served."""

    type: Literal["text"]


class TextRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chats have in common."""

    model: Annotated[Name | None, Meta(description="The served model's name, or nothing.")] = None
    n: Annotated[Choices | None, Meta(description="Choices.")] = 1
    temperature: Annotated[Temperature | None, Meta(description="0 takes the likeliest token; default 1.")] = None
    top_p: Annotated[TopP | None, Meta(description="Default 1: all tokens.")] = None
    top_k: Annotated[TopK | None, Meta(description="0 or -1: all tokens, which is the default.")] = None
    min_p: Annotated[MinP | None, Meta(description="Default 0: all tokens.")] = None
    seed: Annotated[Seed | None, Meta(description="With the prompt it decides what is sampled; else chance.")] = None
    stop: Annotated[Stop | None, Meta(description="Texts that end a choice and are not part of it.")] = None
    stop_token_ids: Annotated[Ids | None, Meta(description="Tokens that end a choice too.")] = None
    include_stop_str_in_output: bool = False
    ignore_eos: Annotated[bool, Meta(description="Go on behind the model's own end tokens.")] = False
    skip_special_tokens: bool = True
    stream: Annotated[bool | None, Meta(description="Server-sent events, ended by [DONE].")] = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[
        Natural | None, Meta(description="Likeliest tokens at every position of the prompt; not in streams.")
    ] = None
    return_token_ids: Annotated[bool | None, Meta(description="prompt_token_ids and token_ids, too.")] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="Tokens of log-probabilities are named token_id:ID.")
    ] = None
    request_id: Annotated[Name | None, Meta(description="Part of the answer's id.")] = None
    user: Annotated[Name | None, Meta(description="Without effect.")] = None
    cache_salt: Annotated[Name | None, Meta(description="Without effect: requests share no text.")] = None
    # What follows is not served; these are the values that say so.
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] | None = 0.0
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] | None = 1.0
    length_penalty: Annotated[float, Meta(ge=1, le=1)] | None = 1.0
    logit_bias: Nothing | None = None
    min_tokens: Literal[0] | None = 0
    use_beam_search: Literal[False] | None = False
    spaces_between_special_tokens: Literal[True] | None = True
    truncate_prompt_tokens: None = None
    allowed_token_ids: None = None
    bad_words: NoText | None = None
    response_format: TextFormat | None = None
    structured_outputs: None = None
    logits_processors: None = None
    kv_transfer_params: None = None
    vllm_xargs: Nothing | None = None
    priority: Literal[0] | None = 0


class CompletionRequest(TextRequest, kw_only=True):
    """`POST /v1/completions`: goes on from texts or token ids."""

    prompt: Annotated[
        str | Annotated[list[Any], Meta(min_length=1, extra_json_schema=PROMPTS)],
        Meta(description="A text, a list of texts, token ids, or a list of lists of them."),
    ]
    max_tokens: Annotated[Natural | None, Meta(description="New tokens; 0 for the prompt alone.")] = 16
    echo: Annotated[bool | None, Meta(description="Begin with the prompt; with logprobs, with its own.")] = False
    logprobs: Annotated[
        Natural | bool | None, Meta(description="Likeliest tokens at every generated position; true for 1.")
    ] = None
    add_special_tokens: Annotated[bool, Meta(description="As the tokenizer begins texts.")] = True
    suffix: None = None
    best_of: Literal[1] | None = None


class TextPart(Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a message; texts alone are served."""

    type: Literal["text"]
    text: str


class CalledFunction(Struct, forbid_unknown_fields=True, kw_only=True):
    """What an earlier turn has called."""

    name: Name
    arguments: Annotated[str, Meta(description="A JSON object.")]


class ToolCall(Struct, forbid_unknown_fields=True, kw_only=True):
    """A call of an earlier turn."""

    function: CalledFunction
    id: Name | None = None
    type: Literal["function"] = "function"
    index: Natural | None = None


class ChatMessage(Struct, forbid_unknown_fields=True, kw_only=True):
    """A turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning: Annotated[str | None, Meta(description="Thinking of an earlier turn.")] = None
    reasoning_content: Annotated[str | None, Meta(description="The same, by its older name.")] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    name: Name | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class Function(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a tool does."""

    name: Name
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="JSON schema of the arguments.")] = None
    strict: Literal[False] | None = None


class Tool(Struct, forbid_unknown_fields=True, kw_only=True):
    """A tool that the model may call."""

    function: Function
    type: Literal["function"] = "function"


class TemplateOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the chat template is told."""

    enable_thinking: Annotated[
        bool | None, Meta(description="Thinking mode or not; by default thinking where the model can.")
    ] = None


class ChatRequest(TextRequest, kw_only=True):
    """`POST /v1/chat/completions`: the assistant's next turn."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=4_096)]
    max_completion_tokens: Annotated[
        Natural | None, Meta(description="New tokens, thinking included; default: as many as the server generates.")
    ] = None
    max_tokens: Annotated[Natural | None, Meta(description="The same, by its older name.")] = None
    logprobs: Annotated[bool | None, Meta(description="Log-probability of every generated token.")] = False
    top_logprobs: Annotated[Natural | None, Meta(description="Likeliest tokens beside it.")] = 0
    chat_template_kwargs: TemplateOptions | None = None
    thinking_token_budget: Annotated[
        Natural | None, Meta(description="Thinking tokens after which the thinking is ended by force.")
    ] = None
    include_reasoning: Annotated[bool, Meta(description="Whether thinking is in the answer.")] = True
    tools: list[Tool] | None = None
    tool_choice: Annotated[
        Literal["auto", "none"] | None, Meta(description="With none, the model is not told of the tools.")
    ] = None
    parallel_tool_calls: Literal[True] | None = True
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str] | None, Meta(description="Without effect.")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Meta(description="Without effect.")] = None
    safety_identifier: Annotated[Name | None, Meta(description="Without effect.")] = None
    prompt_cache_key: Annotated[Name | None, Meta(description="Without effect.")] = None
    # What follows is not served; these are the values that say so.
    reasoning_effort: None = None
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    add_special_tokens: Literal[False] = False
    echo: Literal[False] = False
    documents: None = None
    chat_template: None = None
    mm_processor_kwargs: None = None
    modalities: None = None
    audio: None = None
    web_search_options: None = None
    prediction: None = None
    verbosity: None = None
    functions: None = None
    function_call: None = None
