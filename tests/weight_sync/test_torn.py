"""Two reader processes and one writer: whatever is opened is one version, from its first byte to its last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zerokl.weight_sync import BufferLeasedError, Manifest, WeightPublisher
from zerokl.weight_sync.manifest import plan_layout

_READER = """
import sys
import numpy as np
from zerokl.weight_sync import PublishedWeights, WeightSyncError, open_published
seen = torn = refused = 0
for line in sys.stdin:
    published = PublishedWeights.from_bytes(bytes.fromhex(line))
    try:
        with open_published(published) as tensors:
            whole = all((array == published.version).all() for array in tensors.values())
    except WeightSyncError:
        refused += 1
    else:
        seen, torn = seen + 1, torn + (not whole)
print(seen, torn, refused)
"""


def run(swaps: int, folder: Path) -> None:
    command = [sys.executable, "-c", _READER]
    readers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        for _ in range(2)
    ]
    with WeightPublisher() as publisher:
        version = 0
        while version < swaps:
            tensors = {name: np.full(size, version, np.float32) for name, size in (("a", 3000), ("b", 17), ("c", 900))}
            try:
                line = publisher.publish(tensors, version).to_bytes().hex() + "\n"
            except BufferLeasedError:
                continue
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.write(line)
                reader.stdin.flush()
            version += 1
        outputs = [reader.communicate()[0] for reader in readers]
    for output in outputs:
        seen, torn, refused = map(int, output.split())
        assert torn == 0 and seen > 0 and seen + refused == swaps


def test_no_reader_sees_a_torn_set(tmp_path: Path) -> None:
    run(2000, tmp_path)


@pytest.mark.long
def test_no_reader_sees_a_torn_set_in_many_swaps(tmp_path: Path) -> None:
    run(10_000, tmp_path)


@pytest.mark.slow
def test_a_manifest_of_a_million_tensors() -> None:
    specs, total = plan_layout((f"t{i}", "float32", (1,)) for i in range(1_000_000))
    manifest = Manifest(version=0, tensors=specs, total_bytes=total)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
