"""The prefix tree finds the longest prefix, and forgets what was not used for longest."""

import random

import pytest

from jaxcodec.serve.prefix_tree import Node, PageNames, PrefixTree

PAGE = 2


def names(tokens: list[int], namespace: str = "base") -> PageNames:
    return PageNames(namespace, list(tokens), PAGE)


def match(tree: PrefixTree, tokens: list[int], namespace: str = "base") -> Node:
    return tree.match(names(tokens, namespace), len(tokens) // PAGE)


def insert(
    tree: PrefixTree, tokens: list[int], pages: list[int], namespace: str = "base"
) -> tuple[Node, list[int]]:
    """Hand over a whole text from its first page on, and be done with it."""
    node, duplicates = tree.insert(
        tree.root, names(tokens, namespace).upto(len(tokens) // PAGE), pages
    )
    tree.lock(node)
    tree.unlock(node)
    return node, duplicates


def evict(tree: PrefixTree, count: int) -> list[int]:
    return [node.page for node in tree.evict(count)]


def test_a_name_is_of_all_tokens_up_to_the_page() -> None:
    text = [1, 2, 3, 4]
    growing = names(text)
    first = growing[0]
    assert growing[1] != names([9, 2, 3, 4])[1]
    assert growing[0] != names(text, "other")[0]
    assert first == names([1, 2])[0]
    # [12, 3] is not [1, 23]: tokens have a width
    assert names([12, 3])[0] != names([1, 23])[0]
    with pytest.raises(AssertionError):
        growing[2]


def test_names_follow_the_text_as_it_grows() -> None:
    text = [1, 2]
    growing = PageNames("base", text, PAGE)
    assert len(growing.upto(1)) == 1
    text += [3, 4]
    assert growing[1] == names([1, 2, 3, 4])[1]


def test_the_longest_cached_prefix_of_whole_pages_is_found() -> None:
    tree = PrefixTree()
    insert(tree, [1, 2, 3, 4], [7, 8])
    assert match(tree, [1, 2, 3, 4, 5]).pages() == [7, 8]
    assert match(tree, [1, 2, 3]).pages() == [7]
    assert match(tree, [1, 2, 9, 4]).pages() == [7]
    assert match(tree, [3, 4]).pages() == []


def test_namespaces_do_not_meet() -> None:
    tree = PrefixTree()
    insert(tree, [1, 2], [7])
    assert match(tree, [1, 2], "other").pages() == []


def test_duplicates_are_returned() -> None:
    tree = PrefixTree()
    insert(tree, [1, 2, 3, 4], [7, 8])
    node, duplicates = insert(tree, [1, 2, 3, 4, 5, 6], [5, 9, 10])
    assert node.pages() == [7, 8, 10]
    assert duplicates == [5, 9]


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = PrefixTree()
    insert(tree, [1, 2, 3, 4], [0, 1])
    insert(tree, [1, 2, 5, 6], [9, 2])
    node = match(tree, [1, 2, 3, 4])
    tree.lock(node)
    tree.unlock(node)
    assert evict(tree, 2) == [2, 1]
    assert evict(tree, 9) == [0]


def test_locked_pages_stay() -> None:
    tree = PrefixTree()
    node, _ = insert(tree, [1, 2, 3, 4], [0, 1])
    insert(tree, [1, 2, 5, 6], [9, 2])
    tree.lock(node)
    assert tree.evictable == 1
    assert evict(tree, 3) == [2]
    tree.unlock(node)
    assert evict(tree, 3) == [1, 0]


def test_a_lock_moves_down() -> None:
    tree = PrefixTree()
    node, _ = insert(tree, [1, 2], [0])
    tree.lock(node)
    below, _ = tree.insert(node, names([1, 2, 3, 4, 5, 6]).upto(3)[1:], [1, 2])
    tree.relock(node, below)
    tree.check()
    assert tree.evictable == 0
    tree.unlock(below)
    assert evict(tree, 9) == [2, 1, 0]


def test_forgetting_stops_at_what_others_use() -> None:
    tree = PrefixTree()
    shared, _ = insert(tree, [1, 2], [0])
    mine, _ = insert(tree, [1, 2, 3, 4, 5, 6], [9, 1, 2])
    tree.lock(shared)
    assert tree.forget(mine) == [2, 1]
    assert tree.pages() == [0]
    tree.unlock(shared)
    tree.check()


def test_unlocking_too_often_is_refused() -> None:
    tree = PrefixTree()
    node, _ = insert(tree, [1, 2], [0])
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
        found = []
        for prefix in self.prefixes(namespace, tokens):
            if prefix not in self.page:
                break
            found.append(self.page[prefix])
        return found

    def insert(self, namespace: str, tokens: list[int], pages: list[int]) -> list[int]:
        duplicates = []
        for prefix, page in zip(self.prefixes(namespace, tokens), pages, strict=True):
            if self.page.setdefault(prefix, page) != page:
                duplicates.append(page)
        self.use(namespace, tokens)
        return duplicates

    def use(self, namespace: str, tokens: list[int]) -> None:
        self.clock += 1
        for prefix in self.prefixes(namespace, tokens):
            self.used[prefix] = self.clock

    def lock(self, namespace: str, tokens: list[int], by: int) -> None:
        for prefix in self.prefixes(namespace, tokens):
            self.locks[prefix] = self.locks.get(prefix, 0) + by
        if by < 0:
            self.use(namespace, tokens)

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
    tree, plain = PrefixTree(), PlainTree()
    locked: list[tuple[Node, str, list[int]]] = []
    new_page = iter(range(10**6))
    for _ in range(400):
        namespace = rng.choice("ab")
        tokens = [rng.randrange(2) for _ in range(PAGE * rng.randrange(1, 5))]
        action = rng.choice(["match", "insert", "insert", "lock", "unlock", "evict"])
        if action == "insert":
            pages = [next(new_page) for _ in range(len(tokens) // PAGE)]
            node, duplicates = insert(tree, tokens, pages, namespace)
            assert duplicates == plain.insert(namespace, tokens, pages)
            assert node.pages() == plain.match(namespace, tokens)
        elif action == "unlock" and locked:
            node, namespace, tokens = locked.pop(rng.randrange(len(locked)))
            tree.unlock(node)
            plain.lock(namespace, tokens, -1)
        elif action == "evict" and tree.evictable:
            assert evict(tree, 1) == [plain.evict()]
        else:
            node = match(tree, tokens, namespace)
            assert node.pages() == plain.match(namespace, tokens)
            if action == "lock" and node.depth:
                tokens = tokens[: node.depth * PAGE]
                tree.lock(node)
                plain.lock(namespace, tokens, 1)
                locked.append((node, namespace, tokens))
        tree.check()
        assert sorted(tree.pages()) == sorted(plain.page.values())
