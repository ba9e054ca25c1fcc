"""A tiny random model on disk, engines on it, and workers that wait or fail where a test wants them to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from zerokl.rollout.config import EngineConfig
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_config
from zerokl.rollout.step_order import StepOrder, StepResult
from zerokl.rollout.worker import LocalWorker

SomeWorker = TypeVar("SomeWorker", bound=LocalWorker)

END = 256
"""Id of the special token <|end|>, the model's end of sequence; ids 0..255 are bytes."""
VOCAB_SIZE = 300


def write_byte_tokenizer(folder: Path) -> None:
    """tokenizer.json with one token per byte and the special token <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def tiny_tensors(seed: int = 0) -> dict[str, Any]:
    """Weights of the tiny model; another seed gives another policy."""
    return random_tensors(ModelConfig.from_json(tiny_model_config()), seed, gain=2.0)


def tiny_model_config() -> dict[str, Any]:
    """config.json of the tiny model: 3 layers, grouped heads, positions up to 256."""
    return tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=END,
    )


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model with its byte tokenizer."""
    save_pretrained(folder, tiny_model_config(), tiny_tensors(seed))
    write_byte_tokenizer(folder)
    return folder


def tiny_options(folder: Path, **changes: Any) -> EngineConfig:
    """Options that keep a test engine small."""
    options: dict[str, Any] = {"model": str(folder), "block_size": 8, "num_blocks": 256, "num_threads": 1}
    return EngineConfig(**(options | changes))


class GatedWorker(LocalWorker):
    """Every step waits for a permit of `gate`; `began` counts the steps that were begun."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.gate = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def execute(self, order: StepOrder) -> StepResult:
        self.began.release()
        self.gate.acquire()
        return super().execute(order)

    def open(self) -> None:
        """Let all further steps pass."""
        self.gate.release(1_000_000)


class FailingWorker(LocalWorker):
    """Raises `error` at step number `fail_at` (from 1)."""

    def __init__(self, config: EngineConfig, error: Exception, fail_at: int) -> None:
        super().__init__(config)
        self.error = error
        self.steps_left = fail_at

    def execute(self, order: StepOrder) -> StepResult:
        self.steps_left -= 1
        if self.steps_left == 0:
            raise self.error
        return super().execute(order)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start `function` in a thread; the callable returned joins it and gives its result, or raises what it raised."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except Exception as error:  # noqa: BLE001 - handed to the test
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(30)
        assert not thread.is_alive(), "the call hangs"
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    return join


@contextmanager
def ctrl_c_after(ready: Callable[[], Any]) -> Iterator[threading.Event]:
    """One KeyboardInterrupt in the main thread after `ready` returns, in another one. The event: it was raised."""
    raised = threading.Event()

    def on_signal(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def send() -> None:
        ready()
        while not raised.wait(0.05):  # one that comes just before the thread begins to wait does not wake it
            os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, on_signal)
    join = in_thread(send)
    try:
        yield raised
    finally:
        raised.set()
        join()
        signal.signal(signal.SIGINT, previous)


def step_into_drain(engine: RolloutEngine, worker: GatedWorker) -> None:
    """While a step waits at the gate: let it pass once another thread's update is queued. The next one then drains."""
    wait_until(lambda: bool(engine._loop._inbox))
    worker.gate.release()
    worker.began.acquire()
    assert engine.health()["state"] == "draining"


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds, which another thread is about to bring about."""
    pause = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("the condition never came true")


def engine_with(
    folder: Path, kind: Callable[[EngineConfig], SomeWorker], **changes: Any
) -> tuple[RolloutEngine, SomeWorker]:
    """An engine around a worker of that kind, and the worker."""
    workers: list[SomeWorker] = []

    def make(config: EngineConfig) -> SomeWorker:
        workers.append(kind(config))
        return workers[0]

    return RolloutEngine(tiny_options(folder, **changes), make_worker=make), workers[0]


def gated_engine(folder: Path, **changes: Any) -> tuple[RolloutEngine, GatedWorker]:
    """An engine whose steps wait for permits, and its worker."""
    return engine_with(folder, GatedWorker, **changes)


def update_after(
    engine: RolloutEngine, worker: GatedWorker, num_steps: int, source: Any, **options: Any
) -> Callable[[], int]:
    """Let `num_steps` steps pass, and have the update taken up right after them; joins the update.

    Requests must be in flight already. Steps go on to wait for permits afterwards.
    """
    for _ in range(num_steps - 1):
        worker.began.acquire()
        worker.gate.release()
    worker.began.acquire()
    update = in_thread(lambda: engine.update_weights(source, **options))
    wait_until(lambda: engine.health()["num_held"] == 1)
    worker.gate.release()
    return update
