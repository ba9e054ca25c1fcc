"""The supported model families: one entry per name that config.json's `architectures` may hold.

Everything in which the families differ is data here; `zerokl.rollout.models.decoder` has no branch on a family's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerokl.kernels.ops import RotaryLayout

from .moe_config import MoeReader, read_ernie4_5_moe, read_qwen3_moe


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a family fixes, and which fields of config.json decide the rest.

    Defaults are given only for fields that the family's own published configurations leave out.
    """

    name: str
    rotary_layout: RotaryLayout = "half"
    qk_norm: bool = False
    """Query and key heads pass an RMSNorm of their own before the rotary embedding."""
    qkv_bias: bool = False
    """Biases on q, k and v, whatever the configuration says."""
    attention_bias_field: str | None = None
    """Boolean field that puts biases on q, k, v and o; absent means false."""
    mlp_bias_field: str | None = None
    """Boolean field that puts biases on the MLP, which the op table cannot express: refused when true."""
    default_tie_word_embeddings: bool = False
    default_rope_theta: float | None = None
    """None: the field is required."""
    head_dim_required: bool = False
    """False: head_dim may be absent and is then hidden_size / num_attention_heads."""
    num_key_value_heads_required: bool = True
    """False: may be absent and is then num_attention_heads."""
    moe: MoeReader | None = None
    """Reads the mixture of experts; None: every layer is dense."""
    ignored_tensors: tuple[str, ...] = ()
    """Starts of names of tensors that checkpoints hold and the forward has no use for (multi-token prediction)."""


ARCHITECTURES: dict[str, Architecture] = {
    family.name: family
    for family in (
        Architecture(
            name="LlamaForCausalLM",
            attention_bias_field="attention_bias",
            mlp_bias_field="mlp_bias",
            default_rope_theta=10000.0,  # Llama 1 and 2 were published without these two fields
            num_key_value_heads_required=False,
        ),
        Architecture(name="Qwen2ForCausalLM", qkv_bias=True),
        Architecture(
            name="Qwen3ForCausalLM",
            qk_norm=True,
            attention_bias_field="attention_bias",
            head_dim_required=True,
        ),
        Architecture(
            name="Qwen3MoeForCausalLM",
            qk_norm=True,
            attention_bias_field="attention_bias",
            head_dim_required=True,
            moe=read_qwen3_moe,
        ),
        Architecture(
            name="Ernie4_5ForCausalLM",
            rotary_layout="interleaved",
            attention_bias_field="use_bias",
            mlp_bias_field="use_bias",
            default_tie_word_embeddings=True,
        ),
        Architecture(
            name="Ernie4_5_MoeForCausalLM",
            rotary_layout="interleaved",
            attention_bias_field="use_bias",
            mlp_bias_field="use_bias",
            default_tie_word_embeddings=True,
            moe=read_ernie4_5_moe,
            ignored_tensors=("model.mtp_",),
        ),
    )
}


def find_architecture(name: str, source: str) -> Architecture:
    """The family called `name`. Raises ValueError listing the known ones; `source` says where the name was read."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"{source}: architectures names {name!r}, which is not supported; known are {known}") from None
