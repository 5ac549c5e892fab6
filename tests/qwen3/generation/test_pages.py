"""Pages are shared by sequences of one prompt, held once each, and all given back."""

from qwen3.generation.pages import PagePool, page_digests

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


def test_a_page_is_known_by_all_tokens_up_to_its_end() -> None:
    digests = page_digests(range(10), 4)
    assert len(digests) == len(set(digests)) == 2
    assert page_digests([*range(8), 0], 4) == digests
    assert page_digests([9, *range(1, 8)], 4)[1] != digests[1]
    assert page_digests([0, 1, 2, 3, 0, 1, 2, 3], 4)[0] != page_digests([0, 1, 2, 3, 0, 1, 2, 3], 4)[1]
    assert page_digests(range(3), 4) == []


def test_what_nobody_holds_is_known_until_its_page_is_needed() -> None:
    """Of two prefixes the one let go first is lost first, and of a prefix its end."""
    pool = PagePool(4, page_size=4)
    first, second = (page_digests(range(begin, begin + 8), 4) for begin in (0, 100))
    pages = {}
    for digests in (first, second):
        held = [pool.hold_or_take(digest) for digest in digests]
        assert all(one is not None and one[1] for one in held)
        pages[digests[0]] = [one[0] for one in held if one is not None]
    assert pool.hold_or_take(b"another") is None
    for digests in (first, second):
        pool.let_go(pages[digests[0]])
        assert pool.known(digests) == pages[digests[0]]
    assert pool.free == 4
    assert pool.take(1) == [pages[first[0]][1]]
    assert pool.known(first) == pages[first[0]][:1]
    assert pool.hold_or_take(first[0]) == (pages[first[0]][0], False)
    # What is held is never lost, though it was let go first of all that are left.
    assert sorted(pool.take(2) or []) == sorted(pages[second[0]])
    assert pool.take(1) is None
    assert pool.known(second) == []
