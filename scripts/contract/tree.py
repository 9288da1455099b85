# SPDX-License-Identifier: Apache-2.0
"""Definitions in source trees, found without importing anything."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a module, class, function, assignment, or an import from outside."""

    module: str
    name: str  # with its class, "" for a module
    node: ast.AST

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Type:
    """An annotation and the module that it stands in."""

    expression: ast.expr
    module: str


def statements(body: list[ast.stmt], typing: bool) -> Iterator[ast.stmt]:
    """Those of a body and of its if, try and with blocks; `typing`: under TYPE_CHECKING too."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if typing or ast.unparse(node.test) != "TYPE_CHECKING":
                yield from statements(node.body, typing)
            yield from statements(node.orelse, typing)
        elif isinstance(node, ast.Try):
            handlers = [line for handler in node.handlers for line in handler.body]
            yield from statements(
                [*node.body, *node.orelse, *node.finalbody, *handlers],
                typing,
            )
        elif isinstance(node, ast.With):
            yield from statements(node.body, typing)


def bound_names(node: ast.stmt) -> list[str]:
    """What a statement binds, star imports as "*"."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [leaf for target in targets if target is not None for leaf in ast.walk(target)]
    return [leaf.id for leaf in names if isinstance(leaf, ast.Name)]


class Tree:
    """Packages by name, each in a folder."""

    def __init__(self, folders: dict[str, Path]) -> None:
        """
        Args:
            folders: of each package, its own folder; the longest name that fits wins.
        """
        self.folders = dict(sorted(folders.items(), key=lambda item: -len(item[0])))
        self.path = functools.cache(self._path)
        self.source = functools.cache(self._source)
        self.bindings = functools.cache(self._bindings)

    def _path(self, module: str) -> Path | None:
        """The file of a module, None outside the packages."""
        for package, folder in self.folders.items():
            if module == package or module.startswith(f"{package}."):
                inner = folder.joinpath(*module[len(package) :].split(".")[1:])
                found = (inner.with_suffix(".py"), inner / "__init__.py")
                return next((path for path in found if path.is_file()), None)
        return None

    def _source(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return None if path is None else _parsed(path.resolve())

    def _bindings(self, module: str, typing: bool) -> dict[str, ast.stmt]:
        """Statements by the names that they bind; definitions win over assignments."""
        source = self.source(module)
        found: dict[str, ast.stmt] = {}
        for node in statements(source.body, typing) if source is not None else ():
            for name in bound_names(node):
                if name not in found or not isinstance(node, ast.Assign | ast.AnnAssign):
                    found.setdefault(name, node)
        return found

    def find(self, module: str, name: str, typing: bool = False) -> Definition | None:
        """The definition of `module.name`, through re-exports; a submodule where none is bound.

        Args:
            typing: what is there for type checkers alone counts.
        """
        bindings = self.bindings(module, True)
        lazy = "__getattr__" in bindings
        node = self.bindings(module, typing or lazy).get(name)
        if node is None:
            if (inner := self.source(f"{module}.{name}")) is not None:
                return Definition(f"{module}.{name}", "", inner)
            return self._starred(module, name, typing) or (
                self._lazy(module, name) if lazy else None
            )
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            origin = self.absolute(module, node)
            if not self.owns(origin):
                return Definition(origin, alias.name, node)
            return self.find(origin, alias.name, typing)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            origin = alias.name if alias.asname else name
            return Definition(origin, "", self.source(origin) or node)
        return Definition(module, name, node)

    def _starred(self, module: str, name: str, typing: bool) -> Definition | None:
        """What a `from x import *` brings."""
        for node in statements(getattr(self.source(module), "body", []), typing):
            if isinstance(node, ast.ImportFrom) and bound_names(node) == ["*"]:
                origin = self.absolute(module, node)
                if origin != module and (found := self.find(origin, name, typing)) is not None:
                    return found
        return None

    def _lazy(self, module: str, name: str) -> Definition | None:
        """What a module's `__getattr__` imports by a table of "module:name"."""
        source = self.source(module)
        for table in ast.walk(source) if source is not None else ():
            if not isinstance(table, ast.Dict):
                continue
            for key, value in zip(table.keys, table.values, strict=True):
                if not (isinstance(key, ast.Constant) and key.value == name):
                    continue
                if isinstance(value, ast.Constant) and ":" in str(value.value):
                    origin, _, attribute = str(value.value).partition(":")
                    return self.find(module + origin, attribute)
                return Definition(module, name, value)
        return None

    def owns(self, module: str) -> bool:
        """Whether a module lies in one of the packages."""
        return any(module == name or module.startswith(f"{name}.") for name in self.folders)

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that `from x import` names in `module`."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        is_package = path is not None and path.stem == "__init__"
        above = module.split(".")[: len(module.split(".")) - node.level + is_package]
        return ".".join([*above, *filter(None, [node.module])])

    def resolve(self, expression: ast.expr, module: str) -> Definition | None:
        """What a (dotted) name in `module` stands for."""
        if isinstance(expression, ast.Name):
            return self.find(module, expression.id, typing=True)
        if isinstance(expression, ast.Attribute):
            base = self.resolve(expression.value, module)
            if base is not None and isinstance(base.node, ast.Module):
                return self.find(base.module, expression.attr, typing=True)
        return None

    def lineage(self, definition: Definition) -> tuple[list[Definition], bool]:
        """A class and its bases, nearest first, and whether all of them are in the packages."""
        assert isinstance(definition.node, ast.ClassDef)
        classes, closed = [definition], True
        for base in definition.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            found = self.resolve(name, definition.module)
            if found is not None and isinstance(found.node, ast.ClassDef):
                above, above_closed = self.lineage(found)
                classes = [c for c in classes if c not in above] + above
                closed &= above_closed
            else:
                closed &= ast.unparse(name) in ("ABC", "Generic", "Protocol", "object")
        return classes, closed

    def member(self, definition: Definition, name: str) -> Definition | None:
        """What defines an attribute of a class or of its instances, nearest class first."""
        for owner in self.lineage(definition)[0]:
            if (node := own_members(owner.node).get(name)) is not None:
                return Definition(owner.module, f"{owner.name}.{name}", node)
        return None


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_members(node: ast.AST) -> dict[str, ast.stmt]:
    """Statements by the attribute that they define, in a class body or on `self` in a method."""
    assert isinstance(node, ast.ClassDef)
    found: dict[str, ast.stmt] = {}
    for statement in statements(node.body, True):
        for name in bound_names(statement):
            found.setdefault(name, statement)
    for method in statements(node.body, True):
        if not isinstance(method, Function):
            continue
        for inner in ast.walk(method):
            if isinstance(inner, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                for leaf in (leaf for target in targets for leaf in ast.walk(target)):
                    if isinstance(leaf, ast.Attribute) and ast.unparse(leaf.value) == "self":
                        found.setdefault(leaf.attr, inner)
    return found
