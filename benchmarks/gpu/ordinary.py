"""The decoder as engines compute it in bfloat16 ordinarily: a library's products, and rounding where they round.

NumPy arrays of float32 that hold bfloat16 values. The residual stream, the output of every product, norm, rotation and
gate, and the attention weights are rounded to bfloat16 once each, as by fused kernels (unfused ones round more often);
sums, norms, softmax and its normalisation are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zerokl.kernels.ops import AttentionSpec, KVPool, LayerParams
from zerokl.kernels.reference import attention, elementwise
from zerokl.kernels.reference.ops import ReferenceGateUp, ReferenceLinear, ReferenceOps

Floats = NDArray[np.float32]
Product = Callable[[Floats, Floats], Floats]
"""x [T, K], weight [N, K] of bfloat16 values -> x weight^T in float32 [T, N], not rounded."""


def rounded(values: NDArray[Any]) -> Floats:
    """To the nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def numpy_product(x: Floats, weight: Floats) -> Floats:
    """By the CPU's library, in float32."""
    return np.asarray(x @ weight.T, np.float32)


class OrdinaryOps(ReferenceOps):
    """The part of `zerokl.kernels.ops.Ops` that a forward of a dense model needs. Weights are given in float32."""

    def __init__(self, product: Product = numpy_product) -> None:
        super().__init__()
        self._multiply = product

    def tensor(self, values: NDArray[np.floating]) -> Floats:  # type: ignore[override]
        matrix = values.ndim == 2 and len(values) > 1
        return rounded(values) if matrix else np.array(values, np.float32)

    def kv_pool(self, num_layers: int, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVPool[Any]:
        pool = super().kv_pool(num_layers, num_blocks, block_size, spec)
        return KVPool(pool.keys.astype(np.float32), pool.values.astype(np.float32), block_size)

    def pack_linear(self, weights: Sequence[Any], biases: Sequence[Any]) -> ReferenceLinear:
        packed = super().pack_linear(weights, biases)
        return ReferenceLinear(rounded(packed.weight), packed.bias)  # type: ignore[arg-type]

    def pack_gate_up(self, gate: Any, up: Any) -> ReferenceGateUp:
        return ReferenceGateUp(rounded(gate), rounded(up))  # type: ignore[arg-type]

    def embedding(self, token_ids: NDArray[np.int32], table: Any) -> Any:
        return table[token_ids]

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return rounded(elementwise.rms_norm(x, weight, eps))

    def add_rms_norm(self, residual: Any, delta: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        total: Any = rounded(residual + delta)
        return total, self.rms_norm(total, weight, eps)

    def linear(self, x: Any, weight: ReferenceLinear) -> Any:
        product = self.float_linear(x, weight)
        return rounded(product if weight.bias is None else product + weight.bias.astype(np.float32))

    qkv_linear = linear

    def float_linear(self, x: Any, weight: ReferenceLinear) -> Floats:
        """The product without bias and rounding."""
        return self._multiply(x, weight.weight)  # type: ignore[arg-type]

    def swiglu_linear(self, x: Any, weight: ReferenceGateUp) -> Any:
        gate, up = (rounded(self._multiply(x, part)) for part in (weight.gate, weight.up))  # type: ignore[arg-type]
        return rounded(elementwise.swiglu(gate, up))  # type: ignore[arg-type]

    def attention(self, qkv: Any, layer: int, params: LayerParams[Any], rope: Any, spec: AttentionSpec) -> Any:
        """See `Ops.attention`; one sequence from its first token on."""
        inputs, pool = self._inputs, self._pool
        assert inputs is not None and pool is not None and len(inputs.context_lens) == 1
        heads = qkv.reshape(len(qkv), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = np.split(heads, [spec.num_heads, spec.num_heads + spec.num_kv_heads], axis=1)
        if params.q_norm is not None:
            q = self.rms_norm(q, params.q_norm, spec.norm_eps)
        if params.k_norm is not None:
            k = self.rms_norm(k, params.k_norm, spec.norm_eps)
        q, k = (rounded(elementwise.rotate(x, inputs.positions, rope, spec.rotary_layout)) for x in (q, k))
        attention.write_kv(k, v, inputs.slot_mapping, pool.keys[layer], pool.values[layer])  # type: ignore[arg-type]
        return causal_attention(q, k, v, spec.scale).reshape(len(q), -1)


def causal_attention(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """softmax(scale q k^T) v of a sequence, weights rounded before the product with v, the result after it.

    q [T, H, D]; k, v [T, KV, D] of bfloat16 values -> [T, H, D].
    """
    out, hidden = np.empty_like(q), np.triu(np.ones((len(q), len(q)), bool), 1)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, shared].T * np.float32(scale)
        scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = rounded(rounded(weights) @ v[:, shared] / weights.sum(-1, keepdims=True))
    return out
