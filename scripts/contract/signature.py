# SPDX-License-Identifier: Apache-2.0
"""Whether arguments fit parameters. Each function returns what does not, or None."""

from __future__ import annotations

import ast

from scripts.contract.tree import Definition, Function, Tree


def positional(args: ast.arguments) -> list[ast.arg]:
    return [*args.posonlyargs, *args.args]


def required(args: ast.arguments) -> set[str]:
    """Names of the parameters without a default."""
    names = [arg.arg for arg in positional(args)]
    needed = names[: len(names) - len(args.defaults)]
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {*needed, *(arg.arg for arg, default in pairs if default is None)}


def misfit(call: ast.Call, args: ast.arguments, bound: bool) -> str | None:
    """Why a call does not fit parameters, of which the first is given where `bound`."""
    names = [arg.arg for arg in positional(args)][int(bound) :]
    given = [arg for arg in call.args if not isinstance(arg, ast.Starred)]
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    if len(given) > len(names) and args.vararg is None:
        return f"takes {len(names)} positional arguments, {len(given)} are given"
    known = {*names[len(given) :], *(arg.arg for arg in args.kwonlyargs)}
    if args.kwarg is None and (unknown := keywords - known):
        return f"has no parameter {sorted(unknown)[0]}"
    if len(given) < len(call.args) or len(keywords) < len(call.keywords):
        return None  # what * and ** bring is not known
    missing = required(args) - keywords - {*names[: len(given)]}
    missing -= {arg.arg for arg in positional(args)[: int(bound)]}
    return f"also needs {sorted(missing)[0]}" if missing else None


def narrower(own: ast.arguments, base: ast.arguments) -> str | None:
    """Why a method may not override one: what a call of `base` may give and `own` does not take."""
    names = [arg.arg for arg in positional(own)][1:]
    expected = [arg.arg for arg in positional(base)][1:]
    if own.vararg is None and names[: len(expected)] != expected:
        return f"is called with ({', '.join(expected)}), takes ({', '.join(names)})"
    if own.kwarg is None:
        keywords = {arg.arg for arg in base.kwonlyargs} - {arg.arg for arg in own.kwonlyargs}
        if unknown := keywords - {*names}:
            return f"does not take {sorted(unknown)[0]}"
    extra = required(own) - {*expected, *(arg.arg for arg in base.kwonlyargs)}
    extra -= {arg.arg for arg in positional(own)[:1]}
    if extra and base.vararg is None and base.kwarg is None:
        return f"needs {sorted(extra)[0]}, which is not given"
    return None


def constructor(tree: Tree, definition: Definition) -> ast.arguments | None:
    """Parameters of a class, the object first; None where they cannot be told."""
    classes, _ = tree.lineage(definition)
    for owner in classes:
        assert isinstance(owner.node, ast.ClassDef)
        for node in owner.node.body:
            if isinstance(node, Function) and node.name == "__init__":
                return node.args
        if any("dataclass" in ast.unparse(mark) for mark in owner.node.decorator_list):
            return _fields(classes)
    return None


def _fields(classes: list[Definition]) -> ast.arguments:
    """The constructor of a dataclass, which takes the fields of its bases first."""
    fields: dict[str, ast.expr | None] = {}
    for owner in reversed(classes):
        assert isinstance(owner.node, ast.ClassDef)
        annotated = (node for node in owner.node.body if isinstance(node, ast.AnnAssign))
        for node in annotated:
            if "ClassVar" not in ast.unparse(node.annotation):
                fields[ast.unparse(node.target)] = node.value
    needed = [name for name, default in fields.items() if default is None]
    given = [name for name, default in fields.items() if default is not None]
    return ast.arguments(
        posonlyargs=[],
        args=[ast.arg("self"), *(ast.arg(name) for name in [*needed, *given])],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[default for default in fields.values() if default is not None],
    )
