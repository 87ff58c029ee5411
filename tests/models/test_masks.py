"""Padding: what stands there does not matter, and a padded sequence is worth what it is worth alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lra_jax import models

LENGTH, VOCABULARY = 24, 11
SEQUENCES = ("trellisnet_digits", "lipschitz_rnn_digits", "s5_digits", "lru_digits", "vit_digits", "pit_digits",
             "lra_transformer_digits", "nystromformer_digits", "mlp_mixer_digits", "gmlp_digits")  # fmt: skip


def create(name, length=LENGTH, **overrides):
  if "patch_size" in models.fields(name):
    overrides["patch_size"] = 1
  model = models.create(
    name, input_shape=(length,), vocab_size=VOCABULARY, num_classes=5, rngs=nnx.Rngs(0), **overrides
  )
  for path, parameter in nnx.iter_graph(model):  # heads and gates that start at zero would hide all that is wrong
    if isinstance(parameter, nnx.Param):
      noise = np.random.RandomState(len(path)).randn(*parameter.shape) * 0.1
      parameter[...] = parameter[...] + jnp.asarray(noise, jnp.float32)
  return model


def logits(model, x_BL, lengths_B=None, **options):
  graphdef, state = nnx.split(model)
  mask_BL = None if lengths_B is None else np.arange(x_BL.shape[1]) < np.asarray(lengths_B).reshape(-1, 1)
  return np.asarray(jax.jit(lambda state, x, mask: nnx.merge(graphdef, state)(x, mask_BL=mask, **options))(
    state, x_BL, mask_BL
  ))  # fmt: skip


def draw(seed, batch=3):
  return np.random.RandomState(seed).randint(1, VOCABULARY, (batch, LENGTH)).astype(np.int32)


VARIANTS = [
  *((name, {}) for name in SEQUENCES),
  ("vit_digits", {"pool": "cls"}),
  ("lra_transformer_digits", {"pool": "cls"}),
  ("nystromformer_digits", {"form": "bert"}),
  ("s5_digits", {"bidirectional": True}),
  ("s5_digits", {"pool": "last"}),
  ("lipschitz_rnn_digits", {"gated": True}),
]


@pytest.mark.parametrize("name,overrides", VARIANTS)
def test_what_stands_in_the_padding_does_not_matter(name, overrides):
  model = create(name, **overrides)
  lengths = np.array([LENGTH, 13, 7])
  x, other = draw(0), draw(1)
  padding = np.arange(LENGTH) >= lengths.reshape(-1, 1)
  expected = logits(model, x, lengths)
  assert np.isfinite(expected).all() and np.ptp(expected) > 1e-3
  np.testing.assert_allclose(logits(model, np.where(padding, other, x), lengths), expected, rtol=1e-5, atol=1e-6)
  assert np.abs(logits(model, np.where(padding, x, other), lengths)[1:] - expected[1:]).max() > 1e-3
  # Where nothing is padding, the mask changes nothing.
  np.testing.assert_allclose(logits(model, x, [LENGTH] * 3), logits(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "name,overrides",
  [
    ("trellisnet_digits", {}),
    ("lipschitz_rnn_digits", {}),
    ("lipschitz_rnn_digits", {"gated": True}),
    ("s5_digits", {"bidirectional": True}),
    ("s5_digits", {"pool": "last"}),
    ("lru_digits", {}),
    ("vit_digits", {"position": "none"}),
    ("vit_digits", {"position": "none", "pool": "cls"}),
    ("lra_transformer_digits", {"position": "sinusoidal"}),
  ],
)
def test_a_padded_sequence_is_worth_what_it_is_alone(name, overrides):
  """Models whose parameters do not depend on the length."""
  model, x = create(name, **overrides), draw(2)
  expected = logits(create(name, 13, **overrides), x[:, :13])
  np.testing.assert_allclose(logits(model, x, [13] * 3), expected, rtol=1e-4, atol=1e-5)


def test_fnet_mixes_padding_and_leaves_it_out_of_the_mean():
  """As in the paper, where a padding token is a token; NumPy computes the mean."""
  model, x, lengths = create("fnet_digits"), draw(3), np.array([LENGTH, 13, 7])
  kept = []
  model.pooler, model.head = _Keep(kept), lambda x: x
  model(x, mask_BL=np.arange(LENGTH) < lengths.reshape(-1, 1))
  means = np.asarray(kept.pop())
  every = create("fnet_digits")
  every.pooler, every.head, every.pool = _Keep(kept), lambda x: x, "first"
  tokens = []
  for position in range(LENGTH):  # "first" reads token 0 of what the blocks return
    blocks = every.blocks
    every.blocks = [*blocks[:-1], lambda x, *rest, p=position, last=blocks[-1]: jnp.roll(last(x, *rest), -p, 1)]
    every(x)
    tokens.append(np.asarray(kept.pop()))
    every.blocks = blocks
  tokens = np.stack(tokens, 1)
  expected = np.stack([tokens[i, :n].mean(0) for i, n in enumerate(lengths)])
  np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lra_transformer_digits", "s5_digits", "fnet_digits"])
def test_a_pair_is_two_sequences_seen_by_one_encoder(name):
  """The features are those of the encoder alone, by a forward pass of each document; NumPy does the rest."""
  overrides = {"patch_size": 1} if "patch_size" in models.fields(name) else {}
  pair = models.create(
    name, input_shape=(2, LENGTH), vocab_size=VOCABULARY, num_classes=2, rngs=nnx.Rngs(0), **overrides
  )
  x = np.stack([draw(5), draw(6)], axis=1)
  lengths = np.array([[LENGTH, 9], [13, 13], [1, LENGTH]])
  mask = np.arange(LENGTH) < lengths[..., None]
  features = [np.asarray(pair.encoder(x[:, i], mask_BL=mask[:, i]), np.float64) for i in range(2)]
  both = np.concatenate([*features, features[0] * features[1], features[0] - features[1]], axis=1)
  kernels = {part: np.asarray(getattr(pair, part).kernel[...], np.float64) for part in ("hidden", "head")}
  biases = {part: np.asarray(getattr(pair, part).bias[...], np.float64) for part in ("hidden", "head")}
  truth = np.maximum(both @ kernels["hidden"] + biases["hidden"], 0) @ kernels["head"] + biases["head"]
  ours = np.asarray(pair(x, mask_BL=mask))
  np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-5)
  other = np.where(mask, x, 1 + x % (VOCABULARY - 1))
  if name != "fnet_digits":
    np.testing.assert_allclose(np.asarray(pair(other, mask_BL=mask)), ours, rtol=1e-4, atol=1e-5)
  assert np.abs(np.asarray(pair(x[:, ::-1], mask_BL=mask[:, ::-1])) - ours).max() > 1e-4


class _Keep:
  def __init__(self, kept):
    self.kept = kept

  def __call__(self, x):
    self.kept.append(x)
    return x


@pytest.mark.parametrize(
  "name", ["lra_transformer_digits", "nystromformer_digits", "s5_digits", "lipschitz_rnn_digits"]
)
def test_gradients_are_finite_also_where_a_sequence_is_empty(name):
  model, x = create(name), draw(4)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  mask = np.arange(LENGTH) < np.array([[5], [0], [LENGTH]])

  @jax.jit
  def slope(params):
    return jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(x, mask_BL=mask) ** 2).sum())(params)

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope(params)))


@pytest.mark.parametrize("name", [n for n in SEQUENCES if models.reads_shorter(n)])
def test_a_batch_may_be_cut_to_its_longest_sequence(name):
  model, x = create(name), draw(7)
  expected = logits(model, x, [13, 9, 4])
  np.testing.assert_allclose(logits(model, x[:, :14], [13, 9, 4]), expected, rtol=1e-4, atol=1e-5)
