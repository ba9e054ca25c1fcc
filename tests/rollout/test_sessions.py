"""Conversations of many turns: what a session holds, that no bit depends on the cache, and what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import gated_engine, in_thread, tiny_options, tiny_tensors, update_after, wait_until

from zerokl.rollout.engine import RolloutEngine
from zerokl.rollout.errors import SessionBusyError, SessionClosedError
from zerokl.rollout.kl import mismatch_kl
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.session import Session

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
COLUMNS = ("tokens", "loss_mask", "logprobs", "policy_logprobs", "entropy", "policy_versions")


def converse(
    engine: Any, seed: int | None = 7, num_turns: int = 3, between: Callable[[], Any] = lambda: None
) -> Session:
    """A conversation with a tool that answers each turn with three tokens of it; `between` runs before each answer."""
    session: Session = engine.open_session(PROMPT, seed=seed)
    for turn in range(num_turns):
        rollout = session.generate(dataclasses.replace(PARAMS, top_k=5 * turn))
        between()
        session.append(rollout.token_ids[:3][::-1])
    return session


def same(first: Session, second: Session) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_a_session_holds_all_that_a_trainer_needs(engine: RolloutEngine) -> None:
    session = engine.open_session(PROMPT)
    first = session.generate(PARAMS)
    session.append([100, 101])
    second = session.generate(PARAMS)
    expected = [*PROMPT, *first.token_ids.tolist(), 100, 101, *second.token_ids.tolist()]
    assert session.tokens.tolist() == expected == second.prompt_token_ids.tolist() + second.token_ids.tolist()
    assert session.loss_mask.tolist() == [False] * 10 + [True] * 20 + [False] * 2 + [True] * 20
    assert session.policy_versions.tolist() == [-1] * 10 + [0] * 20 + [-1] * 2 + [0] * 20
    for name in ("logprobs", "policy_logprobs", "entropy"):
        column = getattr(session, name)
        np.testing.assert_array_equal(column[10:30], getattr(first, name))
        np.testing.assert_array_equal(column[32:], getattr(second, name))
        assert np.isnan(column[~session.loss_mask]).all() and column.dtype == np.float32
    turns = [(turn.start, turn.end, turn.finish_reason) for turn in session.turns]
    assert turns == [(10, 30, "length"), (32, 52, "length")]
    assert session.num_free_tokens == 256 - 52
    with pytest.raises(ValueError, match="read-only"):
        session.tokens[0] = 1


def test_scores_are_its_logprobs_bit_for_bit(engine: RolloutEngine) -> None:
    session = engine.open_session(PROMPT, seed=1)
    for params in (
        PARAMS,
        dataclasses.replace(PARAMS, temperature=0.7, top_p=0.9, frequency_penalty=0.5, min_tokens=3, seed=5),
        dataclasses.replace(PARAMS, temperature=0.7, repetition_penalty=1.2, logit_bias={7: 2.0}),
        dataclasses.replace(PARAMS, temperature=0.0),
    ):
        session.generate(params)
        session.append([200, 201, 202])
    np.testing.assert_array_equal(session.score(), session.policy_logprobs)
    np.testing.assert_array_equal(session.score("logprobs"), session.logprobs)
    np.testing.assert_array_equal(asyncio.run(session.ascore()), session.policy_logprobs)
    raw = session.score("raw") == session.policy_logprobs
    assert raw[10:30].all() and not raw[33:53].any(), "temperature 1, then 0.7"
    assert mismatch_kl(session.score(), session.policy_logprobs, session.loss_mask).k3_kl_mean == 0.0
    # the negative controls: one token of a tool, or one parameter, changes what is compared above
    tokens = session.tokens.copy()
    tokens[31] = 5
    said = session._transcript
    changed = Session(engine, engine.limits, dataclasses.replace(said, tokens=tokens), 1).score()
    np.testing.assert_array_equal(changed[:30], session.policy_logprobs[:30])
    assert (changed[33:53] != session.policy_logprobs[33:53]).all()
    warmer = tuple(
        dataclasses.replace(turn, sampling_params=dataclasses.replace(turn.sampling_params, temperature=0.8))
        for turn in session.turns
    )
    warm = Session(engine, engine.limits, dataclasses.replace(said, turns=warmer), 1).score()
    assert (warm[33:53] != session.policy_logprobs[33:53]).any()


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"block_size": 16, "max_num_batched_tokens": 7},
        {"num_blocks": 20, "max_num_seqs": 2},
        {"seed": 99},
    ],
)
def test_a_seed_fixes_the_whole_conversation(engine: RolloutEngine, tiny_model: Path, options: dict[str, Any]) -> None:
    one = converse(engine)
    with RolloutEngine(tiny_options(tiny_model, **options)) as other:
        calls = [in_thread(lambda: other.generate([[5, 6]] * 3, PARAMS)) for _ in range(2)]
        same(one, converse(other))
        for call in calls:
            call()
    assert len({turn.seed for turn in one.turns}) == 3
    # the negative control: another seed gives another conversation
    assert converse(engine, seed=8).tokens.tolist() != one.tokens.tolist()


def test_sessions_without_a_seed_get_one_of_the_engines(tiny_model: Path) -> None:
    def run(seed: int) -> list[Session]:
        with RolloutEngine(tiny_options(tiny_model, seed=seed)) as engine:
            engine.generate("x")  # other calls change nothing
            return [converse(engine, seed=None) for _ in range(2)]

    first, second = run(3), run(3)
    for one, other in zip(first, second, strict=True):
        same(one, other)
    assert len({session.seed for session in [*first, *run(4)]}) == 4
    assert first[0].tokens.tolist() != first[1].tokens.tolist()


def test_a_turn_finds_the_earlier_ones_in_the_cache(engine: RolloutEngine) -> None:
    session = converse(engine)
    for turn in session.turns:
        # The last token of a turn was never computed; full blocks of 8 are shared.
        assert turn.num_cached_tokens == ((turn.start - 4) // 8 * 8 if turn.start > len(PROMPT) else 0)


def test_what_was_evicted_is_computed_again_with_the_same_bits(engine: RolloutEngine, tiny_model: Path) -> None:
    undisturbed = converse(engine)
    with RolloutEngine(tiny_options(tiny_model, num_blocks=24)) as small:
        crowd = np.random.default_rng(0).integers(0, 250, (6, 100)).tolist()
        session = converse(small, between=lambda: small.generate(crowd, SamplingParams(max_tokens=2)))
        same(session, undisturbed)
        assert [turn.num_cached_tokens for turn in session.turns] == [0, 0, 0]
        assert small.metrics()["free_blocks"] == 24, "an idle session holds no block"


def test_weights_may_change_between_turns(tiny_model: Path) -> None:
    with RolloutEngine(tiny_options(tiny_model)) as engine:
        session = engine.open_session(PROMPT, seed=7)
        for version in range(1, 3):
            session.generate(PARAMS)
            session.append([9, 9])
            engine.update_weights(tiny_tensors(version))
        session.generate(PARAMS)
        versions = [set(session.policy_versions[turn.start : turn.end].tolist()) for turn in session.turns]
        assert versions == [{0}, {1}, {2}]
        assert [turn.num_cached_tokens for turn in session.turns] == [0, 0, 0], "keys and values of other weights"
        live = session.score()
    with RolloutEngine(tiny_options(tiny_model)) as fresh:
        for version, turn in enumerate(session.turns):
            if version:
                fresh.update_weights(tiny_tensors(version))
            (scores,) = fresh.score([session.tokens[: turn.end]], prompt_lens=[turn.start])
            span = slice(turn.start, turn.end)
            np.testing.assert_array_equal(scores, session.policy_logprobs[span])
            assert np.array_equal(live[span], session.policy_logprobs[span]) == (version == 2)


def test_weights_may_change_within_a_turn(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        session = engine.open_session(PROMPT)
        turn = in_thread(lambda: session.generate(PARAMS))
        update = update_after(engine, worker, 6, tiny_tensors(1), mode="keep")
        worker.open()
        update()
        turn()
        assert session.policy_versions[10:].tolist() == [0] * 6 + [1] * 14


def test_an_aborted_turn_is_kept_and_can_be_gone_on_with(engine: RolloutEngine, tiny_model: Path) -> None:
    whole = converse(engine, num_turns=1)
    gated, worker = gated_engine(tiny_model)
    with gated:
        session = gated.open_session(PROMPT, seed=7)
        turn = in_thread(lambda: session.generate(PARAMS, request_id="mine"))
        for _ in range(5):
            worker.began.acquire()
            worker.gate.release()
        worker.began.acquire()  # the abort finds a step at the gate
        abort = in_thread(lambda: gated.abort("mine"))
        wait_until(lambda: gated._loop._inbox.num_urgent > 0)
        worker.open()
        assert abort() == 1
        part = turn()
        assert part.finish_reason == "abort" and 0 < len(part.token_ids) < 20
        assert session.tokens[10:].tolist() == part.token_ids.tolist()
        fork = session.fork()
        assert len(session.resume().token_ids) == 20
        session.append(whole.tokens[-3:])
        same(session, whole)
        with pytest.raises(ValueError, match=r"resume needs a last turn .* got one with finish_reason='length' and 3"):
            session.resume()
        with pytest.raises(ValueError, match="resume needs"):
            fork.resume()
        assert asyncio.run(fork.agenerate(PARAMS)).prompt_token_ids.tolist() == [*PROMPT, *part.token_ids.tolist()]


def test_forks_share_what_was_said_and_go_their_own_ways(engine: RolloutEngine) -> None:
    session = converse(engine, num_turns=1)
    forks = [session.fork() for _ in range(3)]
    assert all(fork.tokens is session.tokens for fork in forks)
    for fork in [session, *forks]:
        fork.generate(PARAMS)
        assert fork.turns[-1].num_cached_tokens == (24 if fork is session else 32)
    assert len({fork.tokens.tobytes() for fork in [session, *forks]}) == 4
    again = converse(engine, num_turns=1)
    for fork in forks:
        repeated = again.fork()
        repeated.generate(PARAMS)
        same(repeated, fork)
    assert session.fork(seed=4).seed == 4


def test_what_cannot_be_is_refused_and_changes_nothing(engine: RolloutEngine) -> None:
    session = converse(engine, num_turns=1)
    before = session._transcript
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: session.append([]), "tokens must be a non-empty flat sequence"),
        (lambda: session.append([1, 300]), r"tokens must hold token ids below vocab_size \(300\), got 300"),
        (lambda: session.append([-1]), r"tokens must hold token ids in \[0"),
        (lambda: session.append([1.5]), "tokens must be"),
        (lambda: session.append("text"), "tokens must be token ids, got text"),
        (lambda: session.append([1] * 224), r"at most 223 token ids, which is max_model_len \(256\) less the 33 of"),
        (lambda: session.append([1] * 257), r"at most max_model_len \(256\) tokens, got 257"),
        (lambda: session.generate(SamplingParams(max_tokens=224)), r"max_tokens must be at most 223, .* got 224"),
        (lambda: session.generate(SamplingParams(n=2)), r"n must be 1, got 2: fork"),
        (lambda: session.generate("warm"), "sampling_params must be SamplingParams"),  # type: ignore[arg-type]
        (lambda: session.generate(SamplingParams(stop_token_ids=(300,))), "stop_token_ids must hold"),
        (lambda: session.generate(PARAMS, request_id=""), "request_ids must be"),
        (lambda: session.fork(seed=-1), "seed must be an integer in"),
        (lambda: session.score("wrong"), "definition must be one of"),  # type: ignore[arg-type]
        (lambda: session.score(policy="nobody"), "policy must be one of"),
        (lambda: engine.open_session([]), "prompt must be"),
        (lambda: engine.open_session([300]), "prompt must hold token ids below vocab_size"),
        (lambda: engine.open_session([1] * 257), "prompt must hold at most max_model_len"),
        (lambda: engine.open_session([1], seed=2**64), "seed must be"),
        (lambda: engine.open_session([1]).score(), "score needs a token that the policy sampled, got 1 others"),
        (lambda: engine.open_session([1]).to_rollout(), "a rollout needs a token"),
        (lambda: engine.open_session([1]).resume(), "got a session without turns"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
        assert session._transcript is before
    session.append([1] * 223)
    with pytest.raises(ValueError, match=r"max_tokens must be at most 0"):
        session.generate(SamplingParams(max_tokens=1))


def test_a_closed_session_can_be_read_but_not_go_on(engine: RolloutEngine) -> None:
    with converse(engine, num_turns=1) as session:
        pass
    session.close()
    assert session.is_closed
    for call in (session.generate, session.resume, session.fork, lambda: session.append([1])):
        with pytest.raises(SessionClosedError, match="closed after 1 turns"):
            call()
    np.testing.assert_array_equal(session.score(), session.policy_logprobs)
    assert session.to_rollout().loss_mask is not None


def test_a_session_runs_one_turn_at_a_time(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:
        session = engine.open_session(PROMPT)
        turn = in_thread(lambda: session.generate(PARAMS))
        worker.began.acquire()
        for call in (session.generate, session.fork, session.close, session.resume, lambda: session.append([1])):
            with pytest.raises(SessionBusyError, match="turn 0 of the session is running"):
                call()
        assert session.tokens.tolist() == PROMPT
        worker.open()
        assert len(turn().token_ids) == 20 and session.num_turns == 1


def test_a_turn_that_fails_can_be_asked_for_again(tiny_model: Path) -> None:
    engine, worker = gated_engine(tiny_model)
    with engine:

        async def main() -> Session:
            session = await engine.aopen_session(PROMPT, seed=7)
            task = asyncio.create_task(session.agenerate(PARAMS))
            await asyncio.to_thread(worker.began.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            worker.open()
            assert session.tokens.tolist() == PROMPT
            await session.agenerate(PARAMS)
            return session

        session = asyncio.run(main())
    with RolloutEngine(tiny_options(tiny_model)) as other:
        undisturbed = other.open_session(PROMPT, seed=7)
        undisturbed.generate(PARAMS)
        same(session, undisturbed)


def test_coroutines_share_the_batch(engine: RolloutEngine) -> None:
    async def run(number: int) -> Session:
        session = await engine.aopen_session([number, 1], seed=number)
        for _ in range(3):
            rollout = await session.agenerate(PARAMS)
            session.append(rollout.token_ids[:1])
        return session

    async def main() -> list[Session]:
        return await asyncio.gather(*map(run, range(16)))

    sessions = asyncio.run(main())
    assert engine.metrics()["steps"] < 16 * 60
    for number in (0, 9):
        same(sessions[number], asyncio.run(run(number)))


def test_a_whole_conversation_is_a_rollout(engine: RolloutEngine) -> None:
    session = engine.open_session(PROMPT)
    for _ in range(2):
        session.generate(PARAMS)
        session.append([65, 66])
    rollout = session.to_rollout()
    assert rollout.prompt_token_ids.tolist() == PROMPT
    assert rollout.token_ids.tolist() == session.tokens[10:-2].tolist(), "what follows the last turn teaches nothing"
    assert rollout.version_spans == [(0, 20, 0), (20, 22, -1), (22, 42, 0)]
    assert rollout.generated.sum() == 40 and rollout.text == engine.tokenizer.decode(rollout.token_ids)  # type: ignore[union-attr]
    scores = engine.score(rollout)[0]
    np.testing.assert_array_equal(scores[rollout.generated], rollout.policy_logprobs[rollout.generated])
    with pytest.raises(ValueError, match="no loss_mask"):
        engine.generate(resume_from=dataclasses.replace(rollout, finish_reason="abort"))
    session.generate(dataclasses.replace(PARAMS, temperature=0.5))
    with pytest.raises(ValueError, match=r"must have one temperature, .*\[0.5, 1.0\]"):
        session.to_rollout()


def test_the_pages_program_runs(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "sessions.md"
    program = page.read_text().split("```python\n")[1].split("```")[0]
    assert "models/SmolLM2-135M-Instruct" in program
    names: dict[str, Any] = {}
    exec(program.replace("models/SmolLM2-135M-Instruct", str(tiny_model)), names)
    assert capsys.readouterr().out.splitlines()[-1] == "0.0"
    assert [int(rollout.generated.sum()) for rollout in names["batch"]] == [32, 48]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("generate"), st.integers(1, 12)),
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.sampled_from(["fork", "reset", "crowd"]), st.just(0)),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=25, deadline=None)
@given(EVENTS, st.integers(0, 3))
def test_any_conversation_is_that_of_an_engine_without_a_cache(
    cached: RolloutEngine, uncached: RolloutEngine, events: list[tuple[str, int]], seed: int
) -> None:
    sessions = [engine.open_session([5, 4, 3], seed=seed) for engine in (cached, uncached)]
    for event, size in events:
        if event == "generate":
            for session in sessions:
                session.generate(SamplingParams(max_tokens=size, temperature=0.8))
        elif event == "append":
            for session in sessions:
                session.append(np.arange(size))
        elif event == "fork":
            sessions = [session.fork() for session in sessions]
        elif event == "reset":
            cached.reset_prefix_cache()
        else:
            cached.generate([list(range(size, size + 90)) for size in range(3)], SamplingParams(max_tokens=2))
    same(*sessions)
    if sessions[0].num_turns:
        np.testing.assert_array_equal(sessions[0].score(), sessions[1].policy_logprobs)


@pytest.fixture(scope="module")
def cached(tiny_model: Path) -> Any:
    with RolloutEngine(tiny_options(tiny_model, num_blocks=34)) as engine:
        yield engine


@pytest.fixture(scope="module")
def uncached(tiny_model: Path) -> Any:
    with RolloutEngine(tiny_options(tiny_model, enable_prefix_caching=False)) as engine:
        yield engine


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_may_be_open(tiny_model: Path, count: int) -> None:
    """Each costs its own arrays and about 2 KiB, the engine nothing."""
    params = SamplingParams(max_tokens=1)
    with RolloutEngine(tiny_options(tiny_model, max_num_seqs=512, max_num_batched_tokens=4096)) as engine:
        resident = len(engine._scheduler.requests), engine.metrics()["free_blocks"]
        tracemalloc.start()
        sessions = [engine.open_session(np.arange(index % 50, index % 50 + 24), seed=index) for index in range(count)]
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown / count < sessions[0].nbytes + 3072
        assert sessions[0].nbytes == 24 * 40

        async def all_speak() -> None:
            await asyncio.gather(*(session.agenerate(params) for session in sessions))

        asyncio.run(all_speak())
        assert (len(engine._scheduler.requests), engine.metrics()["free_blocks"]) == resident
        for index in range(0, count, count // 7):
            alone = engine.open_session(np.arange(index % 50, index % 50 + 24), seed=index)
            alone.generate(params)
            same(alone, sessions[index])
