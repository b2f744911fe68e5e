"""What the hooks of vLLM's base class look like, in the versions that were tested.

A new vLLM may rename a hook, change its arguments, or add one that every connector must have. Such
a change is told in one sentence (`shmblocks doctor --vllm`) instead of as a failure in the middle
of a request.
"""

from __future__ import annotations

import inspect

# The connector ran in these. (0.33.0 has the same base class, by its source.)
TESTED_VERSIONS = ("0.32.0",)

# Arguments of each hook behind `self`, as vLLM passes them; `**` takes any others.
HOOKS = {
    "__init__": ("vllm_config", "role"),
    "shutdown": (),
    "bind_connector_metadata": ("connector_metadata",),
    "clear_connector_metadata": (),
    "_get_connector_metadata": (),
    "start_load_caches": ("encoder_cache", "**kwargs"),
    "start_save_caches": ("**kwargs",),
    "save_caches": ("encoder_cache", "mm_hash", "**kwargs"),
    "get_finished": ("finished_req_ids",),
    "build_connector_worker_meta": (),
    "get_ec_connector_stats": (),
    "has_cache_item": ("identifier",),
    "ensure_cache_available": ("request", "num_computed_tokens"),
    "take_unavailable_requests": (),
    "update_state_after_alloc": ("request", "index"),
    "update_state_after_free": ("request", "index"),
    "build_connector_meta": ("scheduler_output",),
    "update_connector_output": ("connector_output",),
    "request_finished": ("request",),
    "build_ec_connector_stats": ("data",),
    "build_prom_metrics": (
        "vllm_config",
        "metric_types",
        "labelnames",
        "per_engine_labelvalues",
    ),
}


def differences(base: type) -> list[str]:
    """A sentence for each hook of `base` (vLLM's `ECConnectorBase`) that is not as expected."""
    found = []
    for name, expected in HOOKS.items():
        hook = getattr(base, name, None)
        if hook is None:
            found.append(f"{base.__name__} has no hook {name} any more")
        elif (arguments := arguments_of(hook)) != expected:
            found.append(
                f"{base.__name__}.{name} takes ({', '.join(arguments)}), "
                f"expected ({', '.join(expected)})"
            )
    abstract: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    found += [
        f"{base.__name__} requires a hook {name}, which ShmBlocksECConnector has not"
        for name in sorted(abstract - HOOKS.keys())
    ]
    return found


def arguments_of(hook: object) -> tuple[str, ...]:
    """The names of a method's arguments, but for `self` and `cls`."""
    if not callable(hook):
        return ("(it is no method)",)
    parameters = inspect.signature(hook).parameters.values()
    return tuple(
        _mark(parameter) + parameter.name
        for parameter in parameters
        if parameter.name not in ("self", "cls")
    )


def _mark(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return "**"
    return "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
