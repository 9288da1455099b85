# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that the plugin touches, and whether a release has it."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.contract.infer import Reader, is_patch
from scripts.contract.signature import misfit, narrower
from scripts.contract.tree import Definition, Function, Tree, bound_names, own_members, statements

PLUGIN, VLLM = "vllm_nbdiff", "vllm"
# "Upstream: `Class.method`, `function` (vllm/a.py)", "Order: `Class.method` (vllm/a.py): `x`, `y`."
_NAMES = re.compile(r"((?:[^`(]*`[\w.]+`)+)[^`(]*\((vllm/[\w/]+)\.py\)(?::((?:[^`.]*`[\w.]+`)+))?")
_NAME = re.compile(r"`([\w.]+)`")


@dataclass(frozen=True)
class Row:
    """One thing that is touched."""

    kind: str
    what: str
    where: str  # in the plugin
    problem: str | None = None


@dataclass
class Contract:
    """What the plugin touches in one release.

    Attributes:
        rows: with what is wrong.
        texts: the sources of places whose text matters, by their names.
    """

    tree: Tree
    rows: list[Row] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """Of every place whose text matters."""
        return {
            name: hashlib.sha256(text.encode()).hexdigest()[:16]
            for name, text in sorted(self.texts.items())
        }

    def place(self, definition: Definition) -> None:
        """Note the text of a definition."""
        path = self.tree.path(definition.module)
        assert path is not None and isinstance(definition.node, ast.stmt)
        decorators = getattr(definition.node, "decorator_list", [])
        first = min(node.lineno for node in [definition.node, *decorators])
        lines = path.read_text(encoding="utf-8").splitlines()
        self.texts[str(definition)] = "\n".join(lines[first - 1 : definition.node.end_lineno])


def check(plugin: Path, vllm: Path, kernels: Path) -> Contract:
    """What the plugin touches in a release.

    Args:
        plugin: the folder of the package `vllm_nbdiff`.
        vllm: that of the release's package `vllm`.
        kernels: that of `vllm_nbdiff.kernels`.
    """
    tree = Tree({PLUGIN: plugin, VLLM: vllm, f"{PLUGIN}.kernels": kernels})
    contract = Contract(tree)
    for path in sorted(plugin.rglob("*.py")):
        parts = path.relative_to(plugin).with_suffix("").parts
        module = ".".join([PLUGIN, *(part for part in parts if part != "__init__")])
        if not module.startswith(f"{PLUGIN}.kernels"):
            _Module(contract, module).check()
    return contract


