"""build_step_orders: every array against plain loops, over chunks, decoding, scoring and all sampling options."""

import numpy as np
from scheduling_rig import Rig

from zerokl.kernels.ops import StepInputs
from zerokl.rollout.request import Request
from zerokl.rollout.sampling_params import SamplingParams
from zerokl.rollout.step_inputs import build_step_orders
from zerokl.rollout.step_plan import StepPlan

EOS = 40
INPUT_ARRAYS = ["token_ids", "positions", "slot_mapping", "seq_starts", "context_lens", "block_tables", "logit_rows"]
BATCH_DTYPES = {
    np.int32: "top_k forced history_start history_token history_count bias_start bias_token",
    np.float32: "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty bias_value",
    np.uint32: "sample_index position",
    np.uint64: "seed",
}


def mixed_requests() -> list[Request]:
    rng = np.random.default_rng(1)

    def ids(size: int) -> list[int]:
        return rng.integers(0, 40, size).tolist()

    penal = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, max_tokens=30, min_tokens=3, logit_bias={3: 1.5, EOS: 2.0}, stop_token_ids=(5,), seed=9,
    )  # fmt: skip
    return [
        Request.generate(
            "long", ids(70), SamplingParams(max_tokens=6), seed=2**64 - 1, sample_index=3, eos_token_ids=(EOS,)
        ),
        Request.generate("penal", ids(9), penal, seed=9, eos_token_ids=(EOS,)),
        Request.score("score", ids(50), score_start=20),
        Request.score("score_penal", ids(40), score_start=11, sampling_params=penal, eos_token_ids=(EOS,)),
        Request.generate("short", ids(3), SamplingParams(max_tokens=20, raw_logprobs=True), seed=4),
    ]


def check_against_loops(plan: StepPlan, requests: dict[str, Request], inputs: StepInputs, block_size: int) -> None:
    tokens, positions, slots, rows = [], [], [], []
    batch = inputs.sampling
    for index, entry in enumerate(plan.ranks[0].entries):
        request = requests[entry.request_id]
        table = request.block_table[: request.num_blocks].tolist()
        assert inputs.seq_starts[index] == len(tokens)
        assert inputs.context_lens[index] == entry.start + entry.num_tokens
        assert inputs.block_tables[index].tolist() == table + [-1] * (inputs.block_tables.shape[1] - len(table))
        for position in range(entry.start, entry.start + entry.num_tokens):
            tokens.append(int(request.token_ids[position]))
            positions.append(position)
            slot = table[position // block_size] * block_size + position % block_size
            slots.append(-1 if position < request.num_published_blocks * block_size else slot)
            if position >= request.num_prompt_tokens - 1 + request.num_output_tokens:
                check_row(request, position, len(rows), batch)
                rows.append(len(tokens) - 1)
    assert inputs.seq_starts[-1] == len(tokens) and len(rows) == plan.num_rows
    assert inputs.token_ids.tolist() == tokens and inputs.positions.tolist() == positions
    assert inputs.slot_mapping.tolist() == slots and inputs.logit_rows.tolist() == rows
    assert (inputs.step, inputs.policy) == (plan.step, plan.policy)
    assert batch.want_raw == any(
        requests[e.request_id].sampling_params.raw_logprobs for e in plan.ranks[0].entries if e.num_rows
    )


def check_row(request: Request, position: int, row: int, batch) -> None:
    params = request.sampling_params
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        array = getattr(batch, name)
        assert array[row] == array.dtype.type(getattr(params, name)), name
    assert batch.seed[row] == request.seed and batch.sample_index[row] == request.sample_index
    assert batch.position[row] == position + 1
    assert batch.forced[row] == (request.token_ids[position + 1] if request.kind == "score" else -1)
    outputs = request.token_ids[request.num_prompt_tokens : position + 1].tolist()
    span = slice(batch.history_start[row], batch.history_start[row + 1])
    history = dict(zip(batch.history_token[span].tolist(), batch.history_count[span].tolist(), strict=True))
    seen = set(request.token_ids[: position + 1].tolist()) if params.uses_penalties else set()
    assert len(batch.history_token[span]) == len(history)
    assert history == {token: outputs.count(token) for token in seen}
    span = slice(batch.bias_start[row], batch.bias_start[row + 1])
    bias = dict(zip(batch.bias_token[span].tolist(), batch.bias_value[span].tolist(), strict=True))
    wanted = dict(params.logit_bias or {})
    if len(outputs) < params.min_tokens:
        wanted |= dict.fromkeys([*params.stop_token_ids, EOS], -np.inf)
    assert len(batch.bias_token[span]) == len(bias) and bias == wanted


def test_every_array_agrees_with_plain_loops():
    for budget, block_size in ((23, 8), (256, 16)):
        rig = Rig(max_num_batched_tokens=budget, block_size=block_size)
        for request in mixed_requests():
            rig.add(request)
        while (plan := rig.plan()) is not None:
            inputs = build_step_orders(plan, rig.scheduler.requests, block_size)[0].inputs
            check_against_loops(plan, rig.scheduler.requests, inputs, block_size)
            rig.scheduler.update(plan, rig.execute(rig.orders(plan)))
        assert rig.scheduler.num_unfinished == 0


def test_dtypes_and_contiguity():
    rig = Rig(max_num_batched_tokens=23)
    for request in mixed_requests():
        rig.add(request)
    for _ in range(6):
        plan = rig.plan()
        inputs = rig.orders(plan)[0].inputs
        arrays = [(name, getattr(inputs, name), np.int32) for name in INPUT_ARRAYS]
        for dtype, names in BATCH_DTYPES.items():
            arrays += [(name, getattr(inputs.sampling, name), dtype) for name in names.split()]
        for name, array, dtype in arrays:
            assert array.dtype == dtype and array.flags.c_contiguous, name
        rig.scheduler.update(plan, rig.execute(rig.orders(plan)))


def test_a_chunk_without_rows_has_an_empty_sampling_batch():
    rig = Rig(max_num_batched_tokens=5)
    rig.add(Request.generate("a", list(range(12)), SamplingParams(), seed=0))
    inputs = rig.orders(rig.plan())[0].inputs
    assert inputs.logit_rows.shape == inputs.sampling.temperature.shape == inputs.sampling.forced.shape == (0,)
    assert inputs.sampling.history_start.tolist() == inputs.sampling.bias_start.tolist() == [0]


def test_building_twice_gives_the_same_arrays():
    rig = Rig(max_num_batched_tokens=64)
    for request in mixed_requests():
        rig.add(request)
    rig.step()
    plan = rig.plan()
    first, second = (rig.orders(plan)[0].inputs for _ in range(2))
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert first.sampling.history_token.tolist() == second.sampling.history_token.tolist()


def test_a_token_in_published_blocks_is_computed_but_not_written():
    rig = Rig(block_size=8)
    for name in "ab":
        rig.add(Request.generate(name, list(range(16)), SamplingParams(max_tokens=4), seed=0))
        plan = rig.plan()
        slots = rig.orders(plan)[0].inputs.slot_mapping.tolist()
        rig.scheduler.update(plan, rig.execute(rig.orders(plan)))
    (entry,) = [entry for entry in plan.ranks[0].entries if entry.request_id == "b"]
    assert (entry.start, entry.num_tokens, entry.num_rows) == (15, 1, 1)
    assert sorted(slots)[0] == -1 and sorted(slots)[1] >= 0, "of b's token and a's next one"
