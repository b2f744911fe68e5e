"""What is hooked in SGLang, and whether it is what we know.

SGLang only logs a hook that it cannot apply, and `getattr` finds a base class's method where a
class has lost its own. So each target is looked up in its own class before it is registered, and
each hook is looked for in the chain of wrappers before a process attaches.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shmblocks.sglang_plugin.process import logger

# Versions of SGLang that `scripts/sglang` was run with.
TESTED = ("0.5.23",)

SERVER = "sglang.srt.disaggregation.encoder.server."
RECEIVER = "sglang.srt.disaggregation.encoder.receiver."
_ADDRESS = "sglang.srt.utils.network.NetworkAddress"


class Hook(NamedTuple):
    """One hook: `kind` as `HookType` names it; the target begins with these `parameters`."""

    target: str
    function: Callable[..., object]
    kind: str
    parameters: tuple[str, ...]


# What the hooks use besides their arguments.
NEEDED = (RECEIVER + "EmbeddingData.copy_without_embedding", _ADDRESS)


def address(host: str, port: int) -> str:
    """`host:port`, as SGLang writes it."""
    made = pkgutil.resolve_name(_ADDRESS)(host, port).to_host_port_str()
    return str(made)


def what_is_missing(hooks: Sequence[Hook]) -> list[str]:
    """Why these hooks do not fit this SGLang; empty: they do."""
    found = []
    for hook in hooks:
        parent, _, name = hook.target.rpartition(".")
        try:
            is_there = name in vars(pkgutil.resolve_name(parent))
        except (ImportError, AttributeError) as error:
            found.append(f"{hook.target}: {error}")
            continue
        if not is_there:
            found.append(f"{hook.target} is not defined there")
            continue
        parameters = tuple(inspect.signature(pkgutil.resolve_name(hook.target)).parameters)
        if parameters[: len(hook.parameters)] != hook.parameters:
            found.append(
                f"{hook.target}: expected the parameters {', '.join(hook.parameters)}, got "
                f"{', '.join(parameters)}"
            )
    for target in NEEDED:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            found.append(f"{target}: {error}")
    return found


def are_in_place(hooks: Sequence[Hook]) -> bool:
    """Whether SGLang has wrapped every target with our function; else one warning names them."""
    missing = [hook.target for hook in hooks if not _is_wrapped(hook)]
    if missing:
        logger.warning(
            "shmblocks: not used, embeddings go as bytes: SGLang has not applied the hooks on %s",
            ", ".join(missing),
        )
    return not missing


def _is_wrapped(hook: Hook) -> bool:
    function: object = pkgutil.resolve_name(hook.target)
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(_holds(cell, hook.function) for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _holds(cell: object, function: Callable[..., object]) -> bool:
    try:
        return getattr(cell, "cell_contents", None) is function
    except ValueError:
        return False  # an empty cell
