"""The rules of the house, read off the source: who may import whom, and how long things may get."""

import ast
import collections
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("pallas_kernels", "models", "train", "serve", "demo")
# What each part may import besides itself: only what lies beneath it.
BENEATH = {
    "codec": set(),
    "pallas_kernels": {"codec"},
    "models": {"codec", "pallas_kernels"},
    "train": {"codec", "pallas_kernels", "models"},
    "serve": {"codec", "pallas_kernels", "models"},
    "demo": {"codec", "pallas_kernels", "models", "train", "serve"},
}
# The command line reaches every part.
COMMAND_LINE = ROOT / "jaxcodec" / "__main__.py"
# The vague names that end up holding everything.
VAGUE_NAMES = {"base.py", "common.py", "helpers.py", "misc.py", "utils.py"}

FILE_LINES = collections.defaultdict(lambda: 500, pallas_kernels=600)
# Primitives of one kernel and their twins, which nothing else calls.
PRIMITIVES = ("threads.py", "interpreted.py")
# A kernel body is one function by construction.
FUNCTION_LINES = collections.defaultdict(lambda: 60, pallas_kernels=150)


def sources(part: str) -> list[pathlib.Path]:
    """The Python files of a part, each once: links in jaxcodec/ are left out."""
    if part != "codec":
        return sorted((ROOT / part).rglob("*.py"))
    found = (ROOT / "jaxcodec").rglob("*.py")
    return sorted(path for path in found if path.resolve().is_relative_to(ROOT / "jaxcodec"))


CODE = [(part, path) for part in BENEATH for path in sources(part)]


@pytest.fixture(scope="module")
def trees() -> dict[pathlib.Path, ast.Module]:
    """The syntax tree of every file of the five folders and the codec."""
    return {path: ast.parse(path.read_text(), str(path)) for _, path in CODE}


def imported(tree: ast.Module) -> list[str]:
    """Full dotted names of all imports, at any depth; a relative one begins with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def part_of(name: str) -> str | None:
    """The part that an imported name belongs to; None for other people's packages."""
    package, _, rest = name.partition(".")
    if package != "jaxcodec":
        return None
    head = rest.partition(".")[0]
    return head if head in FOLDERS else "codec"


def length(node: ast.FunctionDef) -> int:
    """Lines of a function, docstring included and decorators not."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def place(path: pathlib.Path, line: int | None = None) -> str:
    name = str(path.relative_to(ROOT))
    return name if line is None else f"{name}:{line}"


def test_every_part_is_seen() -> None:
    assert {part for part, _ in CODE} == set(BENEATH)


def test_imports_point_down_only(trees) -> None:
    breaches = [
        f"{place(path)}: {part} imports {name}"
        for part, path in CODE
        if path != COMMAND_LINE
        for name in imported(trees[path])
        if part_of(name) not in {None, part} | BENEATH[part]
    ]
    assert not breaches, "\n".join(breaches)


def test_imports_go_through_jaxcodec() -> None:
    everywhere = [path for folder in ("tests", "benchmarks", "scripts") for path in sources(folder)]
    breaches = [
        f"{place(path)}: {name}"
        for path in [path for _, path in CODE] + everywhere
        for name in imported(ast.parse(path.read_text()))
        if name.startswith(".") or name.partition(".")[0] in FOLDERS
    ]
    assert not breaches, "\n".join(breaches)


def test_the_codec_knows_neither_flax_nor_pallas(trees) -> None:
    breaches = [
        f"{place(path)}: {name}"
        for path in sources("codec")
        if path != COMMAND_LINE
        for name in imported(trees[path])
        if name.partition(".")[0] == "flax" or name.startswith("jax.experimental.pallas")
    ]
    assert not breaches, "\n".join(breaches)


def test_files_are_short_and_named_for_what_they_hold() -> None:
    breaches = [
        f"{place(path)}: {len(path.read_text().splitlines())} lines, at most {FILE_LINES[part]}"
        for part, path in CODE
        if len(path.read_text().splitlines()) > FILE_LINES[part]
    ]
    breaches += [place(path) for _, path in CODE if path.name in VAGUE_NAMES]
    assert not breaches, "\n".join(breaches)


def test_functions_are_short(trees) -> None:
    breaches = [
        f"{place(path, node.lineno)}: {node.name} has {length(node)} lines, at most "
        f"{FUNCTION_LINES[part]}"
        for part, path in CODE
        for node in ast.walk(trees[path])
        if isinstance(node, ast.FunctionDef)
        if length(node) > FUNCTION_LINES[part]
    ]
    assert not breaches, "\n".join(breaches)


def test_public_functions_are_documented_and_typed(trees) -> None:
    breaches = [
        f"{place(path, node.lineno)}: {node.name}"
        for _, path in CODE
        if path.name not in PRIMITIVES
        for node in trees[path].body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if node.returns is None or ast.get_docstring(node) is None
    ]
    assert not breaches, "\n".join(breaches)
