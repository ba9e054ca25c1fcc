"""GRPO and PPO functions against numbers worked by hand."""

import math

import numpy as np
import paddle
import pytest

from zerokl.integrations.grpo import group_advantages, grpo_loss
from zerokl.integrations.policy_loss import clipped_policy_loss, reference_penalty
from zerokl.integrations.ppo import clipped_value_loss, generalized_advantages, ppo_loss, token_rewards, whiten


def tensor(*values):
    return paddle.to_tensor(np.array(values, np.float32))


def test_group_advantages():
    np.testing.assert_allclose(group_advantages([1, 0, 1, 0, 3, 3], 2, normalize=False), [0.5, -0.5, 0.5, -0.5, 0, 0])
    np.testing.assert_allclose(
        group_advantages([1.0, 0.0, 5, 5], 2, epsilon=0.5), [0.5, -0.5, 0, 0]
    )  # 0.5 / (0.5 + 0.5)
    assert group_advantages([2.0] * 4, 4).tolist() == [0.0] * 4


def test_clipped_policy_loss():
    old = tensor(0.0, 0.0, 0.0, 0.0)
    new = tensor(math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5))
    loss = clipped_policy_loss(new, old, tensor(1.0, -1.0, 1.0, -1.0))
    np.testing.assert_allclose(loss.numpy(), [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)
    loose = clipped_policy_loss(new, old, tensor(1.0, -1.0, 1.0, -1.0), clip_low=0.2, clip_high=0.6)
    np.testing.assert_allclose(loose.numpy(), [-1.5, 1.5, -0.5, 0.8], rtol=1e-6)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    logprobs = tensor(-1.0, -2.0)
    logprobs.stop_gradient = False
    grpo_loss(logprobs, tensor(-1.0, -2.0), tensor(0.5, -3.0)).backward()
    np.testing.assert_allclose(logprobs.grad.numpy(), [-0.5, 3.0])


def test_clipped_tokens_have_no_gradient():
    logprobs = tensor(math.log(1.5))
    logprobs.stop_gradient = False
    clipped_policy_loss(logprobs, tensor(0.0), tensor(1.0)).sum().backward()
    assert logprobs.grad.numpy().tolist() == [0.0]


def test_reference_penalty_is_k3():
    np.testing.assert_allclose(
        reference_penalty(tensor(-1.0, -1.0), tensor(-1.0, -2.0)).numpy(), [0.0, math.exp(-1)], rtol=1e-6
    )


def test_grpo_loss_adds_the_penalty():
    loss = grpo_loss(tensor(-1.0), tensor(-1.0), tensor(2.0), tensor(-2.0), kl_coef=0.1)
    assert float(loss) == pytest.approx(-2.0 + 0.1 * math.exp(-1))


def test_gae_by_hand():
    # one sequence: r = (0, 0, 1), V = (0.5, 0.4, 0.3), gamma 0.9, lambda 0.8
    # delta = (0.9 * 0.4 - 0.5, 0.9 * 0.3 - 0.4, 1 - 0.3) = (-0.14, -0.13, 0.7)
    # A = (-0.14 + 0.72 * 0.374, -0.13 + 0.72 * 0.7, 0.7) = (0.12928, 0.374, 0.7)
    advantages, returns = generalized_advantages([0, 0, 1], [0.5, 0.4, 0.3], [0, 3], gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, [0.12928, 0.374, 0.7], rtol=1e-6)
    np.testing.assert_allclose(returns, [0.62928, 0.774, 1.0], rtol=1e-6)


def test_gae_does_not_leak_between_sequences():
    alone, _ = generalized_advantages([1.0, 2.0], [0.1, 0.2], [0, 2])
    packed, _ = generalized_advantages([1.0, 2.0, 9.0], [0.1, 0.2, 5.0], [0, 2, 3])
    np.testing.assert_array_equal(packed[:2], alone)


def test_token_rewards():
    np.testing.assert_allclose(
        token_rewards([1.0, 2.0], [0, 2, 3], kl=[0.1, 0.2, 0.3], kl_coef=0.5), [-0.05, 0.9, 1.85]
    )


def test_whiten():
    np.testing.assert_allclose(whiten([1.0, 3.0]), [-1.0, 1.0], rtol=1e-6)


def test_clipped_value_loss():
    # V moved from 0.0 to 1.0 with clip 0.2; return 1.0: unclipped error 0, clipped (0.2 - 1)^2 = 0.64
    np.testing.assert_allclose(clipped_value_loss(tensor(1.0), tensor(0.0), tensor(1.0)).numpy(), [0.32], rtol=1e-6)


def test_ppo_loss_is_the_sum_of_its_parts():
    args = [tensor(x) for x in (math.log(1.5), 0.0, 1.0, 1.0, 0.0, 1.0, 0.7)]
    assert float(ppo_loss(*args, value_coef=0.5, entropy_coef=0.1)) == pytest.approx(-1.2 + 0.16 - 0.07)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages([1, 2, 3], 2), "multiple of 2"),
        (lambda: group_advantages([1.0], 1), "at least 2"),
        (lambda: group_advantages([1.0, math.nan], 2), "finite"),
        (lambda: grpo_loss(tensor(0.0), tensor(0.0), tensor(0.0), kl_coef=0.1), "reference_logprobs"),
        (lambda: clipped_policy_loss(tensor(0.0), tensor(0.0), tensor(0.0), clip_low=1.0), "clip_low"),
        (lambda: generalized_advantages([0.0], [0.0], [0, 1], gamma=1.5), "gamma"),
        (lambda: generalized_advantages([0.0], [0.0, 1.0], [0, 1]), "shape"),
        (lambda: token_rewards([1.0], [0, 1, 2]), "one value per sequence"),
        (lambda: clipped_value_loss(tensor(0.0), tensor(0.0), tensor(0.0), clip=0.0), "clip"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
