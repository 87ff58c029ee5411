"""Initialisation and behaviour; parameter counts are in test_counts.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lra_jax import errors, models
from lra_jax.models import layers


def abstract(name, shape=(224, 224, 3), classes=1000, **overrides):
  return nnx.eval_shape(
    lambda: models.create(name, input_shape=shape, num_classes=classes, rngs=nnx.Rngs(0), **overrides)
  )


def tiny(shape=(8, 8, 1), **overrides):
  sizes = dict(depths=(2, 1), patch_sizes=(1, 2), embed_dims=(16, 24), hidden_sizes=(4, 6))
  return models.create("sequencer2d_digits", input_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **sizes | overrides)


def with_head(model):
  """The same model with a head that is not zero."""
  model.head.kernel[...] = jax.random.normal(jax.random.key(9), model.head.kernel.shape)
  return model


def test_initialisation_is_the_papers():
  model = models.create("sequencer2d_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0))
  block = model.stages[1][0]
  assert not np.asarray(model.head.kernel[...]).any() and not np.asarray(model.head.bias[...]).any()
  hidden = block.lstm.w_hh.shape[1]
  for parameter in (block.lstm.w_ih, block.lstm.w_hh, block.lstm.b_ih, block.lstm.b_hh):  # U(±1/√hidden)
    values = np.asarray(parameter[...])
    assert np.abs(values).max() <= hidden**-0.5
    assert abs(values.std() / (hidden**-0.5 / 3**0.5) - 1) < 0.1
  kernel = np.asarray(block.mlp.fc1.kernel[...])
  assert abs(np.abs(kernel).max() / (6 / sum(kernel.shape)) ** 0.5 - 1) < 0.01  # Xavier, uniform
  assert 0 < np.asarray(block.mlp.fc1.bias[...]).std() < 2e-6
  assert not np.asarray(block.fc.bias[...]).any()
  stem = np.asarray(model.embeds[1].kernel[...])
  assert abs(stem.std() / np.prod(stem.shape[:3]) ** -0.5 - 1) < 0.05  # LeCun, normal


@pytest.mark.parametrize("scheme", ["xavier", "he"])
def test_other_initialisations(scheme):
  model = models.create("sequencer2d_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0), init=scheme)
  lstm = model.stages[1][0].lstm
  fan_in, _, fan_out = lstm.w_ih.shape
  std = (2 / (fan_in + fan_out)) ** 0.5 if scheme == "xavier" else (2 / fan_in) ** 0.5
  assert abs(np.asarray(lstm.w_ih[...]).std() / std - 1) < 0.03
  assert not np.asarray(lstm.b_ih[...]).any() and not np.asarray(model.head.kernel[...]).any()
  with pytest.raises(errors.UserError, match="'xaver' does not exist; did you mean 'xavier'"):
    models.create("sequencer2d_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0), init="xaver")


def test_drop_rates_are_linear_over_all_blocks():
  model = abstract("sequencer2d_s")
  assert model.drop_rates == pytest.approx(np.linspace(0, 0.1, 18))


def test_drop_path_drops_whole_examples_and_rescales():
  x = jnp.ones((4000, 2, 3))
  y = np.asarray(layers.drop_path(x, 0.25, jax.random.key(0)))
  kept = y[:, 0, 0] != 0
  assert abs(kept.mean() - 0.75) < 0.03
  np.testing.assert_allclose(y, np.broadcast_to(kept[:, None, None] / 0.75, y.shape), rtol=1e-6)


def test_stochastic_depth_needs_randomness_only_in_training():
  model = with_head(tiny(drop_path=0.5))
  x = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
  eval_logits = model(x)
  one, again, other = (model(x, train=True, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3 and np.abs(one - eval_logits).max() > 1e-3


def gradient(model, x):
  graphdef, params = nnx.split(model, nnx.Param)
  run = lambda params: (nnx.merge(graphdef, params)(x, train=True, rngs=nnx.Rngs(dropout=0)) ** 2).sum()
  return jax.jit(jax.value_and_grad(run))(nnx.to_pure_dict(params))


def test_remat_and_unroll_change_nothing():
  x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
  loss, grads = gradient(with_head(tiny(drop_path=0.3)), x)
  for overrides in ({"remat": True}, {"unroll": 4}, {"implementation": "reference"}):
    other_loss, other_grads = gradient(with_head(tiny(drop_path=0.3, **overrides)), x)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), other_grads, grads)


def test_bfloat16_stays_near_float32():
  x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
  truth = np.asarray(with_head(tiny())(x))
  model = with_head(tiny(dtype="bfloat16"))
  logits = model(x)
  assert logits.dtype == jnp.float32 and model.stages[0][0].fc.kernel.dtype == jnp.float32
  assert np.linalg.norm(logits - truth) < 0.02 * np.linalg.norm(truth)


def test_vanilla_sequencer_runs_in_raster_order():
  """A bidirectional LSTM sees all tokens; its forward half at token t must not depend on later tokens of the raster."""
  model = models.create(
    "vanilla_sequencer_digits", input_shape=(4, 4, 1), num_classes=3, rngs=nnx.Rngs(0), depths=(1,), embed_dims=(8,),
    hidden_sizes=(4,),
  )  # fmt: skip
  lstm = model.stages[0][0].lstm
  tokens = jax.random.normal(jax.random.key(1), (1, 16, 8))
  jacobian = jax.jacobian(lambda x: lstm(x)[0])(tokens)[:, :, 0]  # (L, 2K, L, D)
  reach = np.abs(np.asarray(jacobian)).sum(-1) > 0
  forward, backward = reach[:, :4].any(1), reach[:, 4:].any(1)
  np.testing.assert_array_equal(forward, np.tri(16, dtype=bool))
  np.testing.assert_array_equal(backward, np.tri(16, dtype=bool).T)


def test_odd_sizes_lose_the_rest_of_the_last_patch():
  model = with_head(tiny((9, 7, 1), patch_sizes=(2, 1)))
  x = jax.random.normal(jax.random.key(1), (2, 9, 7, 1))
  np.testing.assert_array_equal(model(x), model(x.at[:, 8].set(5.0).at[:, :, 6].set(5.0)))


def test_what_does_not_fit_is_refused_by_name():
  with pytest.raises(errors.UserError, match="'sequencer2d_z' does not exist; did you mean 'sequencer2d"):
    abstract("sequencer2d_z")
  with pytest.raises(errors.UserError, match="field 'depth' does not exist; did you mean 'depths'"):
    tiny(depth=(1, 1))
  with pytest.raises(errors.UserError, match="differ in length"):
    tiny(depths=(1,))
  with pytest.raises(errors.UserError, match="stage 1 gets 8×8 tokens of an image of 8×8 px, fewer than its patch"):
    tiny(patch_sizes=(16, 1))
  with pytest.raises(errors.UserError, match="needs half of embed_dims"):
    models.create(
      "vanilla_sequencer_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0), hidden_sizes=(16,)
    )
