"""Copies of a publication on the host, for who has to keep it whatever becomes of the trainer's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.weight_sync.device_checksums import device_checksum
from zerokl.weight_sync.device_descriptor import PublishedDeviceWeights
from zerokl.weight_sync.device_memory import ReadableMemory
from zerokl.weight_sync.device_receiver import DeviceMappings
from zerokl.weight_sync.errors import ChecksumError
from zerokl.weight_sync.tensor_spec import DTYPES, TensorSpec


def copied_to_host(published: PublishedDeviceWeights, memory: ReadableMemory) -> list[tuple[TensorSpec, NDArray[Any]]]:
    """Each tensor in its shape and as it is stored, bfloat16 as uint16 patterns, in the layout's order; verified.

    The specs have no checksums. Raises as `DeviceMappings.lease` and `DeviceLease.checksums`, ChecksumError naming a
    tensor, PublisherDiedError where the trainer ended.
    """
    mappings = DeviceMappings(memory)
    try:
        with mappings.lease(published) as lease:
            copies = [(spec, np.empty(spec.shape, DTYPES[spec.dtype])) for spec in lease.mapped.layout.tensors]
            for spec, array in copies:
                if spec.nbytes:
                    memory.download(array.ctypes.data, lease.addresses[spec.name], spec.nbytes)
            memory.synchronize()
            checksums = lease.checksums
            lease.check_owner()
    finally:
        mappings.release()
    for spec, array in copies:
        if device_checksum(array) != checksums[spec.name]:
            raise ChecksumError(f"tensor {spec.name!r} of version {published.version} is not what was published")
    return copies
