"""How servers of vLLM and SGLang are asked by token ids, and how their answers are read.

Field by field as vLLM 0.32 and 0.33 and SGLang 0.5.23 have them in their sources: `vllm/entrypoints/serve/disagg/`,
vLLM's `docs/training/prompt_token_id_logprobs.md`, and SGLang's `python/sglang/srt/entrypoints/http_server.py` and
`managers/io_struct.py`. Positions are this project's: row t is about token t + 1. Both servers say of token i what its
predecessors say, and nothing of the first.
"""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from jaxtyping import Float32, Int32

from qwen3.errors import UserError
from qwen3.generation.sampling import SamplingParams
from teacher.servers import NoAnswer
from teacher.wire import KINDS, Kind

Program = Literal["teacher.serve", "vllm", "sglang"]
_LEAST_LOGPROB: Final = -9999.0
"""What vLLM writes for the logarithm of 0, of which there is none in JSON."""
_RESERVED_TOKENS: Final = 7
"""Of its context, which SGLang keeps for itself: 1 and 5 more of what it calls the longest input, and 1 by which a
prompt must be shorter than that."""
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_NO_NUMBERS: Final = "NaN happened"
"""What SGLang says has ended a sequence whose logits are no numbers."""
Read = TypeVar("Read")


class About(NamedTuple):
    """What a server says of its teacher."""

    version: str
    model: str
    root: str
    weights_version: str
    max_model_len: int
    longest_tokens: int
    """Tokens of the longest sequence that it scores."""


class Said(NamedTuple):
    """What a server says about a sequence of T tokens, at the R = T - 1 - start positions that a token follows."""

    following: Float32[np.ndarray, "R"]
    """Log-probabilities of the tokens that follow; -inf where the probability is 0."""
    top_ids: Int32[np.ndarray, "R k"]
    """The likeliest tokens, the likeliest first."""
    top_logprobs: Float32[np.ndarray, "R k"]
    at_ids: Float32[np.ndarray, "R J"] | None = None
    """At the ids that were asked for; -inf where that was -1."""
    weights_version: str = ""
    """Of the weights that say so; empty where the answer does not tell."""


class Written(NamedTuple):
    """What a server has generated."""

    tokens: list[int]
    """With the stop token that has ended it, if one has."""
    logprobs: list[float] | None
    """At temperature 1, without truncation; None where the server gives others."""
    weights_version: str = ""
    """As of `Said`."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be scored."""

    tokens: Sequence[int]
    start: int
    """The first position that is asked about."""
    top_k: int = 0
    ids: Int32[np.ndarray, "R J"] | None = None
    """-1 for none."""

    @property
    def rows(self) -> int:
        """R of `Said`."""
        return len(self.tokens) - 1 - self.start


class Dialect(Protocol):
    """A program that serves teachers. What is read raises UserError where an answer is not as it must be, and NoAnswer
    where there is none."""

    name: Program
    program: str
    """As its authors write it."""
    path: str
    """Where it is asked."""
    kinds: frozenset[Kind]
    """Targets that it can give."""
    missing: str
    """What helps where `path` is not served."""
    entries_option: str | None
    """Bounds what is named at a position; None where nothing does."""
    raw: str
    """What helps where it gives other log-probabilities than the teacher's own."""

    def longer(self, tokens: int) -> str:
        """What a server is started with that scores sequences of so many tokens."""

    def about(self, get: Callable[..., Mapping[str, Any]]) -> About:
        """Who is served; `get` asks for the first of some paths that is there."""

    def scoring(self, model: str, asked: Asked) -> dict[str, Any]:
        """The request that scores."""

    def said(self, body: bytes, asked: Asked) -> Said:
        """Its answer."""

    def generating(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
    ) -> dict[str, Any]:
        """The request that goes on from `prompt`, with the same tokens for the same seed."""

    def written(self, body: bytes) -> Written:
        """Its answer."""


class _VllmLogprob(msgspec.Struct):
    logprob: float | None = None


class _VllmToken(msgspec.Struct):
    logprob: float | None = None


class _VllmContent(msgspec.Struct):
    content: list[_VllmToken] | None = None


class _VllmChoice(msgspec.Struct):
    token_ids: list[_Id] | None = None
    logprobs: _VllmContent | None = None
    finish_reason: str | None = None
    weight_versions: Any = None


class _VllmAnswer(msgspec.Struct):
    choices: Annotated[list[_VllmChoice], msgspec.Meta(min_length=1, max_length=1)]
    prompt_logprobs: list[dict[_Id, _VllmLogprob] | None] | None = None
    prompt_token_id_logprobs: str | None = None


