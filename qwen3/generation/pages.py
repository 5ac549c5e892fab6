"""Which sequence holds which pages of the cache, on the host: counts references, knows nothing of arrays.

Sequences of the same prompt share the pages that the prompt fills, as long as one of them is being written; the page
in which prompt and response meet is copied (PagedAttention, arXiv 2309.06180).
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(eq=False)
class Lease:
    """The pages of one sequence, in the order of its tokens."""

    prompt: tuple[int, ...]
    pages: list[int]
    shared: int
    """Pages at the front that other sequences of the prompt may hold too."""
    fresh: bool
    """The prompt's pages are still to be written."""
    copied_from: int | None
    """Page of which the first one that is not shared must become a copy."""


class PagePool:
    """Pages 1 to `pages`; page 0 belongs to nobody."""

    def __init__(self, pages: int, page_size: int):
        self.page_size = page_size
        self._free = list(range(pages, 0, -1))
        self._holders: dict[tuple[int, ...], list[Lease]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def lease(self, prompt: Sequence[int], most_tokens: int) -> Lease | None:
        """Pages for a prompt and all that may follow it, `most_tokens` in all, or None where too few are free.

        The prompt's last token does not count as read: whoever writes the response reads it first.
        """
        key, needed = tuple(prompt), -(-most_tokens // self.page_size)
        read = len(key) - 1
        holders = self._holders.get(key, [])
        shared = read // self.page_size
        front = holders[0].pages[:shared] if holders else []
        if needed - len(front) > len(self._free):
            return None
        pages = front + [self._free.pop() for _ in range(needed - len(front))]
        half_full = holders and read % self.page_size
        lease = Lease(key, pages, shared, not holders, holders[0].pages[shared] if half_full else None)
        self._holders[key] = [*holders, lease]
        return lease

    def release(self, lease: Lease) -> None:
        """Give a sequence's own pages back, and with the prompt's last sequence its shared ones."""
        holders = [holder for holder in self._holders.pop(lease.prompt) if holder is not lease]
        if holders:
            self._holders[lease.prompt] = holders
        self._free += reversed(lease.pages[lease.shared if holders else 0 :])
