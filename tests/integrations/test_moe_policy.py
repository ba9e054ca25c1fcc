"""The mixture of experts in the trainer: replayed routing, frozen corrections, saving, an optimizer's step."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from zerokl.integrations.policy_files import config_content
from zerokl.integrations.policy_model import PolicyModel
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.loader import open_tensors
from zerokl.rollout.models.saver import save_pretrained
from zerokl.rollout.models.synthetic import random_tensors, tiny_moe_config

CONTENTS = {
    "qwen3 moe": tiny_moe_config("Qwen3MoeForCausalLM", norm_topk_prob=False),
    "ernie moe": tiny_moe_config("Ernie4_5_MoeForCausalLM"),
}
IDS = np.random.default_rng(0).integers(0, 96, 40).astype(np.int32)
STARTS = [0, 11, 40]


@pytest.fixture(params=CONTENTS)
def content(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONTENTS[request.param]


@pytest.fixture
def model(content: dict[str, Any]) -> PolicyModel:
    config = ModelConfig.from_json(content)
    return PolicyModel(config, random_tensors(config, seed=1))


def routing_of(model: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the routers choose, [mixtures, T, k]."""
    chosen, route = [], type(model._forward.ops).route

    def recording(self: Any, *arguments: Any) -> Any:
        routing = route(self, *arguments)
        chosen.append(routing.experts)
        return routing

    with monkeypatch.context() as patch:
        patch.setattr(type(model._forward.ops), "route", recording)
        model.logprobs(IDS, STARTS)
    return np.stack(chosen)


def test_replaying_the_routers_own_choice_changes_no_bit(model: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = routing_of(model, monkeypatch)
    np.testing.assert_array_equal(
        model.logprobs(IDS, STARTS, routing=routing)[0].numpy(), model.logprobs(IDS, STARTS)[0].numpy()
    )


def test_another_choice_is_followed_and_holds_while_weights_change(
    model: PolicyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = routing_of(model, monkeypatch)
    other = (routing + 1) % 8
    logprobs = model.logprobs(IDS, STARTS, routing=other)[0]
    assert (logprobs.numpy() != model.logprobs(IDS, STARTS)[0].numpy()).all()
    logprobs.sum().backward()
    used = np.unique(other[0])
    first = model.config.moe.layers[0]
    for expert in range(8):
        gradient = model.named_tensors()[f"model.layers.{first}.mlp.experts.{expert}.up_proj.weight"].grad
        assert (gradient is not None) == (expert in used)
    assert np.abs(model.named_tensors()[f"model.layers.{first}.mlp.gate.weight"].grad.numpy()).max() > 0


def test_gradients_agree_with_finite_differences(model: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along one random direction per kind of tensor, routing frozen."""
    routing = routing_of(model, monkeypatch)
    loss = model.logprobs(IDS, STARTS, routing=routing)[0].sum()
    loss.backward()
    layer = f"model.layers.{model.config.moe.layers[-1]}.mlp."
    kinds = [
        "gate.weight",
        *(f"experts.{int(routing[-1, 0, 0])}.{part}_proj.weight" for part in ("gate", "up", "down")),
    ]
    for name in kinds:
        parameter = model.named_tensors()[layer + name]
        gradient, kept = parameter.grad.numpy().astype(np.float64), parameter.numpy()
        direction = np.sign(gradient) * 1e-3
        values = []
        for sign in (1, -1):
            parameter.set_value(kept + (sign * direction).astype(np.float32))
            values.append(model.logprobs(IDS, STARTS, routing=routing)[0].numpy().astype(np.float64).sum())
        parameter.set_value(kept)
        expected = (gradient * direction).sum()
        assert abs((values[0] - values[1]) / 2 - expected) < 0.01 * abs(expected), name


def test_an_optimizer_leaves_the_correction_and_unused_experts_alone(model: PolicyModel) -> None:
    before = {name: array.copy() for name, array in model.named_arrays()}
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters(), weight_decay=0.0)
    model.logprobs(IDS[:2], [0, 2])[0].sum().backward()
    optimizer.step()
    changed = {name for name, array in model.named_arrays() if (array != before[name]).any()}
    assert "model.layers.1.mlp.gate.weight" in changed
    assert not any(name.endswith("e_score_correction_bias") for name in changed)
    assert 0 < sum(".experts." in name for name in changed) < sum(".experts." in name for name in before)


def test_saving_and_loading(model: PolicyModel, content: dict[str, Any], tmp_path: Any) -> None:
    assert ModelConfig.from_json(config_content(model.config)) == model.config
    loaded = PolicyModel.from_pretrained(model.save_pretrained(tmp_path))
    np.testing.assert_array_equal(loaded.logprobs(IDS, STARTS)[0].numpy(), model.logprobs(IDS, STARTS)[0].numpy())
    assert all(
        not np.any(a) for name, a in PolicyModel(model.config).named_arrays() if name.endswith("correction_bias")
    )


def test_tensors_of_multi_token_prediction_are_left_out_where_the_family_has_them(
    model: PolicyModel, content: dict[str, Any], tmp_path: Any
) -> None:
    tensors = dict(model.named_arrays())
    save_pretrained(tmp_path, content, tensors | {"model.mtp_block.0.norm.weight": np.zeros(4, np.float32)})
    if content["architectures"] == ["Ernie4_5_MoeForCausalLM"]:
        assert dict(open_tensors(tmp_path, model.config)).keys() == tensors.keys()
    else:
        with pytest.raises(ValueError, match=r"not in Qwen3MoeForCausalLM: model\.mtp_block"):
            open_tensors(tmp_path, model.config)