class Vllm:
    """vLLM's token endpoint."""

    name: Program = "vllm"
    program = "vLLM"
    path = "/inference/v1/generate"
    kinds: frozenset[Kind] = frozenset(("top_k", "at_ids"))
    missing = "it takes vLLM 0.32 or newer, started with vllm serve"
    entries_option: str | None = "--max-logprobs"
    raw = "start it with --logprobs-mode raw_logprobs"

    def longer(self, tokens: int) -> str:
        return f"--max-model-len {tokens + 1}"

    def about(self, get: Callable[..., Mapping[str, Any]]) -> About:
        card = get("/v1/models")["data"][0]
        longest = int(card["max_model_len"])
        return About(
            version=str(get("/version")["version"]),
            model=str(card["id"]),
            root=str(card.get("root") or card["id"]),
            weights_version="",
            max_model_len=longest,
            longest_tokens=longest - 1,  # it generates a token at least
        )

    def scoring(self, model: str, asked: Asked) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": asked.top_k,
            "detokenize": False,
        }
        if asked.ids is not None:
            sampling |= {"prompt_logprob_token_ids": asked.ids.tolist(), "prompt_logprob_start": asked.start}
        return {"model": model, "token_ids": list(asked.tokens), "sampling_params": sampling}

    def said(self, body: bytes, asked: Asked) -> Said:
        answer = self._answer(body)
        if answer.prompt_logprobs is None or len(answer.prompt_logprobs) != len(asked.tokens):
            raise UserError(f"it gives no prompt_logprobs of all tokens; {self.missing}")
        rows = [row or {} for row in answer.prompt_logprobs[asked.start + 1 :]]
        following = asked.tokens[asked.start + 1 :]
        if not all(token in row for token, row in zip(following, rows, strict=True)):
            raise UserError("its prompt_logprobs are of other tokens than were sent")
        (choice,) = answer.choices
        own = _logprobs([row[token].logprob for token, row in zip(following, rows, strict=True)])
        # The token that stands there comes first, and is one more where it is none of the likeliest.
        ranked = [
            sorted(((token, one.logprob) for token, one in row.items()), key=_likeliest)[: asked.top_k] for row in rows
        ]
        top_ids, top_logprobs = _top(ranked, asked.top_k)
        return Said(own, top_ids, top_logprobs, self._at_ids(answer, asked), _version(choice))

    def _at_ids(self, answer: _VllmAnswer, asked: Asked) -> Float32[np.ndarray, "R J"] | None:
        if asked.ids is None:
            return None
        if answer.prompt_token_id_logprobs is None:
            raise UserError(
                "it gives no prompt_token_id_logprobs; it takes vLLM 0.33 with VLLM_USE_V2_MODEL_RUNNER=1, and without "
                "--kv-sharing-fast-prefill"
            )
        try:
            content = io.BytesIO(base64.b64decode(answer.prompt_token_id_logprobs))
            found = np.lib.format.read_array(content, allow_pickle=False)
        except (ValueError, EOFError):
            raise UserError("its prompt_token_id_logprobs are no .npy file in base64") from None
        if found.dtype.kind != "f":
            raise UserError(f"its prompt_token_id_logprobs are {found.dtype} where floating-point numbers were asked")
        if found.shape != asked.ids.shape:
            raise UserError(
                f"its prompt_token_id_logprobs are {list(found.shape)} where {list(asked.ids.shape)} were asked"
            )
        return np.where((asked.ids < 0) | (found <= _LEAST_LOGPROB), -np.inf, found).astype(np.float32)

    def generating(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
    ) -> dict[str, Any]:
        sampling = {
            "max_tokens": new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": seed,
            # Its own end tokens are left out, and those that are named count all the same.
            "ignore_eos": True,
            "stop_token_ids": list(stop_ids),
            "logprobs": 0,
            "detokenize": False,
        }
        return {"model": model, "token_ids": list(prompt), "sampling_params": sampling}

    def written(self, body: bytes) -> Written:
        (choice,) = self._answer(body).choices
        tokens = choice.token_ids or []
        content = (choice.logprobs and choice.logprobs.content) or []
        if len(content) != len(tokens):
            raise UserError(f"it gives log-probabilities of {len(content)} of {len(tokens)} generated tokens")
        return Written(tokens, _logprobs([one.logprob for one in content]).tolist(), _version(choice))

    def _answer(self, body: bytes) -> _VllmAnswer:
        answer = _decoded(body, _VllmAnswer)
        if any(choice.finish_reason in ("abort", "error") for choice in answer.choices):
            raise NoAnswer("it has aborted the request")
        return answer


def _version(choice: _VllmChoice) -> str:
    """Of the weights that a choice comes from; one, if it tells of more than one in one string."""
    told = choice.weight_versions
    versions = dict.fromkeys(str(one) for one in (told if isinstance(told, list) else [told]) if one is not None)
    return ", ".join(versions)


_SglangEntry = tuple[float | None, _Id, str | None]


class _SglangMeta(msgspec.Struct):
    finish_reason: dict[str, Any] | None = None
    weight_version: str | None = None
    input_token_logprobs: list[_SglangEntry] | None = None
    input_top_logprobs: list[list[_SglangEntry] | None] | None = None


class _SglangAnswer(msgspec.Struct):
    meta_info: _SglangMeta
    output_ids: list[_Id] | None = None


