"""From a trainer's arrays to a worker that samples with them: seconds, beside one memcpy of the same bytes.

    python benchmarks/weight_sync.py --json [--models 135m 0.6b 1.7b] [--rounds 5]

Each row is the median of the rounds; all pages were touched by rounds before, the first publication is told apart.
`publish_s`: the trainer's part with its checksums. `sync_s`: that and what the worker does to it (checksums, packing),
nobody stepping. `pause`: while a worker process steps and stages at once, from the end of the last step on the old
version to the start of the first on the new one, less the ordinary gap. `staging_throughput`: steps per second
meanwhile, over those undisturbed. `serial_pause_ms`: the pause if steps waited for the staging.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from machine_facts import machine_facts
from numpy.typing import NDArray

from zerokl.kernels.ops import StepInputs
from zerokl.rollout.config import EngineConfig
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.layout import expected_tensors, num_parameters
from zerokl.rollout.models.synthetic import step_inputs, tiny_config
from zerokl.rollout.step_order import StepOrder
from zerokl.rollout.worker import SharedWeights, TensorWeights, WeightSource, Worker, make_worker
from zerokl.weight_sync import WeightPublisher, publish_file

Tensors = dict[str, NDArray[np.float32]]

MODELS: dict[str, dict[str, Any]] = {
    "tiny": tiny_config("LlamaForCausalLM"),
    "135m": tiny_config(
        "LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "0.6b": tiny_config(
        "Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "1.7b": tiny_config(
        "Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


def weights_of(config: ModelConfig) -> Tensors:
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float32)
    return {name: np.resize(block, shape) for name, shape in expected_tensors(config).items()}


def some_changed(tensors: Tensors, share: float = 0.02) -> Tensors:
    """Tensors of layers, of about this share of all bytes."""
    wanted, chosen = share * sum(array.nbytes for array in tensors.values()), dict[str, NDArray[np.float32]]()
    for name, array in tensors.items():
        if ".down_proj." in name and sum(one.nbytes for one in chosen.values()) + array.nbytes <= wanted:
            chosen[name] = array
    return chosen or {"model.norm.weight": tensors["model.norm.weight"]}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = action()
    return perf_counter() - start, result


class Transport:
    """Publishes one way; `dtype` is None for float32."""

    def __init__(self, name: str, dtype: Any, publisher: WeightPublisher, folder: Path) -> None:
        self.name, self.dtype, self.publisher, self.path = name, dtype, publisher, folder / "weights.safetensors"

    def publish(self, tensors: Tensors, version: int) -> WeightSource:
        if self.name == "inproc":
            return TensorWeights(tensors=tensors)
        if self.name == "disk":
            return SharedWeights(published=publish_file(self.path, tensors, version))
        if self.name == "delta":
            return SharedWeights(published=self.publisher.publish_delta(some_changed(tensors), version))
        return SharedWeights(published=self.publisher.publish(tensors, version, dtype=self.dtype))

    def nbytes(self, tensors: Tensors) -> int:
        whole = sum(array.nbytes for array in (some_changed(tensors) if self.name == "delta" else tensors).values())
        return whole // 2 if self.dtype else whole


def update(worker: Worker, transport: Transport, tensors: Tensors, version: int) -> tuple[float, float]:
    """Seconds of the publication, and of all."""
    published, source = timed(lambda: transport.publish(tensors, version))
    staged, _ = timed(lambda: worker.stage_weights(source, version))
    worker.commit_weights()
    return published, published + staged


def decode_step() -> StepInputs:
    """Eight sequences that draw one token each."""
    tokens = [np.array([7 + row], np.int32) for row in range(8)]
    return step_inputs(tokens, [0] * 8, [[row] for row in range(8)], 16)


def beside_steps(worker: Worker, source: WeightSource, version: int, warm: int) -> tuple[float, float]:
    """(pause in ms, throughput of steps while staging over undisturbed) of one update."""
    step = decode_step()
    spans = []

    def run() -> None:
        start = perf_counter()
        worker.execute(StepOrder(inputs=step))
        spans.append((start, perf_counter()))

    for _ in range(warm):
        run()
    undisturbed = (spans[-1][1] - spans[0][0]) / warm
    gap = statistics.median(b[0] - a[1] for a, b in pairwise(spans))
    spans.clear()
    stager = threading.Thread(target=worker.stage_weights, args=(source, version))
    begin = perf_counter()
    stager.start()
    while stager.is_alive():
        run()
    staging = (perf_counter() - begin) / len(spans)
    end = spans[-1][1]
    worker.commit_weights()
    run()
    return 1e3 * max(0.0, spans[-1][0] - end - gap), undisturbed / staging


def rows_of(model: str, dtype: Any, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    content = MODELS[model]
    (folder / "config.json").write_text(json.dumps(content))
    config = ModelConfig.from_json(content)
    tensors = weights_of(config)
    rows = []
    for name in ("inproc", "shm", "disk", "delta") if dtype is None else ("shm",):
        options = EngineConfig(
            model=str(folder),
            num_blocks=8,
            max_model_len=64,
            num_threads=args.threads,
            worker="inprocess" if name == "inproc" else "process",
        )
        worker = make_worker(options)
        with WeightPublisher("bench") as publisher:
            transport = Transport(name, dtype, publisher, folder)
            full = Transport("shm" if name == "delta" else name, dtype, publisher, folder)
            first, _ = update(worker, full, tensors, 0)
            for version in (1, 2, 3):  # both buffers, and both sets of packed weights
                update(worker, full, tensors, version)
            rows.append(measure(worker, transport, tensors, args.rounds) | {"first_publish_s": first})
        worker.close()
        rows[-1] |= {"model": model, "params": num_parameters(config), "dtype": dtype or "float32", "transport": name}
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(worker: Worker, transport: Transport, tensors: Tensors, rounds: int) -> dict[str, Any]:
    nbytes = transport.nbytes(tensors)
    source_bytes, target_bytes = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    published, synced, copied, pauses, rates = [], [], [], [], []
    version = 3
    for _ in range(rounds):
        version += 1
        copied.append(timed(lambda: np.copyto(target_bytes, source_bytes))[0])
        seconds = update(worker, transport, tensors, version)
        published.append(seconds[0])
        synced.append(seconds[1])
        version += 1
        source = transport.publish(tensors, version)
        pause, rate = beside_steps(worker, source, version, warm=8)
        pauses.append(pause)
        rates.append(rate)
    publish_s, sync_s, memcpy_s = (statistics.median(values) for values in (published, synced, copied))
    return {
        "publish_s": publish_s,
        "sync_s": sync_s,
        "memcpy_s": memcpy_s,
        "publish_ratio": publish_s / memcpy_s,
        "sync_ratio": sync_s / memcpy_s,
        "pause_p50_ms": float(np.percentile(pauses, 50)),
        "pause_p99_ms": float(np.percentile(pauses, 99)),
        "serial_pause_ms": 1e3 * (sync_s - publish_s),
        "staging_throughput": statistics.median(rates),
        "bytes_moved": nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="accepted by every benchmark; the last line is JSON anyway")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["135m", "0.6b"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for dtype in args.dtypes:
                rows += rows_of(model, None if dtype == "float32" else dtype, args, Path(folder))
    print(json.dumps({"rows": rows, **machine_facts()}))


if __name__ == "__main__":
    main()
