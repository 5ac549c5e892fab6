"""Pages are shared by sequences of one prompt, held once each, and all given back."""

from qwen3.generation.pages import PagePool

PROMPT = (5, 6, 7, 8, 9, 10, 11)  # 6 of them are read as the prompt: one page of 4 is full, one half full


def test_sequences_of_one_prompt_share_its_full_pages_and_copy_the_half_full_one() -> None:
    pool = PagePool(9, page_size=4)
    first, second, other = (pool.lease(prompt, 12) for prompt in (PROMPT, PROMPT, (1, *PROMPT[1:])))
    assert first is not None
    assert second is not None
    assert other is not None
    assert [lease.fresh for lease in (first, second, other)] == [True, False, True]
    assert second.pages[0] == first.pages[0]
    assert second.copied_from == first.pages[1]
    assert len({*first.pages, *second.pages}) == 5
    assert not {*first.pages, *second.pages} & {*other.pages}
    assert 0 not in first.pages + second.pages + other.pages


def test_pages_return_with_the_last_sequence_that_holds_them() -> None:
    pool = PagePool(5, page_size=4)
    first, second = pool.lease(PROMPT, 12), pool.lease(PROMPT, 12)
    assert first is not None
    assert second is not None
    assert pool.lease(PROMPT, 12) is None
    pool.release(first)
    # The shared page is still read by the second.
    assert pool.free == 2
    third = pool.lease(PROMPT, 12)
    assert third is not None
    assert not third.fresh
    assert third.pages[0] == second.pages[0]
    pool.release(second)
    pool.release(third)
    assert pool.free == 5
    again = pool.lease(PROMPT, 20)
    assert again is not None
    assert again.fresh
