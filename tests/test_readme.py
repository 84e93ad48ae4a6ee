"""The README's file tree names every module, with the first line of its docstring."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ("kernels", "model", "actors", "platform", "jobs", "dashboards")


def tree() -> str:
    """The tree as the README must show it."""
    lines = []
    for part in ("", *PARTS):
        folder = ROOT / "sparseray" / part
        files = sorted(folder.glob("*.py")) if not part else sorted(folder.rglob("*.py"))
        for path in files:
            doc = ast.get_docstring(ast.parse(path.read_text()))
            if path.name != "__init__.py" and doc:
                lines.append(f"{path.relative_to(ROOT)!s:48}{doc.splitlines()[0]}")
    return "\n".join(lines)


def test_the_tree_in_the_readme_is_the_tree_in_the_repository() -> None:
    assert tree() in (ROOT / "README.md").read_text(), f"the README's tree should be:\n{tree()}"
