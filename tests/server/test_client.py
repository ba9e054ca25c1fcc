"""The client is the engine: what an engine gives in the process, a client gives over a socket, bit for bit."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import in_thread, tiny_options, tiny_tensors, wait_until

from zerokl.rollout.calls import CallMaker
from zerokl.rollout.client import RolloutClient
from zerokl.rollout.client_calls import ScoreCall
from zerokl.rollout.control import Call
from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import AbortedError, EngineAsleepError, PauseLiftedError
from zerokl.rollout.outputs import Rollout
from zerokl.rollout.protocol.codec import Message
from zerokl.rollout.protocol.fields import ProtocolError
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.server.served_call import ServedCall

PARAMS = SamplingParams(n=3, max_tokens=24, temperature=0.9, stop=("qq",), raw_logprobs=True)
PROVENANCE = ("num_cached_tokens", "num_preemptions", "steps", "phases", "cached_lens", "ranks")
"""Fields that say where a token came from, not what it is."""
LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)


def same(first: list[Rollout], second: list[Rollout]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for field in dataclasses.fields(Rollout):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if field.name in PROVENANCE:
                continue
            if isinstance(left, np.ndarray):
                np.testing.assert_array_equal(left, right, err_msg=field.name)
                assert left.dtype == right.dtype
            else:
                assert left == right, field.name


def test_it_has_the_methods_of_an_engine() -> None:
    """With the same parameters in the same order; `submit...` and hooks into the engine's thread stay there."""
    local = {"submit", "submit_score", "submit_abort", "submit_pause", "submit_resume", "watch_steps"}
    local |= {"prepare_update", "receive_trainer_logprobs"}
    for name, member in inspect.getmembers(RolloutEngine):
        if name.startswith("_") or name in local:
            continue
        assert hasattr(RolloutClient, name), name
        if callable(member):
            ours = inspect.signature(getattr(RolloutClient, name)).parameters
            theirs = inspect.signature(member).parameters
            assert list(ours) == list(theirs), name
            assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name


def test_rollouts_and_scores_have_the_engines_bits(tiny_model: Path, client: RolloutClient) -> None:
    prompts: list[Any] = ["hello", [1, 2, 3], np.array([7, 8]), "ü"]
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        whole = engine.generate(prompts, PARAMS)
        same(client.generate(prompts, PARAMS), whole)
        many = [dataclasses.replace(PARAMS, n=1, seed=seed) for seed in range(4)]
        same(client.generate(prompts, many), engine.generate(prompts, many))
        for options in (
            {},
            {"definition": "raw"},
            {"definition": "logprobs"},
            {"sampling_params": SamplingParams(temperature=0.5)},
        ):
            for ours, theirs in zip(client.score(whole, **options), engine.score(whole, **options), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        ours, theirs = (one.score([[1, 2, 3], [4, 5]], prompt_lens=[1, 2]) for one in (client, engine))
        assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]
        assert client.score([5])[0].tolist() == []
        # the negative control: another seed gives other bits
        other = client.generate(prompts, dataclasses.replace(PARAMS, seed=99))
        assert any(one.token_ids.tolist() != two.token_ids.tolist() for one, two in zip(other, whole, strict=True))


