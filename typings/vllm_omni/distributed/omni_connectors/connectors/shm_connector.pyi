import threading
from collections import OrderedDict
from typing import Any

class SharedMemoryConnector:
    stage_id: object
    _metrics: dict[str, int]
    _pending_keys: OrderedDict[str, None]
    _pending_keys_lock: threading.Lock
    def __init__(self, config: dict[str, Any]) -> None: ...
    @staticmethod
    def serialize_obj(obj: object) -> bytes: ...
    @staticmethod
    def deserialize_obj(data: bytes) -> object: ...
    def put(
        self, from_stage: str, to_stage: str, put_key: str, data: object
    ) -> tuple[bool, int, dict[str, Any] | None]: ...
    def get(
        self,
        from_stage: str,
        to_stage: str,
        get_key: str,
        metadata: dict[str, Any] | None = None,
    ) -> tuple[Any, int] | None: ...
    def get_with_deadline(
        self,
        from_stage: str,
        to_stage: str,
        get_key: str,
        metadata: dict[str, Any] | None = None,
        *,
        deadline: float,
    ) -> tuple[Any, int] | None: ...
    def cleanup(self, request_id: str) -> None: ...
    def reap_consumed(self) -> None: ...
    def health(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
