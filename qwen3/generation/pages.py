"""Which sequence holds which pages of the cache, on the host: counts references, knows nothing of arrays.

Sequences that begin with the same tokens share the pages that these fill (PagedAttention, arXiv 2309.06180). A page
that nobody holds any more keeps what is in it until it is needed for something else, and whoever comes until then
finds it by the digest of all tokens up to its end. Sequences of one prompt share the page in which prompt and
response meet, too, as long as one of them is being written: it is copied.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_DIGEST_BYTES = 32


def page_digests(tokens: Sequence[int] | np.ndarray, page_size: int) -> list[bytes]:
    """Of each page that the tokens fill, the digest of all tokens up to its end: BLAKE2b of 256 bits, so that nobody
    finds other tokens of the same one."""
    ids = np.asarray(tokens, "<i4")
    found, before = [], b""
    for end in range(page_size, len(ids) + 1, page_size):
        block = ids[end - page_size : end].tobytes()
        before = hashlib.blake2b(before + block, digest_size=_DIGEST_BYTES).digest()
        found.append(before)
    return found


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
        self._unheld = collections.OrderedDict.fromkeys(range(1, pages + 1))
        """First whose content is lost first."""
        self._holds = collections.Counter[int]()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._holders: dict[tuple[int, ...], list[Lease]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._unheld)

    def known(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest prefix of which all are here, given `page_digests`."""
        found = []
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """Keep what is in these pages until they are let go as often."""
        for page in pages:
            self._unheld.pop(page, None)
        self._holds.update(pages)

    def take(self, count: int) -> list[int] | None:
        """Pages to write to, held and forgotten; None where too few are free."""
        if count > len(self._unheld):
            return None
        taken = [self._unheld.popitem(last=False)[0] for _ in range(count)]
        for page in taken:
            if (digest := self._digest_of.pop(page, None)) is not None:
                del self._page_of[digest]
        self._holds.update(taken)
        return taken

    def hold_or_take(self, digest: bytes) -> tuple[int, bool] | None:
        """A page of these tokens, held, and whether it is still to be written; None where it is not here and none is
        free."""
        if (page := self._page_of.get(digest)) is not None:
            self.hold([page])
            return page, False
        taken = self.take(1)
        if taken is None:
            return None
        self._page_of[digest], self._digest_of[taken[0]] = taken[0], digest
        return taken[0], True

    def let_go(self, pages: Sequence[int]) -> None:
        """Hold these pages of one sequence once less. Of a prefix, the last page is lost first."""
        for page in reversed(pages):
            self._holds[page] -= 1
            if not self._holds[page]:
                del self._holds[page]
                self._unheld[page] = None
                self._unheld.move_to_end(page, last=page in self._digest_of)

    def lease(self, prompt: Sequence[int], most_tokens: int) -> Lease | None:
        """Pages for a prompt and all that may follow it, `most_tokens` in all, or None where too few are free.

        The prompt's last token does not count as read: whoever writes the response reads it first.
        """
        key, needed = tuple(prompt), -(-most_tokens // self.page_size)
        read = len(key) - 1
        holders = self._holders.get(key, [])
        shared = read // self.page_size
        front = holders[0].pages[:shared] if holders else []
        own = self.take(needed - len(front))
        if own is None:
            return None
        self.hold(front)
        half_full = holders and read % self.page_size
        lease = Lease(key, front + own, shared, not holders, holders[0].pages[shared] if half_full else None)
        self._holders[key] = [*holders, lease]
        return lease

    def release(self, lease: Lease) -> None:
        """Give a sequence's own pages back, and with the prompt's last sequence its shared ones."""
        holders = [holder for holder in self._holders.pop(lease.prompt) if holder is not lease]
        if holders:
            self._holders[lease.prompt] = holders
        self.let_go(lease.pages)
