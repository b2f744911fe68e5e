from collections.abc import Callable

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

class ECConnectorFactory:
    _registry: dict[str, Callable[[], type[ECConnectorBase]]]
    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None: ...
