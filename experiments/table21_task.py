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

MAX_PROMPT_TOKENS = 80
THINKING_TOKENS = 152
ANSWER_TOKENS = 16


def trained() -> Arithmetic:
    """Chains of two to seven numbers of one to three digits, and products of two or three digits by one or two."""
    return Arithmetic(
        chain_sum=ChainSum(min_terms=2, max_terms=7, min_digits=1, max_digits=3),
        products=Products(min_digits=2, max_digits=3, min_multiplier_digits=1, max_multiplier_digits=2),
        weight=2,
    )


def transfer(held_out_fraction: float) -> Arithmetic:
    """Sums of two or three products: a family that needs both of the trained ones."""
    return Arithmetic(
        chain_sum=ChainSum(weight=0),
        products=Products(weight=0),
        sum_of_products=SumOfProducts(weight=1, min_products=2, max_products=3, min_digits=1, max_digits=2),
        held_out_fraction=held_out_fraction,
        weight=1,
    )


def qwen3_thinking() -> SamplingParams:
    return thinking_params(THINKING_TOKENS)


def qwen3_non_thinking() -> SamplingParams:
    return non_thinking_params(ANSWER_TOKENS)


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