class Sglang:
    """SGLang's own endpoint."""

    name: Program = "sglang"
    program = "SGLang"
    path = "/generate"
    kinds: frozenset[Kind] = frozenset(("top_k",))
    missing = "it takes SGLang 0.5, started with python -m sglang.launch_server"
    entries_option: str | None = None
    raw = "take another version of it"

    def longer(self, tokens: int) -> str:
        return (
            f"--context-length {tokens + _RESERVED_TOKENS}, and with memory for as many tokens (--mem-fraction-static)"
        )

    def about(self, get: Callable[..., Mapping[str, Any]]) -> About:
        card = get("/v1/models")["data"][0]
        model = get("/model_info", "/get_model_info")
        server = get("/server_info", "/get_server_info")
        longest = int(card["max_model_len"])
        return About(
            version=str(server["version"]),
            model=str(card["id"]),
            root=str(model["model_path"]),
            weights_version=str(model.get("weight_version") or ""),
            max_model_len=longest,
            # What its memory holds may bound it, too.
            longest_tokens=int(server.get("max_req_input_len") or longest - _RESERVED_TOKENS + 1) - 1,
        )

    def scoring(self, model: str, asked: Asked) -> dict[str, Any]:
        del model  # it serves one
        return {
            "input_ids": list(asked.tokens),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": asked.start,
            "top_logprobs_num": asked.top_k,
        }

    def said(self, body: bytes, asked: Asked) -> Said:
        meta = self._answer(body).meta_info
        own = (meta.input_token_logprobs or [])[1:]
        if [token for _, token, _ in own] != list(asked.tokens[asked.start + 1 :]):
            raise UserError("its input_token_logprobs are of other tokens than were sent")
        rows = (meta.input_top_logprobs or [])[1:] if asked.top_k else [[]] * len(own)
        if len(rows) != len(own):
            raise UserError(
                f"its input_top_logprobs are of {len(rows)} tokens, and its input_token_logprobs of {len(own)}"
            )
        ranked = [sorted(((token, one) for one, token, _ in row or ()), key=_likeliest)[: asked.top_k] for row in rows]
        following = _logprobs([one for one, *_ in own])
        return Said(following, *_top(ranked, asked.top_k), weights_version=meta.weight_version or "")

    def generating(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        new_tokens: int,
        stop_ids: Sequence[int],
        seed: int,
    ) -> dict[str, Any]:
        del model
        sampling = {
            "max_new_tokens": new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "sampling_seed": seed,
            # With it tokens that are named do not count either; its own end tokens do otherwise.
            "ignore_eos": not stop_ids,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
        }
        return {"input_ids": list(prompt), "sampling_params": sampling}

    def written(self, body: bytes) -> Written:
        answer = self._answer(body)
        if (answer.meta_info.finish_reason or {}).get("matched") == _NO_NUMBERS:
            raise UserError("its logits are no numbers; check the teacher's weights")
        # Those that it gives are divided by the temperature.
        return Written(answer.output_ids or [], None, answer.meta_info.weight_version or "")

    def _answer(self, body: bytes) -> _SglangAnswer:
        answer = _decoded(body, _SglangAnswer)
        if (answer.meta_info.finish_reason or {}).get("type") == "abort":
            raise NoAnswer("it has aborted the request")
        return answer


DIALECTS: Final[Mapping[Program, Dialect]] = {"vllm": Vllm(), "sglang": Sglang()}


def kinds_of(server: Program) -> frozenset[Kind]:
    """The targets that servers of a program give."""
    return DIALECTS[server].kinds if server in DIALECTS else frozenset(KINDS)


def _decoded(body: bytes, kind: type[Read]) -> Read:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"it answers with something else than was documented: {error}") from None


def _likeliest(entry: tuple[int, float | None]) -> tuple[float, int]:
    """Sorts the likeliest token first, of equally likely ones that of the smaller id."""
    token, logprob = entry
    return (np.inf if logprob is None else -logprob), token


def _top(
    ranked: Sequence[Sequence[tuple[int, float | None]]], k: int
) -> tuple[Int32[np.ndarray, "R k"], Float32[np.ndarray, "R k"]]:
    if few := [row for row in ranked if len(row) < k]:
        raise UserError(f"it names {len(few[0])} tokens at a position where {k} were asked for")
    if k and any((row[0][1] or 0) <= _LEAST_LOGPROB or row[0][1] is None for row in ranked):
        raise UserError("its log-probabilities are no numbers; check the teacher's weights")
    shape = len(ranked), k
    ids = np.asarray([token for row in ranked for token, _ in row], np.int32).reshape(shape)
    return ids, _logprobs([logprob for row in ranked for _, logprob in row]).reshape(shape)


def _logprobs(values: Sequence[float | None]) -> Float32[np.ndarray, "..."]:
    """As numbers: JSON has none for the logarithm of 0, in whose place SGLang writes null and vLLM -9999."""
    found = np.asarray([-np.inf if one is None else one for one in values], np.float32)
    return np.where(found <= _LEAST_LOGPROB, np.float32(-np.inf), found)
