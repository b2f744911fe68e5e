"""The connector for vLLM, against a stub of vLLM where it is not installed."""

from __future__ import annotations

from tests.vllm import stub

# Before anything imports the connector.
stub.install()
