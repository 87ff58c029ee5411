"""TrellisNet, LipschitzRNN, LRA Transformer, S5 and LRU against NumPy float64 written from the equations (oracles.py).

Values, and derivatives with respect to the input along random directions, which the oracle gives by central
differences. Where the oracle's order of axes differs from ours, the conversion is here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from lra_jax import models


def create(name, shape, classes=7, vocab_size=None, **overrides):
  """A model whose parameters and statistics are all random, so that nothing can hide behind a zero or a one."""
  rates = ["dropout"]
  if name == "trellisnet":
    rates = ["dropout_input", "dropout_hidden", "dropout_output", "dropout_weight"]
  model = models.create(
    name, input_shape=shape, num_classes=classes, vocab_size=vocab_size, rngs=nnx.Rngs(0), **dict.fromkeys(rates, 0.0),
    **overrides,
  )  # fmt: skip
  random = np.random.RandomState(1)
  for path, variable in nnx.iter_graph(model):
    if isinstance(variable, nnx.Param | nnx.BatchStat):
      noise = 0.1 * random.randn(*variable.shape)
      variable[...] += np.abs(noise) if path[-1] == "var" else noise
  return model


def array(variable):
  return np.asarray(variable[...], np.float64)


def check(model, shape, oracle, tolerance=1e-5):
  """`oracle` takes the input as float64."""
  random = np.random.RandomState(2)
  x, direction, weights = random.randn(*shape), random.randn(*shape), random.randn(7)
  graphdef, state = nnx.split(model)
  run = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
  with jax.default_matmul_precision("highest"):
    ours = np.asarray(run(jnp.asarray(x, jnp.float32)))
    gradient = jax.grad(lambda x: (nnx.merge(graphdef, state)(x) @ jnp.asarray(weights, jnp.float32)).sum())
    slope = float((np.asarray(jax.jit(gradient)(jnp.asarray(x, jnp.float32)), np.float64) * direction).sum())
  truth = oracle(x)
  assert ours.shape == truth.shape and np.abs(truth).max() > 0.1
  assert np.abs(ours - truth).max() < tolerance * np.abs(truth).max()
  step = 1e-5
  expected = ((oracle(x + step * direction) - oracle(x - step * direction)) @ weights).sum() / (2 * step)
  scale = max(abs(expected), 0.05 * np.abs(truth).max())
  assert abs(slope - expected) < 20 * tolerance * scale, (slope, expected)


@pytest.mark.parametrize(
  "batch,length,overrides",
  [
    (3, 21, dict(dilations=(1, 1, 2, 4, 8))),
    (1, 16, dict(dilations=(1, 2, 4, 8), weight_norm=False)),
    (2, 17, dict(dilations=(1, 3, 2, 3), kernel_size=3)),  # levels that share a dilation, and steps with no pattern
    (2, 5, dict(dilations=(1, 2, 4, 8, 16))),  # reaches far beyond the start
    (2, 19, dict(dilations=(1, 2, 4), kernel_size=1)),
    (2, 20, dict(dilations=(1, 1, 2, 4), remat=True)),
  ],
)
def test_trellisnet(batch, length, overrides):
  model = create("trellisnet", (length, 3), hidden=11, outputs=5, **overrides)
  theirs = {"weight1_v": model.w_input, "weight2_v": model.w_hidden}
  w = {name: array(v).transpose(2, 1, 0) for name, v in theirs.items()}  # (4H, in, k)
  if model.g_input is not None:
    w |= {"weight1_g": array(model.g_input), "weight2_g": array(model.g_hidden)}
  w |= {"bias2": array(model.bias), "head_weight": array(model.head.kernel).T, "head_bias": array(model.head.bias)}
  oracle = lambda x: oracles.trellisnet(x, w, dilations=overrides["dilations"], nout=5)
  check(model, (batch, length, 3), oracle)


@pytest.mark.parametrize(
  "batch,length,overrides",
  [
    (3, 20, dict(method="euler")),
    (1, 33, dict(method="midpoint", beta=0.9, gamma=0.1)),
    (2, 17, dict(method="rk4", epsilon=0.2)),
    (2, 20, dict(gated=True)),
    (2, 9, dict(method="euler", remat=True, unroll=4)),
  ],
)
def test_lipschitz_rnn(batch, length, overrides):
  model = create("lipschitz_rnn", (length, 3), width=12, **overrides)
  w = {"B": array(model.w_a), "C": array(model.w_w)}
  for name, layer in (("E", model.encoder.embed), ("D", model.head), ("Eg", model.gate and model.gate.embed)):
    if layer is not None:
      w |= {f"{name}_weight": array(layer.kernel).T, f"{name}_bias": array(layer.bias)}
  settings = {name: getattr(model, name) for name in ("beta", "gamma", "epsilon", "method")}
  gated = overrides.get("gated", False)
  check(model, (batch, length, 3), lambda x: oracles.lipschitz_rnn(x, w, gated=gated, **settings))
  for ours, raw in zip(model.matrices(), (model.w_a, model.w_w), strict=True):
    truth = oracles.lipschitz_matrix(array(raw), model.beta, model.gamma)
    np.testing.assert_allclose(ours, truth, atol=1e-6)


@pytest.mark.parametrize("batch,length,pool", [(2, 16, "cls"), (1, 13, "mean")])
def test_lra_transformer(batch, length, pool):
  sizes = dict(width=24, depth=2, heads=3, qkv_features=12, mlp_hidden=20, attention_dropout=0.0)
  model = create("lra_transformer", (length,), vocab_size=11, pool=pool, **sizes)
  w = {"embed": array(model.tokenizer.embed.embedding), "position": array(model.position)[0]}
  if pool == "cls":
    w["cls"] = array(model.cls)
  w["layers"] = []
  for block in model.blocks:
    layer = dict(zip("qkv", np.split(array(block.attention.qkv.kernel), 3, axis=1), strict=True))
    layer["out"] = array(block.attention.out.kernel)
    for name, norm in (("ln1", block.norm1), ("ln2", block.norm2)):
      layer |= {f"{name}_scale": array(norm.scale), f"{name}_bias": array(norm.bias)}
    for name in ("fc1", "fc2"):
      dense = getattr(block.mlp, name)
      layer |= {f"{name}_kernel": array(dense.kernel), f"{name}_bias": array(dense.bias)}
    w["layers"].append(layer)
  w |= {"norm_scale": array(model.norm.scale), "norm_bias": array(model.norm.bias)}
  for name, dense in (("head1", model.head_hidden), ("head2", model.head)):
    w |= {f"{name}_kernel": array(dense.kernel), f"{name}_bias": array(dense.bias)}
  tokens = np.random.RandomState(0).randint(0, 11, (batch, length))
  with jax.default_matmul_precision("highest"):
    ours = np.asarray(model(jnp.asarray(tokens)))
  oracle = lambda table: oracles.lra_transformer(tokens, w | {"embed": table}, heads=3, pool=pool)
  truth = oracle(w["embed"])
  assert np.abs(ours - truth).max() < 1e-5 * np.abs(truth).max()
  # Tokens have no gradient: the table of their embeddings stands in for the input.
  random = np.random.RandomState(3)
  direction, weights, step = random.randn(*w["embed"].shape), random.randn(7), 1e-5
  slopes = oracle(w["embed"] + step * direction) - oracle(w["embed"] - step * direction)
  expected = (slopes @ weights).sum() / (2 * step)
  graphdef, params = nnx.split(model)
  loss = lambda params: (nnx.merge(graphdef, params)(jnp.asarray(tokens)) @ jnp.asarray(weights, jnp.float32)).sum()
  with jax.default_matmul_precision("highest"):
    gradient = jax.grad(loss)(params)["tokenizer"]["embed"]["embedding"][...]
  assert (np.asarray(gradient, np.float64) * direction).sum() == pytest.approx(expected, rel=1e-3)


def dense_of(layer):
  return {"kernel": array(layer.kernel), "bias": array(layer.bias)}


def deep_weights(model, cell_name, cell):
  w = {"encoder": dense_of(model.encoder.embed), "decoder": dense_of(model.head), "layers": []}
  for block in model.blocks:
    norm = {
      name: array(getattr(block.norm, name)) for name in ("scale", "bias", "mean", "var") if hasattr(block.norm, name)
    }
    layer = {"norm": norm, cell_name: cell(block.cell)}
    layer |= {name: dense_of(getattr(block, name)) for name in ("out1", "out2") if getattr(block, name) is not None}
    w["layers"].append(layer)
  return w


def s5_cell(cell):
  complex_ = lambda name: array(getattr(cell, f"{name}_re")) + 1j * array(getattr(cell, f"{name}_im"))
  names = {"Lambda": "lambda", "B": "w_b", "C": "w_c"}
  return {theirs: complex_(ours) for theirs, ours in names.items()} | {
    "D": array(cell.d),
    "log_step": array(cell.log_step),
  }


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
@pytest.mark.parametrize(
  "batch,length,overrides",
  [
    (2, 19, dict(bidirectional=True, activation="half_glu1")),
    (1, 16, dict(bidirectional=False, activation="half_glu2", norm="layer")),
    (2, 7, dict(bidirectional=False, activation="full_glu", clip_eigenvalues=True)),
    (2, 12, dict(bidirectional=True, activation="gelu", prenorm=False, pool="last", remat=True)),
  ],
)
def test_s5(batch, length, overrides, implementation):
  sizes = dict(width=10, depth=2, states=8, ssm_blocks=2) | dict(clip_eigenvalues=False) | overrides
  model = create("s5", (length, 3), implementation=implementation, **sizes)
  model.blocks[0].cell.lambda_re[...] = model.blocks[0].cell.lambda_re[...].at[0].set(0.02)  # what clipping is for
  w = deep_weights(model, "ssm", s5_cell)
  names = {"bidirectional": False, "activation": "half_glu1", "norm": "batch", "prenorm": True, "pool": "mean"}
  settings = {name: overrides.get(name, default) for name, default in names.items()}
  clip = overrides.get("clip_eigenvalues", False)
  check(model, (batch, length, 3), lambda x: oracles.s5(x, w, clip_eigs=clip, **settings), tolerance=2e-5)


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
@pytest.mark.parametrize(
  "batch,length,overrides", [(2, 19, {}), (1, 8, dict(norm="layer", prenorm=False)), (2, 11, dict(pool="last"))]
)
def test_lru(batch, length, overrides, implementation):
  model = create("lru", (length, 3), implementation=implementation, width=10, depth=2, states=6, **overrides)

  def cell(cell):
    names = {"B_re": "b_re", "B_im": "b_im", "C_re": "w_c_re", "C_im": "w_c_im", "D": "d"}
    names |= {name: name for name in ("nu_log", "theta_log", "gamma_log")}
    return {theirs: array(getattr(cell, ours)) for theirs, ours in names.items()}

  w = deep_weights(model, "lru", cell)
  check(model, (batch, length, 3), lambda x: oracles.lru(x, w, **overrides), tolerance=2e-5)
