"""Signatures of the extension module; what each function does is in its docstring and in docs/numerics.md."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

LINEAR_K_SEGMENT: int

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def set_num_threads(count: int) -> None: ...
def num_threads() -> int: ...
def pack_linear(w: Floats, panels: Floats) -> None: ...
def pack_gate_up(gate: Floats, up: Floats, panels: Floats) -> None: ...
def linear(x: Floats, panels: Floats, n: int, bias: Floats | None, out: Floats) -> None: ...
def swiglu_linear(x: Floats, panels: Floats, f: int, out: Floats) -> None: ...
def linear_unpacked(x: Floats, w: Floats, bias: Floats | None, out: Floats) -> None: ...
def matmul(
    a: Floats, b: Floats, out: Floats, trans_a: bool = ..., trans_b: bool = ..., accumulate: bool = ...
) -> None: ...
def fma_peak(seconds: float) -> float: ...
def read_bandwidth(bytes: int, seconds: float) -> float: ...  # noqa: A002
def embedding(ids: Ints, table: Floats, out: Floats) -> None: ...
def embedding_backward(ids: Ints, dout: Floats, dtable: Floats) -> None: ...
def gather_rows(x: Floats, rows: Ints, out: Floats) -> None: ...
def swiglu(gate: Floats, up: Floats, out: Floats) -> None: ...
def swiglu_backward(dout: Floats, gate: Floats, up: Floats, dgate: Floats, dup: Floats) -> None: ...
def rms_norm(x: Floats, w: Floats, eps: float, out: Floats, inv: Floats | None = ...) -> None: ...
def add_rms_norm(
    residual: Floats, delta: Floats, w: Floats, eps: float, residual_out: Floats, out: Floats, inv: Floats | None = ...
) -> None: ...
def rms_norm_backward(dy: Floats, x: Floats, w: Floats, inv: Floats, dx: Floats, dw: Floats) -> None: ...
def rope(x: Floats, positions: Ints, rope: Floats, interleaved: bool, inverse: bool, out: Floats) -> None: ...
def kv_write(k: Floats, v: Floats, slot_mapping: Ints, k_cache: Floats, v_cache: Floats) -> None: ...
def qkv_to_cache(
    qkv: Floats,
    heads: int,
    kv_heads: int,
    q_norm: Floats | None,
    k_norm: Floats | None,
    eps: float,
    positions: Ints,
    rope: Floats,
    interleaved: bool,
    slot_mapping: Ints,
    k_cache: Floats,
    v_cache: Floats,
    q_out: Floats,
) -> None: ...
def attention(
    q: Floats,
    k_cache: Floats,
    v_cache: Floats,
    block_tables: Ints,
    seq_starts: Ints,
    context_lens: Ints,
    scale: float,
    out: Floats,
) -> None: ...
def attention_backward(
    dout: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    out: Floats,
    seq_starts: Ints,
    scale: float,
    dq: Floats,
    dk: Floats,
    dv: Floats,
) -> None: ...
def sample(
    logits: Floats,
    temperature: Floats,
    top_k: Ints,
    top_p: Floats,
    min_p: Floats,
    repetition_penalty: Floats,
    presence_penalty: Floats,
    frequency_penalty: Floats,
    seed: NDArray[np.uint64],
    sample_index: NDArray[np.uint32],
    position: NDArray[np.uint32],
    forced: Ints,
    history_start: Ints,
    history_token: Ints,
    history_count: Ints,
    bias_start: Ints,
    bias_token: Ints,
    bias_value: Floats,
    tokens: Ints,
    logprobs: Floats,
    policy_logprobs: Floats,
    entropy: Floats,
    raw_logprobs: Floats | None = ...,
) -> None: ...
def log_softmax_backward(
    logits: Floats, targets: Ints, temperature: Floats, dlogprob: Floats, dentropy: Floats
) -> None: ...
def philox4x32(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[int, int, int, int]: ...
