# SPDX-License-Identifier: Apache-2.0
"""Imports inside the package go one way, those inside functions included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vllm_nbdiff
from vllm_nbdiff import kernels

ROOT = Path(vllm_nbdiff.__file__).parent


def module_name(path: Path, root: Path) -> str:
    """`a/b.py` below `root` as `root.a.b`; a package is its `__init__.py`."""
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_time_nodes(node: ast.AST) -> list[ast.AST]:
    """All nodes below `node` but those under `if TYPE_CHECKING:`."""
    nodes = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        nodes += [child, *run_time_nodes(child)]
    return nodes


def imports(root: Path) -> dict[str, set[str]]:
    """Of each module of the package at `root`, the modules of the package that it imports."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found = set()
        for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    found.add(inner if inner in files else base)
        graph[name] = (found & files.keys()) - {name}
    return graph


def test_no_circle() -> None:
    graph = imports(ROOT)
    # The graph is that of the code: a few of its edges, one of them inside a function.
    assert "vllm_nbdiff.config" in graph["vllm_nbdiff.startup"]
    assert "vllm_nbdiff.compat" in graph["vllm_nbdiff"]
    assert "vllm_nbdiff.decoding.rules" in graph["vllm_nbdiff.request"]
    TopologicalSorter(graph).prepare()
    # In a checkout these lie outside the package.
    graph = imports(Path(kernels.__path__[0]))
    assert "kernels.validation" in graph["kernels.write_kv"]
    TopologicalSorter(graph).prepare()


def test_circles_are_found(tmp_path: Path) -> None:
    """Hidden in functions, relative, and not those for type checkers alone."""
    root = tmp_path / "package"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "inner" / "__init__.py").write_text("from .b import g\n")
    (root / "a.py").write_text("def f():\n    from package import inner\n")
    (root / "inner" / "b.py").write_text("if TYPE_CHECKING:\n    import package.a\n")
    TopologicalSorter(imports(root)).prepare()
    (root / "inner" / "b.py").write_text("def g():\n    from .. import a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(root)).prepare()
