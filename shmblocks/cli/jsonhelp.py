"""The keys of a command's JSON, written for its help from the types themselves.

Each struct is listed once, with its docstring and its keys, so help and output cannot differ.
"""

from __future__ import annotations

import inspect as source
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


def keys_text(reports: tuple[type[msgspec.Struct], ...]) -> str:
    """The reports and every struct inside them, in the order in which they are met."""
    structs: dict[type, inspect.StructType] = {}
    for report in reports:
        _collect(inspect.type_info(report), structs)
    return "\n\n".join("\n".join(_section(struct)) for struct in structs.values())


def _collect(info: inspect.Type, structs: dict[type, inspect.StructType]) -> None:
    if isinstance(info, inspect.StructType) and info.cls not in structs:
        structs[info.cls] = info
        for field in info.fields:
            _collect(field.type, structs)
    elif isinstance(info, inspect.UnionType):
        for kind in info.types:
            _collect(kind, structs)
    elif isinstance(info, (inspect.ListType, inspect.VarTupleType)):
        _collect(info.item_type, structs)


def _section(struct: inspect.StructType) -> Iterator[str]:
    yield f"  {struct.cls.__name__}"
    yield from (f"    {text}".rstrip() for text in (source.getdoc(struct.cls) or "").splitlines())
    for field in struct.fields:
        yield f"      {field.encode_name:<20} {_name(field.type)}"


def _name(info: inspect.Type) -> str:
    if isinstance(info, inspect.StructType):
        return info.cls.__name__
    if isinstance(info, inspect.NamedTupleType):
        return f"[{', '.join(field.name for field in info.fields)}]"
    if isinstance(info, (inspect.ListType, inspect.VarTupleType)):
        return f"list of {_name(info.item_type)}"
    if isinstance(info, inspect.UnionType):
        return " or ".join(map(_name, info.types))
    if isinstance(info, inspect.LiteralType):
        return " | ".join(map(repr, info.values))
    if isinstance(info, inspect.EnumType):
        return " | ".join(repr(str(value.value)) for value in info.cls)
    return _NAMES.get(type(info), "")
