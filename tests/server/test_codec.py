"""Messages to frames and back, and every way in which frames can be wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import MAX_HEADER_BYTES, Message, decode, encode
from zerokl.rollout.protocol.failures import ERRORS, DeadlineError, exception_of, failure_of
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.protocol.records import (
    params_from_wire,
    params_to_wire,
    prompts_of_arrays,
    prompts_to_arrays,
    rollouts_from_wire,
    rollouts_to_wire,
)
from zerokl.rollout.protocol.schema import CLIENT_MESSAGES, ROLLOUT_ARRAYS, ROLLOUT_FIELDS, SERVER_MESSAGES
from zerokl.rollout.routing import RolloutRouting
from zerokl.rollout.sampling_params import SamplingParams

ABORT = Message(kind="abort", call=7, seq=3, body={"ids": ["a", "b"]})


def frames_of(header: Any, *arrays: bytes) -> list[bytes]:
    return [msgpack.packb(header), *arrays]


def rollout(size: int = 3, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "prompt_token_ids": np.arange(4, dtype=np.int32),
        "token_ids": np.arange(size, dtype=np.int32) + 10,
        "text": "añ"[:size],
        "logprobs": np.linspace(-3, 0, size, dtype=np.float32),
        "policy_logprobs": np.linspace(-2, 0, size, dtype=np.float32),
        "entropy": np.ones(size, np.float32),
        "raw_logprobs": None,
        "policy_versions": np.full(size, 2, np.int64),
        "steps": np.arange(size, dtype=np.int64),
        "phases": np.ones(size, np.uint8),
        "cached_lens": np.full(size, 8, np.int32),
        "ranks": np.full(size, 3, np.int16),
        "finish_reason": "abort",
        "stop_reason": None,
        "num_cached_tokens": 1,
        "num_preemptions": 2,
        "num_restarts": 3,
        "num_kept_updates": 4,
        "inexact": True,
        "seed": 2**64 - 1,
        "sample_index": 1,
        "prompt_index": 5,
        "sampling_params": SamplingParams(max_tokens=9, logit_bias={3: -np.inf, 4: 1.5}, stop=("x", "y")),
    }
    return Rollout(**(fields | changes))


def equal(first: Rollout, second: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=field.name)
            assert one.dtype == other.dtype and other.flags.writeable
        elif isinstance(one, RolloutRouting):
            assert one.start == other.start and one.experts.dtype == other.experts.dtype
            np.testing.assert_array_equal(one.experts, other.experts)
            np.testing.assert_array_equal(one.weights, other.weights)
        else:
            assert one == other, field.name


def test_a_message_comes_back_as_it_was() -> None:
    arrays = prompts_to_arrays([np.arange(3, dtype=np.int32), "text é", np.arange(2, dtype=np.int32)])
    message = Message(kind="generate", call=2**63 - 1, body={"stream": 8, "deadline": 1.5}, arrays=arrays)
    frames = encode(message)
    assert len(frames) == 2
    back = decode(frames, CLIENT_MESSAGES)
    assert (back.kind, back.call, back.seq, back.body) == ("generate", 2**63 - 1, 0, {"stream": 8, "deadline": 1.5})
    prompts = prompts_of_arrays(back.arrays)
    assert prompts[1] == "text é" and [list(prompts[0]), list(prompts[2])] == [[0, 1, 2], [0, 1]]


def test_rollouts_come_back_as_they_were() -> None:
    given = [
        rollout(),
        rollout(0, text=None, stop_reason="x", finish_reason="stop"),
        rollout(
            2,
            routing=RolloutRouting(
                experts=np.arange(20, dtype=np.int16).reshape(5, 2, 2), weights=np.ones((5, 2, 2), np.float32), start=0
            ),
        ),
        rollout(2, raw_logprobs=np.array([1, -np.inf], np.float32), stop_reason=7),
        rollout(3, loss_mask=np.array([True, False, True])),
    ]
    body, arrays = rollouts_to_wire(given)
    frames = encode(Message(kind="rollouts", call=1, seq=1, body={"first": 0, **body}, arrays=arrays))
    back = decode(frames, SERVER_MESSAGES)
    for one, other in zip(given, rollouts_from_wire(back.body, back.arrays), strict=True):
        equal(one, other)


def test_every_field_of_a_rollout_travels() -> None:
    names = {field.name for field in dataclasses.fields(Rollout)}
    assert names == (set(ROLLOUT_FIELDS) | set(ROLLOUT_ARRAYS)) - {
        "routing_experts",
        "routing_weights",
        "num_prompt_tokens",
        "num_tokens",
        "num_text_bytes",
        "has_raw",
        "has_mask",
    }


@given(
    st.builds(
        SamplingParams,
        n=st.integers(1, 9),
        temperature=st.sampled_from([0, 0.5, 1]),
        top_k=st.integers(0, 50),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1), max_size=3),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=3),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.sampled_from([-np.inf, 0.5, -2.0]), max_size=4),
        ignore_eos=st.booleans(),
    )
)
def test_parameters_come_back_as_they_were(params: SamplingParams) -> None:
    assert params_from_wire(msgpack.unpackb(msgpack.packb(params_to_wire(params)))) == params


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        ([b""], "not msgpack"),
        ([b"\xc1"], "not msgpack"),
        ([b"\x91" * 5000], "not msgpack"),
        ([b"\xdd\xff\xff\xff\xff"], "not msgpack"),
        ([b"\xdf\xff\xff\xff\xff"], "not msgpack"),
        ([b"\xc6\xff\xff\xff\xffabc"], "not msgpack"),
        ([b"\x81\x01\x02"], "not msgpack"),
        ([bytes(MAX_HEADER_BYTES + 1)], "at most 1048576 bytes"),
        (frames_of([2, "ping", 0, 0, {}]), "a list of 6"),
        (frames_of({"a": 1}), "a list of 6"),
        (frames_of([1, "ping", 0, 0, {}, []]), "version 1 is not 2"),
        (frames_of([2, "nope", 0, 0, {}, []]), "unknown kind"),
        (frames_of([2, ["ping"], 0, 0, {}, []]), "unknown kind"),
        (frames_of([2, "ping", -1, 0, {}, []]), "call must be an integer"),
        (frames_of([2, "ping", 0, True, {}, []]), "seq must be an integer"),
        (frames_of([2, "ping", 0, 2**64 - 1, {}, []]), "seq must be an integer"),
        (frames_of([2, "ping", 1, 0, {}, []]), "call must be 0"),
        (frames_of([2, "abort", 0, 0, {"ids": []}, []]), "call must be from 1 up"),
        (frames_of([2, "ping", 0, 0, [], []]), "body must be a map"),
        (frames_of([2, "ping", 0, 0, {"x": 1}, []]), "no field 'x'"),
        (frames_of([2, "abort", 1, 0, {}, []]), "abort.ids is missing"),
        (frames_of([2, "abort", 1, 0, {"ids": [1]}, []]), "abort.ids must be list of text"),
        (frames_of([2, "ping", 0, 0, {}, []], b"x"), "1 frames follow the header, for 0 arrays"),
        (frames_of([2, "ping", 0, 0, {}, [["a", "int32", [1], 1, 0]]], b"1234"), "at most 0 arrays"),
        (frames_of([2, "ping", 0, 0, {}, 5]), "at most 0 arrays"),
        (frames_of([2, "hello", 0, 0, {"versions": [2], "name": "x" * 70_000}, []]), "hello.name must be text"),
    ],
)
def test_wrong_frames_are_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(frames, CLIENT_MESSAGES)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_frames_are_refused_or_read_as_a_message(data: st.DataObject) -> None:
    arrays = prompts_to_arrays([np.arange(3, dtype=np.int32), "text"])
    frames = [bytes(frame) for frame in encode(Message(kind="generate", call=3, arrays=arrays))]
    which = data.draw(st.integers(0, len(frames) - 1))
    damaged = bytearray(frames[which])
    for _ in range(data.draw(st.integers(1, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    frames[which] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        decode(frames, CLIENT_MESSAGES)
    except ProtocolError as error:
        assert len(str(error)) < 500


def test_lengths_that_do_not_add_up_are_refused() -> None:
    body, arrays = rollouts_to_wire([rollout(), rollout()])
    body["rollouts"][0]["num_tokens"] = 2**62
    with pytest.raises(ValueError, match="add up"):
        rollouts_from_wire(body, arrays)
    with pytest.raises(ValueError, match="prompt_lens take"):
        prompts_of_arrays({**prompts_to_arrays(["abc"]), "prompt_lens": np.array([2**31 - 1] * 4, np.int32)})
    for bias in ([1], [[[], 2]], 5):
        with pytest.raises(ValueError, match="logit_bias"):
            params_from_wire({"logit_bias": bias})


def test_errors_keep_their_class_or_the_nearest_known_one() -> None:
    for kind in ERRORS.classes.values():
        assert type(exception_of(failure_of(kind("why")))) is kind
    assert type(exception_of(failure_of(FileNotFoundError("x")))) is OSError
    assert type(exception_of(failure_of(LookupError("x")))) is RuntimeError
    assert isinstance(exception_of(failure_of(DeadlineError("x"))), TimeoutError)
    assert type(exception_of({"error": "SystemExit", "text": ""})) is RuntimeError