def test_coroutines_share_the_batch(client: RolloutClient) -> None:
    async def main() -> list[list[Rollout]]:
        return await asyncio.gather(*[client.agenerate([index, 5], LONG) for index in range(8)])

    results = asyncio.run(main())
    assert [len(rollouts[0].token_ids) for rollouts in results] == [60] * 8
    scores = asyncio.run(client.ascore(results[0][0]))
    np.testing.assert_array_equal(scores[0], results[0][0].policy_logprobs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.generate([]), "prompts must be"),
        (lambda client: client.generate([[1.5]]), r"prompts\[0\]"),
        (lambda client: client.generate([[10_000]]), "below vocab_size"),
        (lambda client: client.generate(""), "at least one token"),
        (lambda client: client.generate("\ud800"), "UTF-8"),
        (lambda client: client.generate("a", SamplingParams(max_tokens=9999)), "over max_model_len"),
        (lambda client: client.generate(["a"], [PARAMS] * 2), "one entry per prompt"),
        (lambda client: client.generate(["a", "b"], request_ids=["x", "x"]), "must not repeat"),
        (lambda client: client.score("text"), "scoring takes no text"),
        (lambda client: client.score([[1, 2]], definition="wrong"), "definition must be"),
        (lambda client: client.score([[1, 2]], policy="nobody"), "policy must be one of"),
        (lambda client: client.score([[1, 2]], prompt_lens=[5]), r"prompt_lens\[0\] must be in"),
        (lambda client: client.update_weights({}), "missing"),
        (lambda client: client.update_weights("/nowhere"), "nowhere"),
        (lambda client: client.update_weights(tiny_tensors(1), version=7), "version must be 1"),
        (lambda client: client.update_weights({}, mode="soon"), "mode must be one of"),
        (lambda client: client.drop_weights("x"), "must be a pinned set"),
        (lambda client: client.get_weight_version("x"), "policy must be one of"),
        (lambda client: client.pause_generation("later"), "mode must be one of"),
        (lambda client: client.sleep("everything"), "tags must be"),
        (lambda client: client.within(0), "timeout must be"),
        (lambda client: client.stream("a", chunk=0), "chunk must be"),
    ],
)
def test_wrong_arguments_raise_what_the_engine_raises(client: RolloutClient, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(client)
    assert len(client.generate("a", LONG)[0].token_ids) == 60


@pytest.mark.parametrize("max_tokens", [4, 250])  # read by the server's thread, or by one for results
def test_a_result_that_cannot_be_read_leaves_the_server_serving(
    client: RolloutClient, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(CallMaker, "rollouts", _unreadable)
        with pytest.raises(OSError, match="unreadable"):
            client.generate([1], params)
    assert len(client.generate([1], params)[0].token_ids) == max_tokens


def _unreadable(*_: Any) -> list[Rollout]:
    raise OSError("unreadable")


def test_control(client: RolloutClient, tiny_model: Path) -> None:
    assert (client.config.model, client.config.max_model_len) == (str(tiny_model), 256)
    assert client.model_config.vocab_size == 300
    assert client.tokenizer is not None and client.tokenizer.encode("ab").tolist() == [64, 65]
    assert client.health()["state"] == "running"
    assert client.metrics()["server_clients"] == 1
    assert client.describe_worker()["kind"] == "inprocess"
    assert client.rebalance_experts() == 0 and client.expert_load(reset=True).total.shape == (0, 0)
    assert client.pin_weights() == 0
    client.sleep("kv_cache")
    assert client.health()["state"] == "asleep"
    with pytest.raises(EngineAsleepError):
        client.generate("a")
    assert client.wake_up() == []
    client.pause_generation("keep")
    assert client.health()["state"] == "paused"
    client.resume_generation()
    client.drop_weights("reference")
    client.reset_prefix_cache()
    assert client.abort_all() == 0 == client.abort("x")


def test_aborts_come_back_with_tokens_and_can_be_resumed(gated: Any, tiny_model: Path) -> None:
    _, worker, _, client = gated
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        whole = engine.generate(["a", "b"], LONG)
    call = in_thread(lambda: client.generate(["a", "b"], LONG, request_ids=["x", "y"]))
    for _ in range(5):
        worker.began.acquire()
        worker.gate.release()
    worker.began.acquire()  # or the abort might come between two steps, and not be seen to wait
    abort = in_thread(lambda: client.abort(["x", "y"]))
    wait_until(lambda: gated[0]._loop._inbox.num_urgent > 0)
    worker.open()
    assert abort() == 2
    parts = call()
    assert [part.finish_reason for part in parts] == ["abort"] * 2
    assert all(0 < len(part.token_ids) < 60 for part in parts)
    same(client.generate(resume_from=parts), whole)


def test_a_score_that_is_aborted_raises(gated: Any) -> None:
    engine, worker, _, client = gated
    call = in_thread(lambda: client.generate("a", LONG))
    worker.began.acquire()
    score = in_thread(lambda: client.score([[1, 2], list(range(40))]))
    wait_until(lambda: engine.health()["num_held"] == 1)
    abort = in_thread(client.abort_all)
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.open()
    assert abort() == 3 and call()[0].finish_reason == "abort"
    with pytest.raises(AbortedError, match=r"token_ids\[0\] was aborted"):
        score()


def test_a_cancelled_task_aborts_its_requests(gated: Any) -> None:
    engine, worker, _, client = gated

    async def main() -> None:
        task = asyncio.create_task(client.agenerate("a", LONG))
        await asyncio.to_thread(worker.began.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    worker.open()
    wait_until(lambda: engine.metrics()["finished_abort"] == 1)


def test_deadlines_end_calls_with_what_they_have(gated: Any) -> None:
    engine, worker, _, client = gated
    hasty = client.within(0.05)
    call = in_thread(lambda: hasty.generate("a", LONG))
    worker.began.acquire()
    with pytest.raises(TimeoutError, match="score"):
        hasty.score([[1, 2, 3]])
    with pytest.raises(TimeoutError, match="pause_generation"):
        hasty.pause_generation()
    wait_until(lambda: engine._loop._inbox.num_urgent >= 1)
    worker.open()
    assert call()[0].finish_reason == "abort"
    client.resume_generation()
    wait_until(lambda: client.metrics()["server_queued_bytes"] < 1000)


def test_calls_leave_nothing_to_the_garbage_collector(client: RolloutClient) -> None:
    """What refers to itself lives on until a collection, which stops all threads."""

    def num_alive() -> int:
        return sum(type(one) in (Call, Request, ServedCall) for one in gc.get_objects())

    gc.collect()
    before = num_alive()
    gc.disable()
    try:
        client.generate([1, 2, 3], LONG)  # by the server's thread, the next by others
        client.generate(["a"] * 9, LONG)
        client.score([[1, 2, 3]])
        client.abort_all()
        wait_until(lambda: num_alive() == before)
    finally:
        gc.enable()


def test_pieces_that_are_not_what_was_announced_are_refused() -> None:
    arrays = {"lens": np.array([1], np.int32), "logprobs": np.zeros(1, np.float32)}
    call = ScoreCall("score", {})
    call.take(Message(kind="scores", call=1, body={"first": 0}, arrays=arrays))
    for body in ({"first": 1, "total": 3}, {"first": 0, "total": 2}):
        with pytest.raises(ProtocolError, match=r"2 results came, 3 were announced|from 0 on, expected 2"):
            call.succeed(Message(kind="scores", call=1, body=body, arrays=arrays))
    assert not call.future.done()
    assert len(ScoreCall("score", {}).result(Message(kind="scores", body={"first": 0, "total": 1}, arrays=arrays))) == 1


def test_a_pause_that_is_lifted_raises(gated: Any) -> None:
    engine, worker, _, client = gated
    call = in_thread(lambda: client.generate("a", LONG))
    worker.began.acquire()
    pause = in_thread(client.pause_generation)
    wait_until(lambda: engine._loop._inbox.num_urgent > 0)
    resume = in_thread(client.resume_generation)
    wait_until(lambda: engine._loop._inbox.num_urgent == 2)
    worker.open()
    resume()
    with pytest.raises(PauseLiftedError):
        pause()
    call()
