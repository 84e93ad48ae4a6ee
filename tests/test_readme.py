"""The README's tree names every folder of the package, with the first line of its docstring."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("kernels", "model", "actors", "platform", "jobs", "dashboards")


def first_line(path: pathlib.Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def tree() -> str:
    """The tree as the README must show it."""
    lines = []
    for part in PARTS:
        top = ROOT / "sparseray" / part
        for folder in (top, *sorted(path.parent for path in top.rglob("__init__.py") if path.parent != top)):
            name = f"{folder.relative_to(ROOT)}/"
            lines.append(f"{name:31}{first_line(folder / '__init__.py')}")
    return "\n".join(lines)


def test_the_tree_in_the_readme_is_the_tree_in_the_repository() -> None:
    assert tree() in (ROOT / "README.md").read_text(), f"the README's tree should be:\n{tree()}"
    assert len(tree().splitlines()) <= 30


def test_every_file_says_what_it_is_in_its_first_line() -> None:
    silent = [str(p.relative_to(ROOT)) for p in (ROOT / "sparseray").rglob("*.py") if not first_line(p)]
    assert not silent


def test_a_step_and_a_request_are_read_in_the_files_that_the_architecture_lists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for what, most in (("A training step", 15), ("A request", 12)):
        paragraph = text.split(f"{what} is read in this order:")[1].split("\n\n")[0]
        files = re.findall(r"`([\w/]+\.py)`", paragraph)
        assert 5 < len(files) <= most
        assert [file for file in files if not (ROOT / "sparseray" / file).is_file()] == []
