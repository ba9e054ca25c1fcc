"""Messages of the worker link: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.kernels.ops import SampleResult, SamplingBatch, StepInputs, neutral_sampling
from zerokl.rollout.errors import WorkerError
from zerokl.rollout.messages import (
    Begin,
    BringBack,
    Close,
    Collect,
    Commit,
    Configure,
    Connect,
    Describe,
    Discard,
    Done,
    Drop,
    Execute,
    Facts,
    Failed,
    Hello,
    Pin,
    PutAway,
    Rearrange,
    Sampled,
    Stage,
    exception_of,
    failure_of,
)
from zerokl.rollout.step_order import BlockMove, RoutedTokens, StepOrder, StepResult
from zerokl.rollout.weight_source import DeviceWeights, FolderWeights, SharedWeights
from zerokl.rollout.wire import PROTOCOL_VERSION, WireError, decode, encode
from zerokl.rollout.wire_steps import (
    LOAD_ARRAYS,
    MOVE_ARRAYS,
    ROUTED_ARRAYS,
    SAMPLE_ARRAYS,
    SAMPLING_ARRAYS,
    STEP_ARRAYS,
)
from zerokl.weight_sync import ChecksumError, Manifest, PublishedDeviceWeights, PublishedWeights
from zerokl.weight_sync.device_descriptor import encode_layout
from zerokl.weight_sync.manifest import plan_layout


def a_step(num_tokens: int = 5, num_rows: int = 3, seed: int = 0) -> StepInputs:
    random = np.random.default_rng(seed)

    def ints(*shape: int) -> Any:
        return random.integers(-1, 1000, shape).astype(np.int32)

    sampling = dataclasses.replace(
        neutral_sampling(num_rows),
        seed=random.integers(0, 2**64, num_rows, np.uint64),
        bias_token=ints(2 * num_rows),
        bias_value=np.full(2 * num_rows, -np.inf, np.float32),
        want_raw=bool(num_rows % 2),
    )
    return StepInputs(
        token_ids=ints(num_tokens),
        positions=ints(num_tokens),
        slot_mapping=ints(num_tokens),
        seq_starts=ints(3),
        context_lens=ints(2),
        block_tables=ints(2, num_tokens),
        logit_rows=ints(num_rows),
        sampling=sampling,
        step=2**40,
        policy="reference ✓",
    )


def a_result(num_rows: int, raw: bool) -> SampleResult:
    values = np.linspace(-30, 0, num_rows).astype(np.float32)
    return SampleResult(
        tokens=np.arange(num_rows, dtype=np.int32),
        logprobs=values,
        policy_logprobs=values * 2,
        entropy=-values,
        raw_logprobs=values * 3 if raw else None,
    )


def published() -> PublishedWeights:
    specs, total_bytes = plan_layout([("a", "float32", (2, 3)), ("b", "float16", (7,))])
    return PublishedWeights(segment="/s", manifest=Manifest(version=4, tensors=specs, total_bytes=total_bytes))


def on_device() -> PublishedDeviceWeights:
    layout = encode_layout(published().manifest.tensors, published().manifest.total_bytes)
    return PublishedDeviceWeights(segment="/s", key=3, version=4, layout=layout, checksums="/t")


def assert_equal(actual: Any, expected: Any) -> None:
    """Equality of dataclasses that hold arrays."""
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        got, wanted = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray):
            assert got.dtype == wanted.dtype and got.flags.writeable and got.flags.aligned, field.name
            np.testing.assert_array_equal(got, wanted, err_msg=field.name)
        elif dataclasses.is_dataclass(wanted) and any(isinstance(v, np.ndarray) for v in vars_of(wanted)):
            assert_equal(got, wanted)
        else:
            assert got == wanted and type(got) is type(wanted), field.name


def vars_of(instance: Any) -> list[Any]:
    return [getattr(instance, field.name) for field in dataclasses.fields(instance)]


@pytest.mark.parametrize(
    "message",
    [
        Hello(pid=1),
        Configure(options={"model": "/m", "seed": 2**64 - 1, "n": None}, rank=1, folder="/f", placement=[[[0, 1]]]),
        Connect(),
        Collect(),
        Stage(source=FolderWeights(path="/weights/ü"), version=3),
        Stage(source=SharedWeights(published=published()), version=2**62),
        Stage(source=DeviceWeights(published=on_device(), bucket_bytes=7), version=5),
        Commit(),
        Discard(),
        Pin(name="reference"),
        Drop(name=""),
        PutAway(weights=True, kv_cache=False, level=1, spill_dir="/tmp"),
        BringBack(weights=False, kv_cache=True),
        Rearrange(placement=[[[0, 2], [1, 3]]]),
        Describe(),
        Close(),
        Done(),
        Facts(facts={"pid": 3, "versions": {"policy": 4}}),
        Failed(error="ValueError", text="t", traceback="..."),
    ],
    ids=lambda message: type(message).__name__,
)
def test_plain_messages_make_the_round_trip(message: Any) -> None:
    frames = encode(77, message)
    assert len(frames) == 1
    assert decode(frames) == (77, message)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 9), st.booleans(), st.integers(0, 5))
def test_steps_and_results_make_the_round_trip(num_tokens: int, num_rows: int, raw: bool, seed: int) -> None:
    inputs = a_step(num_tokens, num_rows, seed)
    sequence, execute = decode(encode(2**40, Execute(order=StepOrder(inputs=inputs))))
    assert sequence == 2**40 and isinstance(execute, Execute)
    assert_equal(execute.order.inputs, inputs)
    result = StepResult(sampled=a_result(num_rows, raw))
    _, sampled = decode(encode(0, Sampled(result=result)))
    assert isinstance(sampled, Sampled)
    assert_equal(sampled.result, result)


def test_moves_of_blocks_and_what_routers_chose_travel_too() -> None:
    def move(peer: int, *blocks: int) -> BlockMove:
        return BlockMove(peer=peer, blocks=np.array(blocks, np.int32))

    order = StepOrder(inputs=a_step(), sends=(move(1, 3, 4), move(2)), receives=(move(0, 7),), has_moves=True)
    _, execute = decode(encode(1, Execute(order=order)))
    assert isinstance(execute, Execute) and execute.order.has_moves
    for name in ("sends", "receives"):
        for got, wanted in zip(getattr(execute.order, name), getattr(order, name), strict=True):
            assert_equal(got, wanted)
    ids = np.arange(24, dtype=np.int32).reshape(2, 4, 3)
    routed = RoutedTokens(experts=ids, weights=ids.astype(np.float32))
    result = StepResult(sampled=a_result(2, False), expert_tokens=ids[0], routed=routed)
    _, sampled = decode(encode(2, Sampled(result=result)))
    assert isinstance(sampled, Sampled)
    assert_equal(sampled.result, result)


def test_a_replayed_choice_of_experts_travels_too() -> None:
    ids = np.arange(30, dtype=np.int32).reshape(2, 5, 3)
    inputs = dataclasses.replace(a_step(), routing=ids, routing_weights=ids.astype(np.float32))
    _, execute = decode(encode(1, Execute(order=StepOrder(inputs=inputs))))
    assert isinstance(execute, Execute)
    assert_equal(execute.order.inputs, inputs)


def test_a_step_to_be_begun_travels_with_the_rows_that_draw_its_tokens() -> None:
    inputs = dataclasses.replace(a_step(), token_rows=np.array([3, -1, 0], np.int32))
    _, begin = decode(encode(1, Begin(order=StepOrder(inputs=inputs))))
    assert isinstance(begin, Begin)
    assert_equal(begin.order.inputs, inputs)


def test_strided_arrays_travel_in_c_order() -> None:
    inputs = dataclasses.replace(a_step(), block_tables=np.arange(12, dtype=np.int32).reshape(3, 4).T)
    _, execute = decode(encode(1, Execute(order=StepOrder(inputs=inputs))))
    assert isinstance(execute, Execute)
    np.testing.assert_array_equal(execute.order.inputs.block_tables, inputs.block_tables)


def test_the_tables_cover_every_field_of_the_records() -> None:
    def names(record: type[Any]) -> set[str]:
        return {field.name for field in dataclasses.fields(record)}

    assert names(StepInputs) == set(STEP_ARRAYS) | {"sampling", "step", "policy"}
    assert names(SamplingBatch) == set(SAMPLING_ARRAYS) | {"want_raw"}
    assert names(SampleResult) == set(SAMPLE_ARRAYS)
    assert names(RoutedTokens) == set(ROUTED_ARRAYS)
    assert names(BlockMove) == set(MOVE_ARRAYS) | {"peer"}
    assert names(StepResult) == set(LOAD_ARRAYS) | {"sampled", "routed"}


def header(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


RESULT_SHAPES = [[2]] * 4 + [None]
NO_LOAD = [[None], None]
RESULT = [RESULT_SHAPES, *NO_LOAD]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "expected 1 or 2 frames, got 0"),
        ([b"", b"", b""], "expected 1 or 2 frames, got 3"),
        ([b"\xc1"], "not msgpack"),
        ([header(PROTOCOL_VERSION + 1, 0, "Done", [])], "protocol version 6 is not 5"),
        ([msgpack.packb("hello")], "protocol version 'hello' is not 5"),
        ([header(PROTOCOL_VERSION, "0", "Done", [])], "header: expected fields of types"),
        ([header(PROTOCOL_VERSION, 0, "Reboot", [])], "unknown message kind 'Reboot'"),
        ([header(PROTOCOL_VERSION, 0, "Done", [1])], "Done: expected fields of types"),
        ([header(PROTOCOL_VERSION, 0, "Pin", [None])], r"Pin: expected fields of types \[str\]"),
        ([header(PROTOCOL_VERSION, 0, "Hello", [True])], r"Hello: expected fields of types \[int\]"),
        ([header(PROTOCOL_VERSION, 0, "Stage", ["url", "x", 1])], "Stage: .* no known source"),
        ([header(PROTOCOL_VERSION, 0, "Stage", ["shared", b"x", 1])], "Stage: published weights"),
        ([header(PROTOCOL_VERSION, 0, "Stage", ["device 7", b"x", 1])], "Stage: device weights"),
        ([header(PROTOCOL_VERSION, 0, "Stage", ["device", b"x", 1])], "Stage: .* no known source"),
        ([header(PROTOCOL_VERSION, 0, "Stage", ["folder", "x", 1.5])], "Stage: expected fields of types"),
        ([header(PROTOCOL_VERSION, 0, "Done", []), b"12345678"], "arrays take 0 bytes, the frame has 8"),
        (
            [header(PROTOCOL_VERSION, 0, "Sampled", RESULT), bytes(31)],
            "entropy: shape .* needs 8 bytes, 7 are",
        ),
        (
            [header(PROTOCOL_VERSION, 0, "Sampled", RESULT), bytes(33)],
            "take 32 bytes, the frame has 33",
        ),
        ([header(PROTOCOL_VERSION, 0, "Sampled", [RESULT_SHAPES[1:], *NO_LOAD]), bytes(32)], "expected 5 shapes"),
        ([header(PROTOCOL_VERSION, 0, "Sampled", [[None] * 5, *NO_LOAD])], "tokens: the array is missing"),
        (
            [header(PROTOCOL_VERSION, 0, "Sampled", [[[2, 1]] * 5, *NO_LOAD]), bytes(40)],
            "tokens: .* not a shape of 1 dim",
        ),
        ([header(PROTOCOL_VERSION, 0, "Sampled", [[[-1]] * 5, *NO_LOAD]), bytes(40)], "tokens: .* is not a shape"),
        ([header(PROTOCOL_VERSION, 0, "Sampled", [[[2**62]] * 5, *NO_LOAD]), bytes(40)], "tokens: shape .* needs"),
    ],
)
def test_other_frames_are_refused_with_the_reason(frames: list[bytes], message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(frames)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_frames_are_refused_or_read_but_never_break(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(5, Execute(order=StepOrder(inputs=a_step())))]
    frame = data.draw(st.sampled_from(frames))
    at = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        frame[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del frame[at:]
    try:
        decode([bytes(frame) for frame in frames])
    except WireError:
        return


class OddError(FloatingPointError):
    def __init__(self, step: int, rows: list[int]) -> None:
        super().__init__(f"step {step}: rows {rows}")


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (ValueError("bad field"), ValueError, "bad field"),
        (OddError(3, [1]), FloatingPointError, r"step 3: rows \[1\]"),
        (ChecksumError("tensor 'w'"), ChecksumError, "tensor 'w'"),
        (FileNotFoundError(2, "No such file", "/m/config.json"), FileNotFoundError, "No such file: '/m/config.json'"),
        (IsADirectoryError(21, "Is a directory", "/m"), OSError, "Is a directory: '/m'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"), ValueError, "'utf-8' codec"),
        (AssertionError("no plan"), RuntimeError, "AssertionError: no plan"),
        (KeyError("w"), RuntimeError, "KeyError: 'w'"),
        (MemoryError(), MemoryError, "MemoryError"),
        (WorkerError("closed"), WorkerError, "closed"),
    ],
)
def test_errors_keep_their_class_or_the_nearest_base(error: Exception, expected: type[Exception], text: str) -> None:
    sequence, failed = decode(encode(9, failure_of(error)))
    assert sequence == 9 and isinstance(failed, Failed)
    with pytest.raises(expected, match=text) as caught:
        raise exception_of(failed)
    assert type(caught.value) is expected


@pytest.mark.parametrize("name", ["SystemExit", "eval", "Exception", "KeyboardInterrupt", ""])
def test_only_listed_errors_are_made_from_a_message(name: str) -> None:
    assert type(exception_of(Failed(error=name, text="x", traceback=""))) is RuntimeError
