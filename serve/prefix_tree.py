"""Pages whose contents are known, found again by their tokens: a radix tree, a page a digit.

A node is one full page of keys and values. The path to it spells the tokens before it, and its
namespace the weights that wrote it: a content hash, never a model's name, so that all models that
leave the writing to the same encoder find each other's pages.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence


class Node:
    """A page and the tokens in it.

    Attributes:
      key: the page's tokens; none for the root of a namespace.
      page: its number in the cache; -1 for a root, which has none.
      parent: the page before it; None for a root.
      children: pages that follow, by their tokens.
      depth: pages on the path, its own included.
      locks: requests that use it or a page below it.
      used: time of the last use, in the tree's own count.
    """

    __slots__ = ("children", "depth", "key", "locks", "page", "parent", "used")

    def __init__(self, key: tuple[int, ...], page: int, parent: "Node | None"):
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.depth = 0 if parent is None else parent.depth + 1
        self.locks = 0
        self.used = 0

    def path(self) -> Iterator["Node"]:
        """This node and those above it, the root of the namespace left out."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def pages(self) -> list[int]:
        """Pages from the first to this one's."""
        return [node.page for node in self.path()][::-1]


class PrefixTree:
    """Cached pages of all namespaces; those that no request uses go in order of last use."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.size = 0  # pages in the tree
        self.locked = 0  # of them, pages that a request uses
        self._roots: dict[str, Node] = {}
        # (used, number, node) of every node that was evictable when pushed; stale ones are
        # recognised when they come up.
        self._evictable: list[tuple[int, int, Node]] = []
        self._number = itertools.count()
        self._clock = 0

    def match(self, namespace: str, tokens: Sequence[int]) -> Node:
        """The deepest node whose path is a prefix of `tokens`; a root (depth 0) if none is."""
        node = self._root(namespace)
        self._clock += 1
        for key in self._keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            self._touch(node)
        return node

    def insert(
        self, namespace: str, tokens: Sequence[int], pages: Sequence[int]
    ) -> tuple[Node, list[int]]:
        """Hand over full pages: `pages[i]` holds tokens [i * page_size, (i + 1) * page_size).

        Returns:
          (the deepest node of the path, the pages of the caller that the tree did not take since
          it holds the same tokens in another page). A page that the tree gave out is no duplicate
          of itself.
        """
        node, duplicates = self._root(namespace), []
        self._clock += 1
        for key, page in zip(self._keys(tokens), pages, strict=True):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, page, node)
                self.size += 1
            elif child.page != page:
                duplicates.append(page)
            node = child
            self._touch(node)
        return node, duplicates

    def lock(self, node: Node) -> None:
        """Keep the pages from the first to `node` until they are unlocked."""
        for n in node.path():
            self.locked += n.locks == 0
            n.locks += 1

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of the same node."""
        for n in node.path():
            if n.locks == 0:
                raise ValueError(f"Page {n.page} is unlocked more often than it was locked.")
            n.locks -= 1
            self.locked -= n.locks == 0
        self._offer(node)

    @property
    def evictable(self) -> int:
        """Pages that `evict` can free: a page above a locked one is locked itself."""
        return self.size - self.locked

    def evict(self, count: int) -> list[int]:
        """Forget the `count` least recently used pages, or all that can go, leaves first."""
        freed = []
        while len(freed) < count and self._evictable:
            used, _, node = heapq.heappop(self._evictable)
            if node.used != used or not self._is_evictable(node):
                continue
            parent = node.parent
            assert parent is not None  # roots are never evictable
            del parent.children[node.key]
            self.size -= 1
            freed.append(node.page)
            node.page = -1
            self._offer(parent)
        return freed

    def check(self) -> None:
        """Recount everything.

        Raises:
          AssertionError: counts, locks or pages do not agree: a fault of ours.
        """
        nodes = list(self._walk())
        assert len(nodes) == self.size, (len(nodes), self.size)
        assert sum(n.locks > 0 for n in nodes) == self.locked
        assert len({n.page for n in nodes}) == len(nodes), "a page is in the tree twice"
        for n in nodes:
            assert n.locks >= sum(child.locks for child in n.children.values())
            assert n.used >= max((child.used for child in n.children.values()), default=0)
        offered = {id(n) for used, _, n in self._evictable if used == n.used}
        assert all(id(n) in offered for n in nodes if self._is_evictable(n))

    def pages(self) -> list[int]:
        """All pages in the tree."""
        return [node.page for node in self._walk()]

    def _walk(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _root(self, namespace: str) -> Node:
        return self._roots.setdefault(namespace, Node((), -1, None))

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self.page_size
        for start in range(0, len(tokens) - size + 1, size):
            yield tuple(tokens[start : start + size])

    def _touch(self, node: Node) -> None:
        node.used = self._clock
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Note that a node can go, if it can."""
        if not self._is_evictable(node):
            return
        heapq.heappush(self._evictable, (node.used, next(self._number), node))
        # Every use of a leaf leaves an outdated note; sweep them out before they pile up.
        if len(self._evictable) > 2 * self.size + 64:
            self._evictable = [e for e in self._evictable if self._current(e)]
            heapq.heapify(self._evictable)

    def _current(self, entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        return used == node.used and self._is_evictable(node)

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return node.page >= 0 and not node.children and node.locks == 0
