"""The shape of the package: which part may import which, and no folder that shadows the standard library."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDER = ["kernels", "model", "actors", "platform", "jobs"]
FLOORS = {
    "actors": [
        "wire",
        "state",
        "exchange",
        "peers",
        "training",
        "serving",
        "observation",
        "installation",
        "gathering",
        "job",
        "engine_role",
        "roles",
        "slot",
    ],
    "platform": [
        "settings",
        "cluster_config",
        "plain_values",
        "config",
        "metrics",
        "planning",
        "run",
        "gpu",
        "kernels_fit",
        "device",
        "reachable",
        "checks",
        "opening",
        "fleet",
        "offers",
        "workload",
        "installing",
        "generations",
        "reconciler",
        "training",
        "spikes",
        "saving",
        "step_reports",
        "trainer",
        "autoscaler",
        "versions",
        "weights",
        "publishing",
        "serving",
        "server",
        "composition",
        "job",
        "loans",
        "scheduler_actor",
        "scheduler",
        "ray_settings",
        "cluster",
        "head",
    ],
    "jobs": ["signals", "tokens", "http", "evaluation", "watch"],
}
FILE_LINES, FUNCTION_LINES = 400, 60
LEAVES = {"errors", "log", "__init__"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_of(path: pathlib.Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "sparseray"}
    return {name for name in found if name.split(".")[0] == "sparseray" and name != "sparseray"}


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_one_way(part: str) -> None:
    allowed = set(ORDER[: ORDER.index(part) + 1]) | LEAVES | ({"dashboards"} if part == "jobs" else set())
    for path in sorted((ROOT / "sparseray" / part).rglob("*.py")):
        foreign = {name for name in imports_of(path) if part_of(name) not in allowed}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


@pytest.mark.parametrize("part", FLOORS)
def test_imports_go_down_between_the_folders_of_a_part(part: str) -> None:
    """A file stands on the floor of its folder, or of its own name beside the folders."""
    floors = FLOORS[part]
    for path in sorted((ROOT / "sparseray" / part).rglob("*.py")):
        own = path.relative_to(ROOT / "sparseray" / part).with_suffix("").parts[0]
        used = {name.split(".")[2] for name in imports_of(path) if name.startswith(f"sparseray.{part}.")} - {
            own
        }
        above = {
            u for u in used if own in floors and (u not in floors or floors.index(u) > floors.index(own))
        }
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)} from above"


def test_the_model_calls_operations_and_no_kernel_or_reference() -> None:
    allowed = {"sparseray.kernels.ops", "sparseray.kernels.settings"}
    for path in sorted((ROOT / "sparseray" / "model").rglob("*.py")):
        used = {name for name in imports_of(path) if part_of(name) == "kernels"}
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"


def test_the_kind_of_attention_is_asked_for_in_one_place() -> None:
    for path in sorted((ROOT / "sparseray" / "model").rglob("*.py")):
        may_name = path.parent.name == "attention" or path.name in ("config.py", "presets.py")
        kinds = set() if may_name else {"full", "nsa"}
        found = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        } & kinds
        assert not found, f"{path.relative_to(ROOT)} names {sorted(found)}"


def test_dashboards_read_only_the_metric_registry() -> None:
    for path in sorted((ROOT / "sparseray" / "dashboards").rglob("*.py")):
        foreign = {
            name
            for name in imports_of(path)
            if part_of(name) not in LEAVES | {"dashboards"}
            and not name.startswith("sparseray.platform.metrics")
        }
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_no_root_folder_shadows_the_standard_library() -> None:
    import sys

    shadows = {p.name for p in ROOT.iterdir() if p.is_dir()} & set(sys.stdlib_module_names)
    assert not shadows


def functions_of(path: pathlib.Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_device_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled by Triton or Gluon: what is split there costs registers."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("folder", ["sparseray", "tests", "benchmarks"])
def test_files_and_functions_are_short(folder: str) -> None:
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        where, lines = path.relative_to(ROOT), len(path.read_text().splitlines())
        if lines > FILE_LINES:
            long.append(f"{where}: {lines} lines")
        for function in functions_of(path):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION_LINES and not (where.parts[1] == "kernels" and is_device_code(function)):
                long.append(f"{where}: {function.name} has {lines} lines")
    assert not long, "split by idea: " + "; ".join(long)


@pytest.mark.parametrize("part", ["actors", "platform"])
def test_public_functions_of_two_parameters_say_what_each_is(part: str) -> None:
    silent = []
    for path in sorted((ROOT / "sparseray" / part).rglob("*.py")):
        tree = ast.parse(path.read_text())
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and not c.name.startswith("_")]
        for node in [*tree.body, *(member for found in classes for member in found.body)]:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            said = "Args:" in (ast.get_docstring(node) or "")
            if len({*names} - {"self", "cls"}) >= 2 and not said:
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent, "lacks Args: " + "; ".join(silent)


@pytest.mark.xdist_group("alone")
def test_groups_of_tests_are_known_to_the_runner(request: pytest.FixtureRequest) -> None:
    """A pytest that is newer than the runner takes no note of groups, and clusters would meet."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@alone")
