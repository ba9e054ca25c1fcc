"""The supported decoders in ordinary float64 Paddle ops, sharing none with the engine: the yardstick of gradients."""

import math

import numpy as np
import paddle
import paddle.nn.functional as F

from zerokl.rollout.models.layout import EMBED, LM_HEAD, layer_prefix


class OrdinaryDecoder:
    """One sequence at a time; `weights` are leaves that collect gradients."""

    def __init__(self, config, tensors):
        self.config = config
        self.weights = {
            name: paddle.to_tensor(value.astype("float64"), stop_gradient=False) for name, value in tensors.items()
        }

    def linear(self, x, name):
        bias = self.weights.get(f"{name}.bias")
        x = x @ self.weights[f"{name}.weight"].T
        return x if bias is None else x + bias

    def norm(self, x, name):
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * self.weights[name]

    def rotate(self, x):
        size = self.config.head_dim
        angle = np.arange(len(x))[:, None, None] * self.config.rope.theta ** (-np.arange(0, size, 2) / size)
        cos, sin = paddle.to_tensor(np.cos(angle)), paddle.to_tensor(np.sin(angle))
        if self.config.rotary_layout == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return paddle.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return paddle.concat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x, prefix):
        config, length = self.config, len(x)
        q, k, v = (self.linear(x, f"{prefix}{n}_proj").reshape([length, -1, config.head_dim]) for n in "qkv")
        if config.qk_norm:
            q, k = self.norm(q, f"{prefix}q_norm.weight"), self.norm(k, f"{prefix}k_norm.weight")
        q, k, v = (t.transpose([1, 0, 2]) for t in (self.rotate(q), self.rotate(k), v))
        k, v = (t.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, axis=0) for t in (k, v))
        mask = paddle.triu(paddle.full([length, length], -math.inf, "float64"), 1)
        scores = F.softmax(q @ k.transpose([0, 2, 1]) / math.sqrt(config.head_dim) + mask, -1)
        return self.linear((scores @ v).transpose([1, 0, 2]).reshape([length, -1]), f"{prefix}o_proj")

    def block(self, x, prefix):
        return self.linear(
            F.silu(self.linear(x, f"{prefix}gate_proj")) * self.linear(x, f"{prefix}up_proj"), f"{prefix}down_proj"
        )

    def mixture(self, x, prefix):
        """Every expert on every token, weighted by a [T, X] that is 0 outside the choice."""
        moe = self.config.moe
        p = F.softmax(x @ self.weights[f"{prefix}gate.weight"].T, -1)
        correction = self.weights.get(f"{prefix}moe_statics.e_score_correction_bias")
        scores = p if correction is None else p + correction
        chosen = F.one_hot(scores.topk(moe.top_k)[1], moe.num_experts).sum(1).astype("float64")
        weights = p * chosen
        if moe.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clip(min=moe.norm_min)
        outputs = [self.block(x, f"{prefix}experts.{e}.") * weights[:, e : e + 1] for e in range(moe.num_experts)]
        if moe.shared_intermediate_size:
            outputs.append(self.block(x, f"{prefix}shared_experts."))
        return sum(outputs)

    def logprobs(self, ids, temperature):
        x = self.weights[EMBED][paddle.to_tensor(ids.astype("int64"))]
        for index in range(self.config.num_hidden_layers):
            prefix = layer_prefix(index)
            x = x + self.attention(self.norm(x, f"{prefix}input_layernorm.weight"), f"{prefix}self_attn.")
            h = self.norm(x, f"{prefix}post_attention_layernorm.weight")
            mixed = self.config.moe is not None and index in self.config.moe.layers
            x = x + (self.mixture if mixed else self.block)(h, f"{prefix}mlp.")
        head = self.weights[EMBED if self.config.tie_word_embeddings else LM_HEAD]
        logs = F.log_softmax(self.norm(x, "model.norm.weight") @ head.T / temperature, -1)[:-1]
        chosen = logs[paddle.arange(len(ids) - 1), paddle.to_tensor(ids[1:].astype("int64"))]
        return chosen, -(logs.exp() * logs).sum(-1)
