"""The JSON keys of a report, written for a command's help from the report's own types.

Generated, so that help and output cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import inspect

_NAMES: dict[type[inspect.Type], str] = {
    inspect.IntType: "whole number",
    inspect.FloatType: "number",
    inspect.StrType: "text",
    inspect.BoolType: "true or false",
    inspect.NoneType: "null",
}


def keys_text(report: type[msgspec.Struct]) -> str:
    """One line per key, nested keys indented, lists marked with `[]`."""
    info = inspect.type_info(report)
    return "\n".join(_keys(info, "  "))


def _keys(info: inspect.Type, indent: str) -> Iterator[str]:
    if not isinstance(info, inspect.StructType):
        return
    for field in info.fields:
        about, inner = _described(field.type)
        item, marks = _item(inner)
        text = f"{indent}{field.encode_name}{marks}"
        yield f"{text:<28} {about or _name(item)}".rstrip()
        yield from _keys(item, indent + "  ")


def _described(info: inspect.Type) -> tuple[str, inspect.Type]:
    """A type's description (`about`) and the type itself."""
    if isinstance(info, inspect.Metadata):
        return (info.extra_json_schema or {}).get("description", ""), info.type
    return "", info


def _item(info: inspect.Type) -> tuple[inspect.Type, str]:
    if isinstance(info, (inspect.ListType, inspect.VarTupleType)):
        item, marks = _item(info.item_type)
        return item, f"[]{marks}"
    return info, ""


def _name(info: inspect.Type) -> str:
    if isinstance(info, inspect.UnionType):
        return " or ".join(_name(kind) for kind in info.types)
    if isinstance(info, inspect.LiteralType):
        return " | ".join(str(value) for value in info.values)
    if isinstance(info, inspect.EnumType):
        return " | ".join(str(value.value) for value in info.cls)
    return _NAMES.get(type(info), "")
