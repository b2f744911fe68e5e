from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorWorkerMetadata

class ECConnectorOutput:
    ec_connector_worker_meta: ECConnectorWorkerMetadata | None
