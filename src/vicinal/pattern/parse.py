"""Reading a pattern from text, as it prints: `parse("(Near(7), Window(4, shift=2))")`."""

from __future__ import annotations

import ast
from typing import Any

from vicinal.pattern.axis import AxisKind, Full, Grid, Halo, Near, Same, Window
from vicinal.pattern.compose import Pattern, check_pattern, heads, union

_NAMES: dict[str, Any] = {
    "Near": Near,
    "Window": Window,
    "Halo": Halo,
    "Grid": Grid,
    "Full": Full,
    "Same": Same,
    "heads": heads,
    "union": union,
}


def parse(text: str) -> Pattern:
    """The pattern that `text` writes down; nothing but pattern names, numbers, strings and flags is allowed.

    >>> parse("heads(Near(7), (Full(), Window(4)))")
    heads(Near(7), (Full(), Window(4)))
    """
    if not isinstance(text, str):
        raise ValueError(f"pattern: parse reads text, got {text!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"pattern: cannot read {text!r}: {error.msg}") from None
    pattern = _value(tree.body, text)
    check_pattern("pattern", pattern)
    result: Pattern = pattern
    return result


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | str | bool):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES:
        name = node.func.id
        arguments = [_value(argument, text) for argument in node.args]
        keywords = {word.arg or "**": _value(word.value, text) for word in node.keywords}
        try:
            return _NAMES[name](*arguments, **keywords)
        except TypeError as error:
            raise ValueError(f"pattern: {name}: {str(error).removeprefix(f'{name}.__init__() ')}") from None
    if isinstance(node, ast.Name) and node.id in _NAMES and isinstance(_NAMES[node.id], type):
        kind: type[AxisKind] = _NAMES[node.id]
        raise ValueError(f"pattern: write {kind.__name__}(...), with its arguments in parentheses")
    piece = ast.get_source_segment(text.strip(), node) or text
    raise ValueError(f"pattern: cannot read {piece!r}; allowed are {', '.join(_NAMES)}, numbers, strings, True, False")
