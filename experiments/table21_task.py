"""What Table 21's models were made for and are judged by: chains long enough that a student's own mistakes matter."""

from distill import (
    Arithmetic,
    ChainSum,
    Evaluation,
    Products,
    SamplingParams,
    SumOfProducts,
    non_thinking_params,
    thinking_params,
)

MAX_PROMPT_TOKENS = 64
THINKING_TOKENS = 112
ANSWER_TOKENS = 16


def trained(mistakes: float = 0.0) -> Arithmetic:
    """Chains of two to seven digits, and products of two or three digits by one; the shortest can be told at once."""
    return Arithmetic(
        chain_sum=ChainSum(min_terms=2, max_terms=7, weight=0.6),
        products=Products(weight=0.4),
        mistakes=mistakes,
        weight=2,
    )


def transfer(held_out_fraction: float, mistakes: float = 0.0) -> Arithmetic:
    """Sums of two or three products of digits: a family that needs what both of the trained ones teach."""
    return Arithmetic(
        mistakes=mistakes,
        chain_sum=ChainSum(weight=0),
        products=Products(weight=0),
        sum_of_products=SumOfProducts(weight=1, max_products=3, max_digits=1),
        held_out_fraction=held_out_fraction,
        weight=1,
    )


def qwen3_thinking() -> SamplingParams:
    return thinking_params(THINKING_TOKENS)


def qwen3_non_thinking() -> SamplingParams:
    return non_thinking_params(ANSWER_TOKENS)


def policy_thinking() -> SamplingParams:
    """The policy itself: temperature 1, nothing cut off."""
    return SamplingParams(max_new_tokens=THINKING_TOKENS)


def policy_non_thinking() -> SamplingParams:
    return SamplingParams(max_new_tokens=ANSWER_TOKENS)


def evaluation(problems: int = 120, samples: int = 4) -> Evaluation:
    """At the settings that Qwen3's authors recommend for each mode."""
    return Evaluation(
        problems=problems,
        samples_per_problem=samples,
        pass_at=(samples,),
        thinking=qwen3_thinking(),
        non_thinking=qwen3_non_thinking(),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        batch_size=256,
    )
