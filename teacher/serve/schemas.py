"""The JSON requests of a server, as msgspec reads them: unknown fields, wrong types and numbers out of bounds are
refused with the place where they stand."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from qwen3.errors import UserError
from qwen3.field_types import MOST
from qwen3.generation.engine import STOP_IDS, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import Mode
from teacher.limits import Limits
from teacher.serve.generation import MOST_TOP_K
from teacher.wire import Refused

Natural = Annotated[int, Meta(ge=0, le=MOST)]
Count = Annotated[int, Meta(ge=1, le=MOST)]
Unsigned = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Name = Annotated[str, Meta(max_length=1_024)]
TopK = Annotated[int, Meta(ge=-1, le=MOST_TOP_K)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Choices = Annotated[int, Meta(ge=1, le=64)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=1e6)]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Meta(max_length=16)]
Read = TypeVar("Read", bound=Struct)


class Params(Struct, forbid_unknown_fields=True, kw_only=True):
    """`SamplingParams`, field by field."""

    max_new_tokens: Count
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Meta(ge=0, le=MOST_TOP_K)] = 0
    min_p: MinP = 0.0
    thinking_budget: Natural | None = None
    stop_ids: tuple[Natural, ...] | None = None


class RolloutRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`qwen3.generation.engine.Request`, field by field."""

    prompt_ids: list[Natural]
    prompt_id: Name
    sample_index: Unsigned
    mode: Literal["thinking", "non_thinking"]
    params: Params


class RolloutsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`Engine.generate`: what is generated depends on the teacher and on these fields alone."""

    seed: Unsigned
    step: Unsigned = 0
    requests: list[RolloutRequest]


def read(body: bytes, kind: type[Read]) -> Read:
    """The request in `body`. Raises Refused, naming the field, for anything else than a `kind`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise Refused(place.rstrip("`").lstrip(".") or "body", f"is not as it must be: {reason}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused("body", f"is no JSON: {error}") from None


def engine_requests(asked: RolloutsRequest, limits: Limits, vocab_size: int) -> list[Request]:
    """What the engine is asked. Raises Refused for what it would refuse, and for what would compile."""
    if not 1 <= len(asked.requests) <= limits.max_request_sequences:
        raise Refused(
            "requests",
            f"has {len(asked.requests)} entries; send 1 to {limits.max_request_sequences} (max_request_sequences)",
            status=413 if asked.requests else 400,
        )
    made = []
    for index, one in enumerate(asked.requests):
        field = f"requests[{index}]"
        check_length(f"{field}.prompt_ids", one.prompt_ids, limits.max_prompt_tokens)
        check_ids(f"{field}.prompt_ids", one.prompt_ids, vocab_size)
        params = sampling_params(f"{field}.params.", msgspec.structs.asdict(one.params), limits, vocab_size)
        mode: Mode = one.mode
        made.append(
            Request(
                prompt_ids=one.prompt_ids,
                prompt_id=one.prompt_id,
                sample_index=one.sample_index,
                mode=mode,
                params=params,
            )
        )
    return made


def check_length(field: str, ids: Sequence[int], most: int | None) -> None:
    """Refuses a prompt of no tokens, and of more than `most` can be generated from."""
    if not ids:
        raise Refused(field, "is empty; a prompt has at least one token")
    if most is not None and len(ids) > most:
        raise Refused(field, f"has {len(ids)} tokens; this server takes at most {most} (max_prompt_tokens)", 413)


def check_ids(field: str, ids: Sequence[int], vocab_size: int, least: int = 0) -> None:
    """Refuses ids that are no tokens, or below `least`."""
    if bad := [one for one in ids if not least <= one < vocab_size]:
        raise Refused(field, f"holds {bad[0]}; token ids are {least} to {vocab_size - 1}")


def sampling_params(
    prefix: str, values: dict[str, Any], limits: Limits, vocab_size: int, **names: str
) -> SamplingParams:
    """`SamplingParams` of these `values`. Raises Refused for what it refuses, and for what is beyond the programs.

    `prefix` says where the client has them, `names` what it calls those that it calls otherwise."""

    def field(name: str) -> str:
        return prefix + names.get(name, name)

    try:
        params = SamplingParams(**values)
    except UserError as error:
        # It begins with the value's name.
        raise Refused(field(str(error).split()[0].removeprefix("sampling.")), f"cannot be sampled: {error}") from None
    if params.max_new_tokens > limits.max_new_tokens:
        raise Refused(
            field("max_new_tokens"),
            f"asks for {params.max_new_tokens} new tokens; this server takes at most {limits.max_new_tokens} "
            "(max_new_tokens)",
            413,
        )
    if params.stop_ids is not None:
        if len(params.stop_ids) > STOP_IDS:
            raise Refused(
                field("stop_ids"),
                f"and the model's own end tokens are {len(params.stop_ids)}; use at most {STOP_IDS} together",
            )
        check_ids(field("stop_ids"), params.stop_ids, vocab_size)
    return params
