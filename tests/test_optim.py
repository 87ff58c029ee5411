"""Schedules, weight-decay mask, optimizers and moving average against closed forms in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from lra_jax import errors, models, optim


def settings(**fields):
  config = common.base("sequencer2d_digits", "digits").optim
  config.learning_rate = 0.4
  for name, value in fields.items():
    target = config.schedule if name in config.schedule and name != "name" else config
    if name == "schedule":
      config.schedule.name = value
    else:
      target[name] = value
  return config


def rates(steps, steps_per_epoch=10.0, **fields):
  schedule = optim.make_schedule(settings(**fields), steps, steps_per_epoch)
  return np.array([schedule(step) for step in range(steps)])


def test_cosine_with_warmup_cycles_and_cooldown():
  r = rates(
    220, schedule="cosine", warmup_epochs=2.0, warmup_rate=0.1, cooldown_epochs=4.0, final_rate=0.01, cycles=2,
    cycle_decay=0.5,
  )  # fmt: skip
  np.testing.assert_allclose(r[:20], 0.1 + 0.3 * np.arange(20) / 20, rtol=1e-5)
  cosine = lambda t, length, peak: 0.01 + (peak - 0.01) * (1 + np.cos(np.pi * t / length)) / 2
  np.testing.assert_allclose(r[20:100], cosine(np.arange(80), 80, 0.4), rtol=1e-4)
  np.testing.assert_allclose(r[100:180], cosine(np.arange(80), 80, 0.2), rtol=1e-4)
  np.testing.assert_allclose(r[180:], 0.01, rtol=1e-4)


def test_one_cycle_is_torchs():
  """torch.optim.lr_scheduler.OneCycleLR with cosine: first = peak / 25, last = peak / 1e4 here, peak after 30 %."""
  r = rates(1000, schedule="one_cycle")
  assert r[0] == pytest.approx(0.4 / 25) and r[-1] == pytest.approx(0.4 / 1e4, rel=0.2)
  assert r.argmax() == 300 and r.max() == pytest.approx(0.4)
  np.testing.assert_allclose(r[150], (0.4 + 0.4 / 25) / 2, rtol=1e-4)


def test_piecewise_and_constant():
  r = rates(40, schedule="piecewise", warmup_epochs=1.0, warmup_rate=0.0, boundaries_epochs=(2.0, 3.0), factor=0.1)
  np.testing.assert_allclose(r[[0, 5, 10, 19, 21, 29, 31]], [0, 0.2, 0.4, 0.4, 0.04, 0.04, 0.004], rtol=1e-5)
  np.testing.assert_allclose(rates(30, schedule="constant"), 0.4, rtol=1e-6)


def test_rsqrt_is_the_benchmarks():
  """google-research/long-range-arena: constant · min(1, t / w) / √max(t, w), with 0.05 and w = 1000 for ListOps."""
  t = np.arange(0, 5000, 7, dtype=np.float64)
  truth = 0.05 * np.minimum(1, t / 1000) / np.sqrt(np.maximum(t, 1000))
  fields = dict(schedule="rsqrt", learning_rate=0.05 / 1000**0.5, warmup_epochs=10.0, warmup_rate=0.0)
  schedule = optim.make_schedule(settings(**fields), 5000, 100.0)
  np.testing.assert_allclose(jax.vmap(schedule)(t.astype(np.int32)), truth, rtol=1e-5)
  # Retrieval: 5,000 steps, all of them in a warm-up of 8,000.
  assert rates(50, **fields | {"warmup_epochs": 8.0})[-1] == pytest.approx(0.05 / 1000**0.5 * 49 / 80)
  assert rates(50, **fields | {"warmup_epochs": 0.0})[16] == pytest.approx(0.05 / 1000**0.5 / 4)


def test_linear_through_its_corners():
  r = rates(100, schedule="linear", shares=(0.0, 0.4, 0.8, 1.0), factors=(0.0, 1.0, 0.05, 0.0))
  truth = np.interp(np.arange(100), [0, 40, 80, 100], [0, 0.4, 0.02, 0])
  np.testing.assert_allclose(r, truth, rtol=1e-5, atol=1e-7)
  for shares, factors in (((0.0, 0.5), (1.0, 0.0)), ((0.0, 1.0), (1.0,)), ((0.0, 0.7, 0.3, 1.0), (1.0,) * 4)):
    with pytest.raises(errors.UserError, match="must ascend from 0 to 1, with one of factors"):
      rates(10, schedule="linear", shares=shares, factors=factors)


@pytest.mark.parametrize("name", ["lru_digits", "s5_digits"])
def test_recurrences_have_a_rate_of_their_own_and_no_decay(name):
  model = models.create(name, input_shape=(8, 1), num_classes=2, rngs=nnx.Rngs(0), width=4, states=8, depth=1)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  grads = jax.tree.map(jnp.ones_like, params)
  step = {}
  for rate in (1.0, 0.25):
    optimizer = optim.make_optimizer(settings(weight_decay=0.5, recurrence_rate=rate, clip_norm=0.0), lambda t: 0.1)
    step[rate] = optimizer.update(grads, optimizer.init(params), params)[0]["blocks"][0]["cell"]
  slow = {key for key in step[1.0] if np.allclose(step[0.25][key], 0.25 * step[1.0][key])}
  expected = {
    "lru_digits": {"nu_log", "theta_log", "gamma_log", "b_re", "b_im"},
    "s5_digits": {"lambda_re", "lambda_im", "log_step"},
  }
  assert slow == expected[name]
  for key, update in step[1.0].items():  # Adam's first step is the rate; a decayed one depends on the weight too
    assert (np.ptp(np.asarray(update)) > 1e-4) == key.startswith("w_")
  if name == "s5_digits":  # B as in S5's "standard" setting: at the recurrence's rate, not decayed; steps at the other
    fields = dict(recurrence=("lambda_re", "lambda_im", "w_b_re", "w_b_im"), no_decay=("w_b_re", "w_b_im"))
    optimizer = optim.make_optimizer(
      settings(weight_decay=0.5, recurrence_rate=0.25, clip_norm=0.0, **fields), lambda t: 0.1
    )
    update = optimizer.update(grads, optimizer.init(params), params)[0]["blocks"][0]["cell"]
    np.testing.assert_allclose(update["w_b_re"], -0.025, rtol=1e-5)
    np.testing.assert_allclose(update["log_step"], -0.1, rtol=1e-5)
    assert np.ptp(np.asarray(update["w_c_re"])) > 1e-4
    with pytest.raises(errors.UserError, match=r"no_decay: parameter 'w_b' does not exist; did you mean"):
      optim.make_optimizer(settings(no_decay=("w_b",)), lambda t: 0.1).init(params)
  with pytest.raises(errors.UserError, match=r"recurrence_rate=-1\.0 must not be negative"):
    optim.make_optimizer(settings(recurrence_rate=-1.0), lambda t: 0.1)


def test_what_does_not_exist_or_fit_is_refused():
  with pytest.raises(errors.UserError, match="'cosin' does not exist; did you mean 'cosine'"):
    rates(10, schedule="cosin")
  with pytest.raises(errors.UserError, match="are 20 steps, the whole training has 15"):
    rates(15, warmup_epochs=2.0)
  with pytest.raises(errors.UserError, match="'adamm' does not exist; did you mean 'adam' or 'adamw'"):
    optim.make_optimizer(settings(name="adamm"), lambda step: 0.1)


def test_only_weight_matrices_are_decayed():
  model = models.create("vanilla_sequencer_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  mask = {jax.tree_util.keystr(path, simple=True, separator="/"): decayed
          for path, decayed in jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))}  # fmt: skip
  assert (
    mask["stages/0/1/lstm/w_ih"] and mask["stages/0/1/lstm/w_hh"] and mask["embeds/0/kernel"] and mask["head/kernel"]
  )
  for name, decayed in mask.items():
    assert decayed == name.endswith(("kernel", "w_ih", "w_hh")), name
  assert not mask["position"] and not mask["stages/0/0/lstm/b_hh"] and not mask["norm/scale"]


def updates(name, gradients, **fields):
  """Parameters after three steps from w = 1 with decay and from b = 1 without, and the settings."""
  config = settings(name=name, learning_rate=0.1, weight_decay=0.2, clip_norm=0.0, **fields)
  optimizer = optim.make_optimizer(config, lambda step: 0.1)
  params = {"kernel": jnp.ones(()), "bias": jnp.ones(())}
  state = optimizer.init(params)
  for g in gradients:
    change, state = optimizer.update({"kernel": jnp.float32(g), "bias": jnp.float32(g)}, state, params)
    params = jax.tree.map(jnp.add, params, change)
  return float(params["kernel"]), float(params["bias"])


def numpy_adam(gradients, coupled, decoupled, b1=0.9, b2=0.999, eps=1e-8):
  w, m, v = 1.0, 0.0, 0.0
  for t, g in enumerate(gradients, 1):
    g = g + coupled * w
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    w -= 0.1 * (m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps) + decoupled * w)
  return w


def numpy_sgd(gradients, decay, nesterov):
  w, m = 1.0, 0.0
  for g in gradients:
    g = g + decay * w
    m = 0.9 * m + g
    w -= 0.1 * (g + 0.9 * m if nesterov else m)
  return w


def numpy_lion(gradients, decay, b1=0.9, b2=0.99):
  w, m = 1.0, 0.0
  for g in gradients:
    w -= 0.1 * (np.sign(b1 * m + (1 - b1) * g) + decay * w)
    m = b2 * m + (1 - b2) * g
  return w


GRADIENTS = (0.5, -0.3, 0.8)


@pytest.mark.parametrize(
  "name,fields,truth",
  [
    ("adamw", {}, lambda decay: numpy_adam(GRADIENTS, 0, decay)),
    ("adam", {}, lambda decay: numpy_adam(GRADIENTS, decay, 0)),
    ("sgd", {"nesterov": True}, lambda decay: numpy_sgd(GRADIENTS, decay, True)),
    ("sgd", {"nesterov": False}, lambda decay: numpy_sgd(GRADIENTS, decay, False)),
    ("lion", {"b2": 0.99}, lambda decay: numpy_lion(GRADIENTS, decay)),
  ],
)
def test_optimizers_equal_their_equations(name, fields, truth):
  kernel, bias = updates(name, GRADIENTS, **fields)
  assert kernel == pytest.approx(truth(0.2), rel=1e-5) and bias == pytest.approx(truth(0.0), rel=1e-5)


def test_clipping_is_by_the_global_norm():
  config = settings(name="sgd", clip_norm=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
  optimizer = optim.make_optimizer(config, lambda step: 1.0)
  params = {"kernel": jnp.zeros(2), "bias": jnp.zeros(1)}
  change, _ = optimizer.update(
    {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(np.concatenate([change["kernel"], change["bias"]]), [-0.6, 0, -0.8], rtol=1e-5)


def test_ema_warms_up():
  values, ema, truth = [1.0, 4.0, -2.0, 3.0], jnp.float32(0.0), 0.0
  for t, value in enumerate(values):
    decay = min(0.3, (1 + t) / (10 + t))
    truth = decay * truth + (1 - decay) * value
    ema = optim.ema_update(ema, jnp.float32(value), jnp.int32(t), 0.3)
  assert float(ema) == pytest.approx(truth, rel=1e-6)


def test_plateau_halves_after_patience():
  config = settings(schedule="plateau", patience=2, factor=0.5)
  plateau = optim.make_plateau(config)
  state, scales = plateau.init({}), []
  for loss in (1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.7, 0.75, 0.76, 0.77):
    _, state = plateau.update({}, state, value=loss)
    scales.append(float(state.scale))
  assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
