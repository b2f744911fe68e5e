"""The entry point: SGLang calls `load` in each of its processes, before anything else."""

from __future__ import annotations

import importlib.metadata
import pkgutil
from typing import Protocol

from shmblocks.sglang_plugin.hooks import TESTED, what_is_missing
from shmblocks.sglang_plugin.process import logger
from shmblocks.sglang_plugin.settings import Settings, read_settings


class Registry(Protocol):
    """What is used of SGLang's `HookRegistry`."""

    def register(self, target: str, hook: object, hook_type: object) -> None: ...


def load() -> None:
    """Register the hooks, if `SHMBLOCKS_SGLANG_POOL` names a pool and this SGLang is as expected.

    Attaches nothing. What does not fit is one warning, and SGLang goes on as without us.
    """
    try:
        settings = read_settings()
    except ValueError as error:
        logger.warning("shmblocks: not used, embeddings go as bytes: %s", error)
        return
    if settings is None:
        return
    registry: Registry = pkgutil.resolve_name("sglang.srt.plugins.hook_registry.HookRegistry")
    kinds: dict[str, object] = pkgutil.resolve_name(
        "sglang.srt.plugins.hook_registry.HookType"
    ).__members__
    _register(registry, kinds, settings)


def _register(registry: Registry, kinds: dict[str, object], settings: Settings) -> None:
    from shmblocks.sglang_plugin import encoder, language

    hooks = [*encoder.HOOKS, *language.HOOKS]
    if settings.pin:
        hooks += encoder.GPU_HOOKS
    missing = what_is_missing(hooks)
    if missing:
        logger.warning(
            "shmblocks: not used, embeddings go as bytes: this SGLang is another than the plug-in "
            "knows: %s",
            "; ".join(missing),
        )
        return
    if settings.guard:
        if not what_is_missing(language.GUARD_HOOKS):
            hooks += language.GUARD_HOOKS
        else:
            logger.warning("shmblocks: no guard against requests that fail: SGLang has changed")
    for hook in hooks:
        registry.register(hook.target, hook.function, kinds[hook.kind])
    if settings.pixels:
        from shmblocks.sglang_plugin import pixels

        registry.register(pixels.TARGET, pixels.make_class(settings), kinds["REPLACE"])
    if settings.store:
        from shmblocks.sglang_plugin import store

        store.register()
    _say_which_version()


def _say_which_version() -> None:
    version = importlib.metadata.version("sglang")
    if version not in TESTED:
        logger.warning(
            "shmblocks: SGLang %s was not tested (%s was); all names are there, going on",
            version,
            ", ".join(TESTED),
        )
