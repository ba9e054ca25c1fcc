"""Where a `PolicyModel` is, as far as it can be told without a GPU; `tests/gpu/test_policy_model.py` has the rest."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from zerokl.integrations import NoGpuBackwardError, PolicyModel, policy_model
from zerokl.integrations.policy_forward import refuse_gradients
from zerokl.kernels import dispatch
from zerokl.rollout.models.config import ModelConfig
from zerokl.rollout.models.synthetic import random_tensors, tiny_config

CONFIG = ModelConfig.from_json(tiny_config())


def parameters() -> list[paddle.Tensor]:
    return [paddle.to_tensor(np.ones(3, np.float32), stop_gradient=stop) for stop in (True, False)]


def test_gradients_are_refused_where_they_are_asked_for_and_only_there() -> None:
    frozen, trained = parameters()
    with pytest.raises(NoGpuBackwardError, match=r"paddle.no_grad\(\), or make it with device='cpu'"):
        refuse_gradients([frozen, trained])
    refuse_gradients([frozen])
    with paddle.no_grad():
        refuse_gradients([frozen, trained])


@pytest.mark.parametrize("given", [np.asarray, paddle.to_tensor])
def test_parameters_are_where_their_tensors_are(given: object) -> None:
    tensors = random_tensors(CONFIG, 1)
    policy = PolicyModel(CONFIG, {name: given(values) for name, values in tensors.items()})  # type: ignore[operator]
    assert (policy.device, policy.dtype) == ("cpu", "float32")
    for name, array in policy.named_arrays():
        np.testing.assert_array_equal(array, tensors[name])


def test_the_gpu_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy_model._gpu_of(random_tensors(CONFIG, 1)) is policy_model._gpu_of({"w": paddle.ones([1])}) is None
    there = SimpleNamespace(place=SimpleNamespace(is_gpu_place=lambda: True, gpu_device_id=lambda: 3))
    monkeypatch.setattr(policy_model, "_first_tensor", lambda tensors: there)
    assert policy_model._gpu_of({}) == 3 and policy_model._device_of(None, {}) == "gpu"


def test_what_there_is_not_is_refused_by_name() -> None:
    for options, message in (
        ({"device": "tpu"}, "device must be one of .*'cpu', 'gpu'.* got 'tpu'"),
        ({"device": "gpu", "dtype": "float16"}, "dtype must be one of bfloat16, float32 on .*'gpu', got 'float16'"),
        ({"device": "cpu", "dtype": "bfloat16"}, "dtype must be one of float32 on device 'cpu', got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyModel(CONFIG, **options)  # type: ignore[arg-type]
    doubles = {name: paddle.to_tensor(values.astype(np.float64)) for name, values in random_tensors(CONFIG, 1).items()}
    with pytest.raises(ValueError, match=r"has dtype paddle\.float64; must be float32"):
        PolicyModel(CONFIG, doubles)


def test_packages_that_a_gpu_needs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_GPU_PACKAGES", ("numpy", "no_such_package", "nor_this"))
    asked = (
        lambda: PolicyModel(CONFIG, device="gpu"),
        lambda: dispatch.get_ops("gpu"),
        dispatch.gpu_memory,
        dispatch.device_memory,
    )
    for ask in asked:
        with pytest.raises(ImportError, match=r"zerokl\[gpu\]`; not installed: no_such_package, nor_this$"):
            ask()
