"""Pages whose contents are known, found again by what was written in them.

A page's name is a digest of its namespace, its tokens and those of all pages before it. The
namespace is a content hash of the weights that wrote the page, never a model's name: all models
that leave the writing to the same encoder find each other's pages. A node of the tree is one page,
and a page is in the tree only while the page before it is, so that the longest known prefix is
found by bisection over the names.
"""

import bisect
import hashlib
import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator

# Bytes of a page's name. Two pages of one name would be taken for the same: with 128 bits that is
# less likely than a fault of the memory, whoever chooses the prompts.
NAME_BYTES = 16


class PageNames:
    """The names of the full pages of a growing text, each worked out once.

    Args:
      namespace: of the weights that write it.
      tokens: the text; whoever appends to it appends to the list.
    """

    def __init__(self, namespace: str, tokens: list[int], page_size: int):
        self._names: list[bytes] = []
        self._last = hashlib.sha256(namespace.encode()).digest()
        self._tokens = tokens
        self._page_size = page_size

    def __getitem__(self, page: int) -> bytes:
        return self.upto(page + 1)[page]

    def upto(self, count: int) -> list[bytes]:
        """At least the first `count` names; the text must have as many full pages."""
        size = self._page_size
        for page in range(len(self._names), count):
            tokens = array("q", self._tokens[page * size : (page + 1) * size])
            assert len(tokens) == size, "only full pages have names"
            digest = hashlib.blake2b(self._last + tokens.tobytes(), digest_size=NAME_BYTES)
            self._last = digest.digest()
            self._names.append(self._last)
        return self._names


class Node:
    """A page of the tree.

    Attributes:
      name: its digest; empty for the root, which is no page.
      page: its number in the cache; -1 for the root.
      parent: the page before it; None for the root.
      children: pages that follow it in the tree.
      depth: pages on the path, its own included.
      locks: requests that use it or a page below it.
      used: time of the last use, in the tree's own count.
    """

    __slots__ = ("children", "depth", "locks", "name", "page", "parent", "used")

    def __init__(self, name: bytes, page: int, parent: "Node | None"):
        self.name = name
        self.page = page
        self.parent = parent
        self.children = 0
        self.depth = 0 if parent is None else parent.depth + 1
        self.locks = 0
        self.used = 0

    def path(self) -> Iterator["Node"]:
        """This node and those above it, the root left out."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def pages(self) -> list[int]:
        """Pages from the first to this one's."""
        return [node.page for node in self.path()][::-1]


class PrefixTree:
    """Pages of all namespaces; those that no request uses go in order of last use, leaves first."""

    def __init__(self):
        self.root = Node(b"", -1, None)
        self.locked = 0  # pages that a request uses
        self._nodes: dict[bytes, Node] = {}
        # (used, number, node) of every node that was evictable when pushed; stale ones are
        # recognised when they come up.
        self._evictable: list[tuple[int, int, Node]] = []
        self._number = itertools.count()
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, names: PageNames, most: int) -> Node:
        """The deepest node among the first `most` names; the root if none is known."""
        known = bisect.bisect_left(
            range(most), True, key=lambda page: names[page] not in self._nodes
        )
        return self._nodes[names[known - 1]] if known else self.root

    def insert(self, node: Node, names: Iterable[bytes], pages: Iterable[int]) -> tuple[Node, list]:
        """Hand over full pages that follow `node`.

        Returns:
          (the deepest node of the path; the pages of the caller that the tree did not take, since
          it has another page of that name).
        """
        duplicates = []
        for name, page in zip(names, pages, strict=True):
            child = self._nodes.get(name)
            if child is None:
                child = self._nodes[name] = Node(name, page, node)
                node.children += 1
            else:
                duplicates.append(page)
            node = child
        return node, duplicates

    def lock(self, node: Node) -> None:
        """Keep the pages from the first to `node` until they are unlocked."""
        for n in node.path():
            self.locked += n.locks == 0
            n.locks += 1

    def relock(self, old: Node, new: Node) -> None:
        """Lock `new`, which lies below `old` or is it, in place of a lock of `old`."""
        for n in new.path():
            if n is old:
                break
            self.locked += n.locks == 0
            n.locks += 1

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of the same node; its path counts as used now.

        Raises:
          ValueError: there is no lock to undo.
        """
        self._clock += 1
        for n in node.path():
            if n.locks == 0:
                raise ValueError(f"Page {n.page} is unlocked more often than it was locked.")
            n.locks -= 1
            n.used = self._clock
            self.locked -= n.locks == 0
        self._offer(node)

    @property
    def evictable(self) -> int:
        """Pages that `evict` can free: a page above a locked one is locked itself."""
        return len(self) - self.locked

    def evict(self, count: int) -> list[Node]:
        """Forget the `count` least recently used pages, or all that can go, leaves first.

        Returns:
          what were their nodes; the pages are the caller's.
        """
        evicted = []
        while len(evicted) < count and self._evictable:
            used, _, node = heapq.heappop(self._evictable)
            if self._current(used, node):
                self._forget(node)
                evicted.append(node)
        return evicted

    def forget(self, node: Node) -> list[int]:
        """Forget `node` and the pages before it, as far as nobody uses them or follows them.

        Returns:
          the pages, which are the caller's.
        """
        pages = []
        while node.parent is not None and self._is_evictable(node):
            pages.append(node.page)
            self._forget(node)
            node = node.parent
        return pages

    def check(self) -> None:
        """Recount everything.

        Raises:
          AssertionError: counts, locks or pages do not agree: a fault of ours.
        """
        nodes = list(self._nodes.values())
        assert sum(n.locks > 0 for n in nodes) == self.locked
        assert len({n.page for n in nodes}) == len(nodes), "a page is in the tree twice"
        assert all(self._nodes[n.name] is n and n.page >= 0 for n in nodes)
        children: dict[int, list[Node]] = {}
        for n in nodes:
            assert n.parent is not None
            assert n.parent is self.root or self._nodes[n.parent.name] is n.parent, "no parent"
            children.setdefault(id(n.parent), []).append(n)
        for n in (self.root, *nodes):
            below = children.get(id(n), [])
            assert n.children == len(below)
            assert n is self.root or n.locks >= sum(child.locks for child in below)
        offered = {id(n) for used, _, n in self._evictable if used == n.used}
        assert all(id(n) in offered for n in nodes if self._is_evictable(n))

    def pages(self) -> list[int]:
        """All pages in the tree."""
        return [node.page for node in self._nodes.values()]

    def _forget(self, node: Node) -> None:
        assert node.parent is not None  # the root is never evictable
        del self._nodes[node.name]
        node.parent.children -= 1
        self._offer(node.parent)

    def _offer(self, node: Node) -> None:
        """Note that a node can go, if it can."""
        if not self._is_evictable(node):
            return
        heapq.heappush(self._evictable, (node.used, next(self._number), node))
        # Every use of a leaf leaves an outdated note; sweep them out before they pile up.
        if len(self._evictable) > 2 * len(self) + 64:
            self._evictable = [e for e in self._evictable if self._current(e[0], e[2])]
            heapq.heapify(self._evictable)

    def _current(self, used: int, node: Node) -> bool:
        return used == node.used and self._nodes.get(node.name) is node and self._is_evictable(node)

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return node.parent is not None and not node.children and node.locks == 0
