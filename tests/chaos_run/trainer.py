"""A trainer's part: publishes weights of the version it is asked for, well or broken.

    python trainer.py ENDPOINT MODEL FOLDER < lines of JSON > lines of JSON

An order is {"version", "transport", "fault", "die"}. Transports: "shared", "file" (in FOLDER) are published, and
answered by {"published": hex} or {"path"}; "upload" is sent to the server, and answered by {"live": version} or
{"error"}. Faults: null, "misshapen" (a tensor of another shape), "flipped" (a bit of what was published). `die`: as
`dying_trainer.arm` takes it, or "upload:n" (before the n-th piece is sent).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
from dying_trainer import arm, die_now

from chaos_run.weights import tensors_of
from zerokl.rollout import client_weights
from zerokl.rollout.client import RolloutClient
from zerokl.weight_sync import PublishedWeights, WeightPublisher, publish_file
from zerokl.weight_sync.segments import SHM_FOLDER

PIECE_BYTES = 16 << 10


def main() -> None:
    endpoint, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    client_weights._PIECE_BYTES = PIECE_BYTES  # several pieces for a tiny model
    with WeightPublisher("chaos") as publisher, RolloutClient(endpoint) as client:
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(obey(order, publisher, client, model, folder)), flush=True)


def obey(
    order: dict[str, Any], publisher: WeightPublisher, client: RolloutClient, model: Path, folder: Path
) -> dict[str, Any]:
    version, random = order["version"], np.random.default_rng(order["version"])
    tensors = tensors_of(model, version)
    if order["fault"] == "misshapen":
        name = str(random.choice(sorted(tensors)))
        tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])
    arm(order["die"])
    if order["transport"] == "upload":
        return upload(client, tensors, version, order["die"])
    if order["transport"] == "file":
        published_file = publish_file(folder / f"{version}.safetensors", tensors, version)
        if order["fault"] == "flipped":
            path = Path(published_file.path)
            flip(path, path.stat().st_size - 1 - int(random.integers(1000)))
        return {"path": published_file.path}
    published = publisher.publish(tensors, version)
    if order["fault"] == "flipped":
        flip_tensor(published, random)
    return {"published": published.to_bytes().hex()}


def upload(client: RolloutClient, tensors: dict[str, Any], version: int, die: str | None) -> dict[str, Any]:
    """As any client sends arrays; `die` may end it between two pieces."""
    left = int((die or "upload:-1").partition(":")[2])
    pieces = client_weights._pieces

    def counted(named: Any) -> Iterator[Any]:
        for number, piece in enumerate(pieces(named), 1):
            if number == left:
                die_now()
            yield piece

    client_weights._pieces = counted
    try:
        return {"live": client.update_weights(tensors, version)}
    except (ValueError, RuntimeError) as error:
        return {"error": repr(error)}
    finally:
        client_weights._pieces = pieces


def flip_tensor(published: PublishedWeights, random: np.random.Generator) -> None:
    specs = published.manifest.tensors
    spec = specs[int(random.integers(len(specs)))]
    flip(SHM_FOLDER / published.segment[1:], spec.offset + int(random.integers(spec.nbytes)))


def flip(path: Path, place: int) -> None:
    """Change one bit of the byte at `place`."""
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


if __name__ == "__main__":
    main()
