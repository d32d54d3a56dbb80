"""The prefix tree finds the longest prefix, and forgets what was not used for longest."""

import random

import pytest

from jaxcodec.serve.prefix_tree import Node, PrefixTree

PAGE = 2


def test_the_longest_cached_prefix_of_whole_pages_is_found() -> None:
    tree = PrefixTree(PAGE)
    tree.insert("base", [1, 2, 3, 4], [7, 8])
    assert tree.match("base", [1, 2, 3, 4, 5]).pages() == [7, 8]
    assert tree.match("base", [1, 2, 3]).pages() == [7]
    assert tree.match("base", [1, 2, 9, 4]).pages() == [7]
    assert tree.match("base", [3, 4]).pages() == []


def test_namespaces_do_not_meet() -> None:
    tree = PrefixTree(PAGE)
    tree.insert("base", [1, 2], [7])
    assert tree.match("other", [1, 2]).pages() == []


def test_duplicates_are_returned_and_own_pages_are_not() -> None:
    tree = PrefixTree(PAGE)
    tree.insert("base", [1, 2, 3, 4], [7, 8])
    node, duplicates = tree.insert("base", [1, 2, 3, 4, 5, 6], [7, 9, 10])
    assert node.pages() == [7, 8, 10]
    assert duplicates == [9]


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = PrefixTree(PAGE)
    tree.insert("base", [1, 2, 3, 4], [0, 1])
    tree.insert("base", [1, 2, 5, 6], [0, 2])
    tree.match("base", [1, 2, 3, 4])
    assert tree.evict(2) == [2, 1]
    assert tree.evict(9) == [0]


def test_locked_pages_stay() -> None:
    tree = PrefixTree(PAGE)
    node, _ = tree.insert("base", [1, 2, 3, 4], [0, 1])
    tree.insert("base", [1, 2, 5, 6], [0, 2])
    tree.lock(node)
    assert tree.evictable == 1
    assert tree.evict(3) == [2]
    tree.unlock(node)
    assert tree.evict(3) == [1, 0]


def test_unlocking_too_often_is_refused() -> None:
    tree = PrefixTree(PAGE)
    node, _ = tree.insert("base", [1, 2], [0])
    with pytest.raises(ValueError, match="more often"):
        tree.unlock(node)


class PlainTree:
    """The same, obviously right: every cached prefix in a dictionary, with its last use."""

    def __init__(self) -> None:
        self.page: dict[tuple, int] = {}
        self.used: dict[tuple, int] = {}
        self.locks: dict[tuple, int] = {}
        self.clock = 0

    def prefixes(self, namespace: str, tokens: list[int]) -> list[tuple]:
        return [(namespace, *tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]

    def match(self, namespace: str, tokens: list[int]) -> list[int]:
        self.clock += 1
        found = []
        for prefix in self.prefixes(namespace, tokens):
            if prefix not in self.page:
                break
            self.used[prefix] = self.clock
            found.append(self.page[prefix])
        return found

    def insert(self, namespace: str, tokens: list[int], pages: list[int]) -> list[int]:
        self.clock += 1
        duplicates = []
        for prefix, page in zip(self.prefixes(namespace, tokens), pages, strict=True):
            if self.page.setdefault(prefix, page) != page:
                duplicates.append(page)
            self.used[prefix] = self.clock
        return duplicates

    def lock(self, namespace: str, tokens: list[int], by: int) -> None:
        for prefix in self.prefixes(namespace, tokens):
            self.locks[prefix] = self.locks.get(prefix, 0) + by

    def evict(self) -> int:
        leaves = [
            p
            for p in self.page
            if not self.locks.get(p)
            and not any(len(q) == len(p) + PAGE and q[: len(p)] == p for q in self.page)
        ]
        oldest = min(leaves, key=lambda p: self.used[p])
        return self.page.pop(oldest)


@pytest.mark.parametrize("seed", range(5))
def test_random_use_agrees_with_the_plain_tree(seed: int) -> None:
    rng = random.Random(seed)
    tree, plain = PrefixTree(PAGE), PlainTree()
    locked: list[tuple[Node, str, list[int]]] = []
    new_page = iter(range(10**6))
    for _ in range(400):
        namespace = rng.choice("ab")
        tokens = [rng.randrange(2) for _ in range(PAGE * rng.randrange(1, 5))]
        action = rng.choice(["match", "insert", "insert", "lock", "unlock", "evict"])
        if action == "insert":
            held = tree.match(namespace, tokens).pages()
            plain.match(namespace, tokens)
            pages = [p if rng.random() < 0.5 else next(new_page) for p in held]
            pages += [next(new_page) for _ in range(len(tokens) // PAGE - len(held))]
            node, duplicates = tree.insert(namespace, tokens, pages)
            assert duplicates == plain.insert(namespace, tokens, pages)
            assert node.pages() == plain.match(namespace, tokens)
            tree.match(namespace, tokens)
        elif action == "unlock" and locked:
            node, namespace, tokens = locked.pop(rng.randrange(len(locked)))
            tree.unlock(node)
            plain.lock(namespace, tokens, -1)
        elif action == "evict" and tree.evictable:
            assert tree.evict(1) == [plain.evict()]
        else:
            node = tree.match(namespace, tokens)
            assert node.pages() == plain.match(namespace, tokens)
            if action == "lock":
                tokens = tokens[: node.depth * PAGE]
                tree.lock(node)
                plain.lock(namespace, tokens, 1)
                locked.append((node, namespace, tokens))
        tree.check()
        assert sorted(tree.pages()) == sorted(plain.page.values())
