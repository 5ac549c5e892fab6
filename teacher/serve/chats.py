"""`POST /v1/chat/completions`, as OpenAI and vLLM 0.33 have it for Qwen3: thinking and tools in fields of their own."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from qwen3.errors import UserError
from qwen3.rollout import NON_THINKING, THINKING, Mode
from teacher.serve import openai
from teacher.serve.answering import Answering, Choice, Piece, Token
from teacher.serve.assistant import Assistant, Called, Said
from teacher.serve.calls import Call
from teacher.serve.logprobs import Spell, chat_logprobs, prompt_logprobs, token_speller
from teacher.serve.openai_schemas import ChatMessage, ChatRequest, ToolCall
from teacher.serve.schemas import read
from teacher.serve.service import Service
from teacher.serve.wanted import Wanted, check_text
from teacher.wire import Answer, Refused


async def chats(call: Call) -> Response:
    """Answers a call."""
    asked = await asyncio.to_thread(read, await call.body(), ChatRequest)
    wanted = await asyncio.to_thread(_wanted, asked, call.service)
    answering = await Answering.begin(call, [wanted])
    answer = _Chat(asked, call.service, wanted, answering)
    if asked.stream:
        return openai.stream(answer.events())
    ((top, _),) = await answering.scores()
    await answering.finish()
    return await asyncio.to_thread(lambda: openai.json_response(answer.whole(top)))


def _wanted(asked: ChatRequest, service: Service) -> Wanted:
    openai.check_model(asked.model, service)
    openai.check_stream(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise Refused("top_logprobs", "are beside the token's own; ask with logprobs too")
    mode = _mode(asked, service)
    new_tokens, name = service.limits.max_new_tokens, "max_completion_tokens"
    for field in ("max_tokens", "max_completion_tokens"):
        if (value := getattr(asked, field)) is not None:
            new_tokens, name = value, field
    params = openai.sampled(asked, new_tokens, name, service, asked.thinking_token_budget)
    tools = [_plain_tool(tool) for tool in asked.tools or ()] if _may_call(asked) else None
    try:
        text = service.tokenizer.prompt_text(
            [_plain(n, one) for n, one in enumerate(asked.messages)], mode, tools=tools
        )
    except UserError as error:
        # What it says of the served folder is nobody else's business.
        reason = str(error).removeprefix(f"{service.tokenizer.folder}: ")
        raise Refused("messages", f"cannot become a prompt: {reason}") from None
    check_text("messages", text, service.tokenizer.longest_token, service.limits)
    if asked.thinking_token_budget is not None and (mode != THINKING or service.tokenizer.think_end_id is None):
        raise Refused("thinking_token_budget", "is of thinking, and this answer has none; leave it out")
    return Wanted(
        prompt=service.tokenizer.encode(text),
        spelling=openai.spelled(asked, service),
        params=params,
        count=asked.n or 1,
        seed=asked.seed,
        temperature=openai.temperature(asked),
        mode=mode,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs and new_tokens else None,
        prompt_logprobs=asked.prompt_logprobs,
        name_prompt="messages",
        name_logprobs="top_logprobs",
    )


def _mode(asked: ChatRequest, service: Service) -> Mode:
    """What is asked for, else thinking where the model can."""
    thinking = None if asked.chat_template_kwargs is None else asked.chat_template_kwargs.enable_thinking
    modes = service.tokenizer.modes
    if thinking is None:
        return THINKING if THINKING in modes or not modes else NON_THINKING
    mode: Mode = THINKING if thinking else NON_THINKING
    if modes and mode not in modes:
        raise Refused(
            "chat_template_kwargs.enable_thinking",
            f"is {str(thinking).lower()}, but this model has {modes[0].replace('_', '-')} mode alone; leave it out",
        )
    return mode


def _may_call(asked: ChatRequest) -> bool:
    return bool(asked.tools) and asked.tool_choice != "none"


def _plain_tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.function.name, "description": tool.function.description}
    function["parameters"] = tool.function.parameters
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _plain(number: int, message: ChatMessage) -> dict[str, Any]:
    """A turn as templates read it: arguments of calls as objects, parts of texts joined by line ends, as in vLLM."""
    content = message.content
    if content is None and message.role != "assistant":
        raise Refused(f"messages[{number}].content", f"is missing; a {message.role} turn has text")
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    thinking = message.reasoning if message.reasoning is not None else message.reasoning_content
    found: dict[str, Any] = {
        "role": message.role,
        # Of a turn that only calls: templates add it to text.
        "content": "" if content is None else content,
        "reasoning_content": thinking,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
    }
    if message.tool_calls:
        found["tool_calls"] = [_plain_call(number, place, one) for place, one in enumerate(message.tool_calls)]
    return {name: value for name, value in found.items() if value is not None}


def _plain_call(number: int, place: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"messages[{number}].tool_calls[{place}].function.arguments"
        raise Refused(field, "is no JSON object; send what the model has called")
    named = {} if call.id is None else {"id": call.id}
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}, **named}


class _Chat:
    """The answer, whole or in events."""

    def __init__(self, asked: ChatRequest, service: Service, wanted: Wanted, answering: Answering):
        self._asked, self._service, self._wanted, self._answering = asked, service, wanted, answering
        self._spell: Spell = token_speller(service.tokenizer.decode, by_id=bool(asked.return_tokens_as_token_ids))

    def whole(self, top: Answer | None) -> dict[str, Any]:
        """The answer of a call without stream; `top` is about its prompt."""
        asked = self._asked
        found = {
            **openai.frame("chat.completion", "chatcmpl", asked, self._service),
            "choices": [self._choice(choice) for choice in self._answering.choices],
            "usage": openai.usage([self._wanted], self._answering.choices),
            "prompt_logprobs": None,
        }
        if top is not None:
            spell = token_speller(self._service.tokenizer.decode, by_id=False)
            found["prompt_logprobs"] = prompt_logprobs(self._wanted.prompt, top, asked.prompt_logprobs or 0, spell)
        if asked.return_token_ids:
            found["prompt_token_ids"] = self._wanted.prompt
        return found

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Its stream."""
        asked, choices = self._asked, self._answering.choices
        frame = openai.frame("chat.completion.chunk", "chatcmpl", asked, self._service)
        speaking = [self._assistant() for _ in choices]
        calls = [0] * len(choices)

        def event(choice: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            nothing = {"logprobs": None, "finish_reason": None}
            return {**frame, "choices": [{"index": choice, "delta": delta, **nothing, **more}]}

        for choice in choices:
            first = event(choice.place, {"role": "assistant", "content": ""})
            if asked.return_token_ids:
                first["prompt_token_ids"] = self._wanted.prompt
            yield first
            if choice.finish_reason is not None:
                yield event(choice.place, {}, finish_reason=choice.finish_reason, stop_reason=None)
        async for piece in self._answering.pieces():
            told = speaking[piece.choice].add(piece.text)
            if piece.finish_reason is not None:
                told += speaking[piece.choice].end()
            deltas = list(self._deltas(told, calls[piece.choice]))
            calls[piece.choice] += sum(isinstance(one, Called) for one in told)
            more = self._of_tokens(piece.tokens)
            last = self._last(piece, calls[piece.choice] > 0)
            # Tokens go with the first that is told in their event, and the end with the last.
            for place, delta in enumerate(deltas or [{}] if more or last else deltas):
                with_tokens = more if place == 0 else {}
                yield event(piece.choice, delta, **with_tokens, **(last if place == max(0, len(deltas) - 1) else {}))
        options = asked.stream_options
        if options is not None and options.include_usage:
            yield {**frame, "choices": [], "usage": openai.usage([self._wanted], choices)}

    def _deltas(self, told: Sequence[Said | Called], first_call: int) -> Sequence[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for one in told:
            if isinstance(one, Called):
                found.append({"tool_calls": [{"index": first_call, **_call(one)}]})
                first_call += 1
            elif one.kind == "content":
                found.append({"content": one.text})
            elif self._asked.include_reasoning:
                found.append(_reasoning(one.text))
        return found

    def _of_tokens(self, tokens: Sequence[Token]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._asked.logprobs and tokens:
            found["logprobs"] = chat_logprobs(tokens, self._spell)
        if self._asked.return_token_ids and tokens:
            found["token_ids"] = [token.id for token in tokens]
        return found

    def _last(self, piece: Piece, called: bool) -> dict[str, Any]:
        if piece.finish_reason is None:
            return {}
        return {"finish_reason": "tool_calls" if called else piece.finish_reason, "stop_reason": piece.stop_reason}

    def _assistant(self) -> Assistant:
        mode = self._wanted.mode
        # A budget of 0 is spent where the turn begins: the text that ends thinking by force opens it.
        forced = mode == THINKING and self._asked.thinking_token_budget == 0
        in_thinking = forced or self._service.tokenizer.starts_in_thinking(mode)
        return Assistant(thinking=mode == THINKING, in_thinking=in_thinking, tools=_may_call(self._asked))

    def _choice(self, choice: Choice) -> dict[str, Any]:
        assistant = self._assistant()
        told = [*assistant.add(choice.text), *assistant.end()]
        reasoning = "".join(one.text for one in told if isinstance(one, Said) and one.kind == "reasoning")
        content = "".join(one.text for one in told if isinstance(one, Said) and one.kind == "content")
        calls = [_call(one) for one in told if isinstance(one, Called)]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
        if calls:
            message["tool_calls"] = calls
        message |= _reasoning(reasoning or None if self._asked.include_reasoning else None)
        found = {
            "index": choice.place,
            "message": message,
            "logprobs": None,
            "finish_reason": "tool_calls" if calls else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._asked.logprobs:
            found["logprobs"] = chat_logprobs(choice.tokens, self._spell)
        if self._asked.return_token_ids:
            found["token_ids"] = [token.id for token in choice.tokens]
        return found


def _call(called: Called) -> dict[str, Any]:
    return {"id": called.id, "type": "function", "function": {"name": called.name, "arguments": called.arguments}}


def _reasoning(text: str | None) -> dict[str, Any]:
    """By both its names: vLLM's of today, and the one that SGLang and older clients have."""
    return {"reasoning": text, "reasoning_content": text}
