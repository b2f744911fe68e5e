from collections.abc import Callable
from typing import Any

class OmniConnectorFactory:
    @classmethod
    def register_connector(
        cls, name: str, constructor: Callable[[dict[str, Any]], object]
    ) -> None: ...
    @classmethod
    def list_registered_connectors(cls) -> list[str]: ...
