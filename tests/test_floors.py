"""The order of the folders: what each may import, late imports included."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "icae_jax"
# From the ground up. Folders of one floor do not import each other; a folder without a floor fails.
FLOORS = (
    {"errors", "files", "lock", "cache"},
    {"models"},
    {"runtime"},
    {"compression"},
    {"objectives"},
    {"interop"},
    {"data"},
    {"training"},
    {"inference"},
    {"evaluation", "performance", "server"},
    {"workflows"},
    {"cli", "__init__"},
    {"__main__"},
)
LOOK_UPS = {"__version__", "__file__"}  # of the package, which every floor may ask for
GROUND = (
    "errors",
    "files",
    "lock",
    "cache",
)  # one floor of files, in which circles alone are refused
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path: pathlib.Path) -> str:
    """The dotted name below the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """The modules of the package that a source file imports, anywhere in it.

    "" is the package itself, of which `import icae_jax` alone uses nothing.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError("write imports in full, so that they can be read")
        if isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "icae_jax":
            names.add(f"icae_jax.{node.attr}")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names.update(str(a.value) for a in node.args if isinstance(a, ast.Constant))
    inside = {name.removeprefix("icae_jax.") for name in names if name.startswith("icae_jax.")}
    modules = set()
    for name in inside - LOOK_UPS:
        while name not in MODULES:  # the module of a function
            name = name.rpartition(".")[0]
        modules.add(name)
    return modules


IMPORTS = {name: imports(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.split(".")[0] or "__init__"


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports of a graph that do not point to a lower floor."""
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if folder(name) != folder(target)
        and not {folder(name), folder(target)} <= set(GROUND)
        and FLOOR[folder(target)] >= FLOOR[folder(name)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a ring, in order; empty where there are none."""
    done: set[str] = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if ring := visit(target, [*path, name]):
                return ring
        done.add(name)
        return []

    return next((ring for name in graph if (ring := visit(name, []))), [])


def test_every_folder_has_a_floor():
    """Breaks when a new folder, or a file loose at the top, has no place in the order."""
    assert {folder(name) for name in MODULES} == set(FLOOR)


def test_imports_point_downwards():
    """Breaks when a module imports from its own floor's other folder, or from a higher floor."""
    assert upward(IMPORTS) == []


def test_no_modules_import_each_other():
    """Breaks when modules of one folder import each other in a ring, late imports included."""
    assert circle(IMPORTS) == []


def test_configurations_import_nothing_of_the_package():
    """Breaks when a configuration can no longer be read without the package's own imports."""
    assert [
        path.name for path in (ROOT / "configs").glob("*.py") if imports(path.read_text())
    ] == []


@pytest.mark.parametrize(
    "source, target",
    [
        ("def f():\n    from icae_jax.training import step", "training.step"),
        ("import icae_jax.cli.main", "cli.main"),
        ("from icae_jax.cli.main import command", "cli.main"),
        ("from icae_jax import load", ""),
        ("from icae_jax import *", ""),
        ("import icae_jax\nicae_jax.load('a')", ""),
        ("import importlib\nimportlib.import_module('icae_jax.cli.main')", "cli.main"),
    ],
)
def test_an_upward_import_is_seen(source, target):
    """Breaks when a way to write an import goes unseen, so that the tests above pass."""
    assert imports(source) == {target}
    assert upward({"models.llama": imports(source)}) == [f"models.llama imports {target}"]
    assert imports("import icae_jax\nprint(icae_jax.__version__)") == set()


def test_a_circle_is_seen():
    """Breaks when the test for circles could not fail."""
    assert circle({"data.a": {"data.b"}, "data.b": {"data.c"}, "data.c": {"data.b"}}) == [
        "data.b",
        "data.c",
        "data.b",
    ]
