"""Who may import whom: the order is written here; how long files and lists of parameters may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import elastic_kernels

ROOT = Path(__file__).parent.parent
PACKAGES = {"poa": ROOT, "elastic_kernels": ROOT / "kernels", "benchmarks": ROOT}

# From the ground up: a module imports from its own floor and those below. Names stand for packages, too.
FLOORS = (
    "errors random options subnets weights files lock drawing device distributed signals progress table "
    "version",
    "data masks multicrop loss_rows block_graphs",
    "backbones heads losses network classifier official",
    "optim tribranch health config presets checkpoint flops micro_batch loader_speed",
    "step plan evaluate selection memory warmup writers metrics report contact_sheet curves export images "
    "initialization validation",
    "train finetune",
    "run embedding",
    "quickstart cli __init__ __main__",
)


def modules(package: str) -> dict[str, Path]:
    """Files of a package by dotted name."""
    root = PACKAGES[package]
    files = (root / package).rglob("*.py")
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


OPTIONAL = {"absent_gpu"}  # modules of elastic_kernels that need Triton, imported where they are used

MODULES = {name: file for package in PACKAGES for name, file in modules(package).items()}


def imports(file: Path, everywhere: bool) -> Iterator[str]:
    """Names that a file imports, at its top or everywhere; a name in a module counts as the module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: expected absolute imports"
            whole = (f"{node.module}.{name.name}" for name in node.names)
            yield from (name if name in MODULES else node.module for name in whole)


def floor(module: str) -> int:
    """That of a module of poa."""
    part = module.split(".")[1] if "." in module else "__init__"
    floors = [number for number, names in enumerate(FLOORS) if part in names.split()]
    assert len(floors) == 1, f"{module}: expected on one floor, got {floors}"
    return floors[0]


@pytest.mark.parametrize(
    ("package", "strangers"), [("elastic_kernels", ("poa", "benchmarks")), ("poa", ("benchmarks",))]
)
def test_nothing_imports_from_a_package_above(package: str, strangers: tuple[str, ...]) -> None:
    for name, file in modules(package).items():
        imported = {stranger for stranger in imports(file, True) if stranger.split(".")[0] in strangers}
        assert not imported, f"{name} imports {imported}"


def test_poa_uses_only_what_elastic_kernels_exports() -> None:
    exported = {*elastic_kernels.__all__, *OPTIONAL}
    for name, file in modules("poa").items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("elastic_kernels"):
                names = {alias.name for alias in node.names}
                assert node.module == "elastic_kernels" and names <= exported, f"{name} imports {names}"


def test_no_floor_of_poa_imports_from_one_above() -> None:
    for name, file in modules("poa").items():
        for used in imports(file, False):
            if used.split(".")[0] == "poa" and used != "poa":
                assert floor(used) <= floor(name), f"{name} imports {used}"


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_circle(package: str) -> None:
    inside = modules(package)
    graph = {
        name: {used for used in imports(file, False) if used in inside} - {name}
        for name, file in inside.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(inside)


MOST_LINES, MOST_PARAMETERS = 400, 10


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_files_and_parameters_are_few(package: str) -> None:
    """Operators of PyTorch and `autograd.Function` dictate the parameters in `triton_ops`."""
    for file in (PACKAGES.get(package, ROOT) / package).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, f"{file}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)) if file.parent.name != "triton_ops" else ():
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(set(names) - {"self", "cls"})
                assert count <= MOST_PARAMETERS, f"{file}:{node.lineno}: {node.name} has {count} parameters"
