# SPDX-License-Identifier: Apache-2.0
"""What the plugin's expressions stand for, as far as annotations tell, and what they touch."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TypeGuard

from scripts.contract.signature import constructor, misfit
from scripts.contract.tree import Definition, Function, Tree, Type

Value = Definition | Type | None
"""Something that is defined; an object of some type; or unknown."""

# Parameters that the plugin annotates as Any, or not at all, and what they are by their names.
KNOWN_NAMES = {"vllm_config": ("vllm.config", "VllmConfig")}
_SEQUENCES = {"list", "tuple", "set", "Sequence", "Iterable", "Iterator", "deque", "type"}

Report = Callable[[ast.AST, str, str, str | None], None]
"""Takes a node, what is touched, how ("field" or "call"), and what is wrong."""


class Reader(ast.NodeVisitor):
    """Reads one module of the plugin and reports what it touches in `package`."""

    def __init__(self, tree: Tree, module: str, package: str, report: Report) -> None:
        self.tree, self.module, self.package, self.report = tree, module, package, report
        source = ast.walk(tree.source(module) or ast.Module([], []))
        attributes = (node for node in source if isinstance(node, ast.Attribute))
        self.stored = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
        self.scope: dict[str, Value] = {}
        self.owners: dict[str, Definition] = {}  # of patches, by the function that makes them

    # Statements, in order.

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.scope[alias.asname or alias.name] = self.tree.find(
                self.tree.absolute(self.module, node), alias.name, typing=True
            )

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        found = self.tree.find(self.module, node.name)
        self._inside(node, {"self": Type(ast.Name(node.name), self.module)} if found else {})

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        given: dict[str, Value] = {}
        args = node.args
        for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]:
            if arg.arg in KNOWN_NAMES:
                given[arg.arg] = self._object(self.tree.find(*KNOWN_NAMES[arg.arg]))
            elif arg.annotation is not None:
                given[arg.arg] = Type(arg.annotation, self.module)
        given.pop("self", None)
        self._inside(node, given)

    def _inside(self, node: ast.ClassDef | ast.FunctionDef, given: dict[str, Value]) -> None:
        scope, owners = self.scope, self.owners
        self.scope, self.owners = scope | given, dict(owners)
        if node.name in owners:
            self.scope["self"] = self._object(owners[node.name])
        # Functions come before the call that says whose they are to be.
        for statement in node.body:
            if isinstance(statement, ast.ImportFrom):
                self.visit_ImportFrom(statement)
        for call in (inner for inner in ast.walk(node) if is_patch(inner)):
            owner, maker = self.value(call.args[0]), call.args[2]
            if isinstance(owner, Definition) and isinstance(maker, ast.Name):
                self.owners[maker.id] = owner
        for statement in node.body:
            self.visit(statement)
        self.scope, self.owners = scope, owners

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self._bind(target, node.value, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.value(node.value)
        if isinstance(node.target, ast.Name):
            self.scope[node.target.id] = Type(node.annotation, self.module)

    def _bind(self, target: ast.expr, expression: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.scope[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(expression, ast.Tuple):
            for inner, part in zip(target.elts, expression.elts, strict=False):
                self._bind(inner, part, self.value(part))
        elif not isinstance(target, ast.Tuple):
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node)
        for condition in node.ifs:
            self.visit(condition)

    def _loop(self, node: ast.For | ast.comprehension) -> None:
        element = self._element(self.value(node.iter))
        if isinstance(node.target, ast.Name):
            self.scope[node.target.id] = element

    def _comprehension(self, node: ast.AST) -> None:
        for generator in node.generators:  # type: ignore[attr-defined]
            self.visit(generator)
        for part in ("elt", "key", "value"):
            if (inner := getattr(node, part, None)) is not None:
                self.visit(inner)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    # Expressions.

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.value(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.value(node)

    def value(self, node: ast.expr) -> Value:
        """What an expression stands for; reports all that it touches."""
        if isinstance(node, ast.Name):
            known = self.scope.get(node.id)
            return known if node.id in self.scope else self.tree.find(self.module, node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, self.value(node.value))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            self.visit(node.slice)
            return self._element(self.value(node.value))
        if isinstance(node, ast.BoolOp):
            values = [self.value(part) for part in node.values]
            return next((value for value in values if value is not None), None)
        if isinstance(node, ast.IfExp):
            self.visit(node.test)
            return self.value(node.body) or self.value(node.orelse)
        self.generic_visit(node)
        return None

    def _attribute(self, node: ast.Attribute, base: Value) -> Value:
        definition = self._class(base) if isinstance(base, Type) else base
        if definition is None:
            return None
        if isinstance(definition.node, ast.Module):
            found = self.tree.find(definition.module, node.attr, typing=True)
            self._touch(node, definition, node.attr, found is not None)
            return self._typed(found)
        if not isinstance(definition.node, ast.ClassDef):
            return None
        found = self.tree.member(definition, node.attr)
        classes, closed = self.tree.lineage(definition)
        has_hook = self.tree.member(definition, "__getattr__") is not None
        if found is not None:
            self._touch(
                node,
                Definition(found.module, found.name.rpartition(".")[0], found.node),
                node.attr,
                True,
            )
        elif closed and not has_hook and not node.attr.startswith("__"):
            upstream = next(filter(self._is_touched, classes), definition)
            self._touch(node, upstream, node.attr, False)
        if found is None:
            return None
        is_enum = any("Enum" in ast.unparse(b) for c in classes for b in c.node.bases)  # type: ignore[attr-defined]
        if is_enum and isinstance(found.node, ast.Assign):
            return self._object(definition)
        return self._typed(found)

    def _touch(self, node: ast.AST, owner: Definition, name: str, there: bool) -> None:
        # What a patch adds to an object of vLLM is not there.
        if self._is_touched(owner) and (there or name not in self.stored):
            self.report(node, f"{owner}.{name}", "field", None if there else "is not there")

    def _is_touched(self, definition: Definition) -> bool:
        return (definition.module + ".").startswith(self.package + ".")

    def _call(self, node: ast.Call) -> Value:
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.value(argument)
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            return self.scope.get("self")
        called = self.value(node.func)
        if not isinstance(called, Definition):
            return None
        if isinstance(called.node, ast.ClassDef):
            self._arguments(node, called, constructor(self.tree, called), True)
            return self._object(called)
        if isinstance(called.node, Function):
            marks = {ast.unparse(mark) for mark in called.node.decorator_list}
            bound = "." in called.name and "staticmethod" not in marks
            if "contextmanager" not in marks:
                self._arguments(node, called, called.node.args, bound)
            if called.node.returns is not None:
                return Type(called.node.returns, called.module)
        return None

    def _arguments(
        self, node: ast.Call, called: Definition, args: ast.arguments | None, bound: bool
    ) -> None:
        if args is not None and self._is_touched(called):
            self.report(node, str(called), "call", misfit(node, args, bound))

    # Types.

    def _typed(self, found: Definition | None) -> Value:
        """What an attribute or a name of a module stands for, once it is read."""
        if found is None:
            return None
        node = found.node
        if isinstance(node, Function):
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            if marks & {"property", "cached_property", "functools.cached_property"}:
                return None if node.returns is None else Type(node.returns, found.module)
        if isinstance(node, ast.AnnAssign):
            return Type(node.annotation, found.module)
        if isinstance(node, ast.Assign):
            return self._assigned(node.value, found)
        return found

    def _assigned(self, value: ast.expr, found: Definition) -> Value:
        """The type of `self.x = X(...)`, or of `self.x = parameter`."""
        if isinstance(value, ast.Call):
            made = self.tree.resolve(value.func, found.module)
            is_class = made is not None and isinstance(made.node, ast.ClassDef)
            return Type(value.func, found.module) if is_class else None
        owner = self.tree.resolve(ast.Name(found.name.rpartition(".")[0]), found.module)
        if isinstance(value, ast.Name) and owner is not None:
            init = self.tree.member(owner, "__init__")
            for arg in init.node.args.args if init and isinstance(init.node, Function) else ():
                if arg.arg in KNOWN_NAMES and arg.arg == value.id:
                    return self._object(self.tree.find(*KNOWN_NAMES[arg.arg]))
                if arg.arg == value.id and arg.annotation is not None:
                    return Type(arg.annotation, found.module)
        return None

    def _object(self, definition: Definition | None) -> Value:
        if definition is None:
            return None
        return Type(ast.Name(definition.name), definition.module)

    def _class(self, value: Type) -> Definition | None:
        """The class of an object, where it has but one."""
        expression = value.expression
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            parsed = ast.parse(expression.value, mode="eval").body
            return self._class(Type(parsed, value.module))
        if isinstance(expression, ast.BinOp):
            sides = (expression.left, expression.right)
            others = [side for side in sides if ast.unparse(side) != "None"]
            return self._class(Type(others[0], value.module)) if len(others) == 1 else None
        if isinstance(expression, ast.Subscript) and ast.unparse(expression.value) == "Optional":
            return self._class(Type(expression.slice, value.module))
        found = self.tree.resolve(expression, value.module)
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None

    def _element(self, value: Value) -> Value:
        """What a container holds; of dictionaries the values."""
        expression = value.expression if isinstance(value, Type) else None
        if not isinstance(value, Type) or not isinstance(expression, ast.Subscript):
            return None
        parts = expression.slice.elts if isinstance(expression.slice, ast.Tuple) else []
        name = ast.unparse(expression.value).rpartition(".")[2]
        if name in _SEQUENCES:
            return Type(parts[0] if parts else expression.slice, value.module)
        return Type(parts[1], value.module) if name.endswith("dict") and len(parts) == 2 else None


def is_patch(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether this is `patch(Owner, "name", make)`, see `vllm_nbdiff.compat.patching`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    return node.func.id == "patch" and len(node.args) == 3
