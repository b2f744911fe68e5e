"""vLLM: one line of configuration gives every instance of a node one encoder cache.

    --ec-transfer-config '{"ec_connector": "ShmBlocksECConnector", "ec_role": "ec_both"}'

    config       what an operator may set              identity    which items, under which key
    scheduler    promises, in the scheduler's process  plan        what it tells the workers
    worker       loads and saves, in each worker       copies cuda how, on a CPU and with streams
    fetching     what other nodes have                 stats tally what is counted
    connector    vLLM's hooks; needs vllm
    signatures   what vLLM's hooks look like, for `shmblocks doctor --vllm`

Importing this imports neither vllm nor torch: three kinds of vLLM's processes do. `connector` and
`stats` need vllm, `cuda` needs a GPU, the rest needs neither.
"""

from __future__ import annotations

from shmblocks.vllm.config import ConnectorConfig

CONNECTOR = "ShmBlocksECConnector"

__all__ = ["ConnectorConfig", "register"]


def register() -> None:
    """The entry point `vllm.general_plugins`: makes the connector known to vLLM by its name.

    vLLM runs it in each of its processes; it may run more than once.
    """
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    if CONNECTOR not in ECConnectorFactory._registry:
        ECConnectorFactory.register_connector(CONNECTOR, "shmblocks.vllm.connector", CONNECTOR)


def __getattr__(name: str) -> object:
    """`ec_connector_module_path: shmblocks.vllm` finds the class here, too."""
    if name == CONNECTOR:
        from shmblocks.vllm.connector import ShmBlocksECConnector

        return ShmBlocksECConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