class _Module:
    """The checks of one module of the plugin."""

    def __init__(self, contract: Contract, module: str) -> None:
        self.contract, self.tree, self.module = contract, contract.tree, module
        source = self.tree.source(module)
        assert source is not None
        self.source = source

    def check(self) -> None:
        self._imports()
        Reader(self.tree, self.module, VLLM, self._reported).visit(self.source)
        for node in ast.walk(self.source):
            if is_patch(node):
                self._patched(node)
            elif isinstance(node, ast.ClassDef):
                self._overridden(node)
            if isinstance(node, ast.Module | ast.ClassDef | Function):
                self._named(node)
        self._kernels()

    def _add(self, node: ast.AST, kind: str, what: str, problem: str | None) -> None:
        where = f"{self.module}:{getattr(node, 'lineno', 1)}"
        self.contract.rows.append(Row(kind, what, where, problem))

    def _reported(self, node: ast.AST, what: str, kind: str, problem: str | None) -> None:
        self._add(node, kind, what, problem)

    def _imports(self) -> None:
        run_time = {id(node) for node in self._all_statements(self.source.body, False)}
        for node in ast.walk(self.source):
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            if (node.module or "").split(".")[0] != VLLM:
                continue
            for alias in node.names:
                typing = id(node) not in run_time
                found = self.tree.find(node.module or "", alias.name, typing)
                problem = None if found else "cannot be imported"
                self._add(node, "import", f"{node.module}.{alias.name}", problem)

    def _all_statements(self, body: list[ast.stmt], typing: bool) -> Iterator[ast.stmt]:
        """Those of functions and classes too."""
        for node in statements(body, typing):
            yield node
            if isinstance(node, ast.ClassDef | Function):
                yield from self._all_statements(node.body, typing)

    def _patched(self, call: ast.Call) -> None:
        """A replaced function must stand in the very class or module that is patched."""
        owner, name = self._imported(ast.unparse(call.args[0])), ast.literal_eval(call.args[1])
        if owner is None:
            return  # the missing import is a row of its own
        if isinstance(owner.node, ast.ClassDef):
            node, whole = own_members(owner.node).get(name), f"{owner.name}.{name}"
        else:
            node, whole = self.tree.bindings(owner.module, False).get(name), name
        if isinstance(node, Function):
            self._add(call, "patch", f"{owner}.{name}", None)
            self.contract.place(Definition(owner.module, whole, node))
        else:
            self._add(call, "patch", f"{owner}.{name}", "is not defined there")

    def _imported(self, name: str) -> Definition | None:
        """What an import of this module, anywhere in it, binds to a name."""
        for node in ast.walk(self.source):
            if isinstance(node, ast.ImportFrom) and name in bound_names(node):
                return self.tree.find(self.tree.absolute(self.module, node), name, True)
        return None

    def _overridden(self, node: ast.ClassDef) -> None:
        definition = self.tree.find(self.module, node.name)
        if definition is None or definition.node is not node:
            return  # inside a function
        classes, _ = self.tree.lineage(definition)
        upstream = [c for c in classes if c.module.split(".")[0] == VLLM]
        if not upstream:
            return
        nearest: dict[str, Definition] = {}
        for base in upstream:
            for name, member in own_members(base.node).items():
                nearest.setdefault(name, base)
                if isinstance(member, Function) and nearest[name] is base:
                    self._method(node, definition, base, name, member)

    def _method(
        self, node: ast.ClassDef, own: Definition, base: Definition, name: str, method: Function
    ) -> None:
        found = self.tree.member(own, name)
        assert found is not None
        what = f"{base}.{name}"
        if found.module.split(".")[0] == VLLM:
            marks = [ast.unparse(mark) for mark in found.node.decorator_list]  # type: ignore[attr-defined]
            if any("abstractmethod" in mark for mark in marks) and found.node is method:
                self._add(node, "override", what, "is abstract and not defined")
            return
        if not isinstance(found.node, Function):
            return
        static = any(ast.unparse(mark) == "staticmethod" for mark in method.decorator_list)
        self._add(
            found.node, "override", what, None if static else narrower(found.node.args, method.args)
        )
        self.contract.place(Definition(base.module, f"{base.name}.{name}", method))

    def _kernels(self) -> None:
        """Every launch of a kernel must fit its stand-in."""
        table = self.tree.bindings(self.module, False).get("KERNELS")
        value = getattr(table, "value", None)
        prefix = self.tree.bindings(self.module, False).get("_RUNNER")
        if not isinstance(value, ast.Dict) or not isinstance(prefix, ast.Assign):
            return
        for key, stand_in in zip(value.keys, value.values, strict=True):
            assert key is not None
            name = "".join(
                part.value
                for part in ast.walk(key)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
            module, _, kernel = (ast.literal_eval(prefix.value) + name).rpartition(".")
            self._launches(stand_in, module, kernel)

    def _launches(self, stand_in: ast.expr, module: str, kernel: str) -> None:
        own, found = self.tree.resolve(stand_in, self.module), self.tree.find(module, kernel)
        assert own is not None and isinstance(own.node, Function)
        source = self.tree.source(module)
        launches = [
            node
            for node in (ast.walk(source) if source is not None else ())
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and ast.unparse(node.func.value) == kernel
        ]
        if found is None or not launches:
            self._add(own.node, "kernel", f"{module}.{kernel}", "is not launched there")
            return
        for launch in launches:
            self._add(own.node, "kernel", str(found), misfit(launch, own.node.args, False))
        self.contract.place(found)

    def _named(self, node: ast.Module | ast.ClassDef | Function) -> None:
        """What a docstring names under "Upstream:" and "Order:"."""
        text = " ".join((ast.get_docstring(node, clean=True) or "").replace("\n\n", "\0").split())
        for part in text.split("\0"):
            for kind in ("Upstream", "Order"):
                _, found, rest = part.partition(f"{kind}:")
                rest = re.split(r"Remove |Upstream:|Order:", rest)[0]
                if found and not (matches := _NAMES.findall(rest)):
                    self._add(node, kind.lower(), rest.strip(), "names no place")
                for names, path, order in matches if found else ():
                    for name in _NAME.findall(names):
                        self._place(node, kind.lower(), path, name, _NAME.findall(order))

    def _place(self, node: ast.AST, kind: str, path: str, name: str, order: list[str]) -> None:
        module, (first, _, inner) = path.replace("/", "."), name.partition(".")
        found = self.tree.find(module, first)
        if found is not None and inner and isinstance(found.node, ast.ClassDef):
            found = self.tree.member(found, inner)
        if found is None or found.module != module:
            self._add(node, kind, f"{module}.{name}", "is not there")
            return
        uses = [
            name for use in _uses(found.node) for name in order if f".{use}".endswith(f".{name}")
        ]
        firsts = list(dict.fromkeys(uses))
        problem = None if firsts == order else f"uses {firsts}, in this order"
        self._add(node, kind, str(found), problem)
        self.contract.place(found)


def _uses(node: ast.AST) -> list[str]:
    """Dotted names in a definition, in the order of its text."""
    uses = [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]
    uses.sort(key=lambda use: (use.end_lineno or 0, use.end_col_offset or 0))
    return [ast.unparse(use) for use in uses]
