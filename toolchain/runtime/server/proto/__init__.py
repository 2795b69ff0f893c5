"""The published protos of the gRPC inference service and of Triton's model configuration, and stubs made from them.

``regenerate`` makes the stubs.  They live in a descriptor pool of their own, so that other packages' stubs of the same
service (tritonclient's, KServe's) can be imported into the same process.
"""

from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()


def stubs() -> Any:
    """The stubs of ``grpc_service.proto``; their names are made at import, so that type checkers know none of them."""
    from toolchain.runtime.server.proto import grpc_service_pb2

    return grpc_service_pb2
