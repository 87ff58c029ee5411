"""What only a faithful build shows: causality, spectra, independence of the batch, symmetries, starting points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels.linear_recurrence
from kernels.nystrom_attention import nystrom_attention, reference
from lra_jax import errors, models
from lra_jax.data import tasks
from lra_jax.models import lra_transformer, s5, vit

RNG = np.random.RandomState(0)
DIGITS = [name for name in models.names() if name.endswith("_digits")]
# What a model with patches needs on sequences and tokens.
PIXELS = {name: {"patch_size": 1} if models.REGISTRY[name][1].get("patch_size", 1) > 1 else {} for name in DIGITS}
VIEWS = ["digits", "digits_sequence", "digits_permuted", "digits_tokens"]


def create(name, shape=(64, 3), classes=10, **overrides):
  return models.create(name, input_shape=shape, num_classes=classes, rngs=nnx.Rngs(0), **overrides)


def evaluate(model, x):
  """The model's logits by one compiled program: running its parts one by one compiles each of them."""
  graphdef, state = nnx.split(model)
  return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def normal(*shape):
  return jnp.asarray(np.random.RandomState(1).randn(*shape), jnp.float32)


# TrellisNet


def test_trellisnet_is_causal():
  model = create("trellisnet_digits", (12, 2), hidden=5, outputs=3, dilations=(1, 1, 2, 4))
  jacobian = jax.jacobian(lambda x: model.states(x, np.arange(12))[0].sum(-1))(normal(1, 12, 2))[:, 0]  # (steps, L, C)
  reach = np.abs(np.asarray(jacobian)).sum(-1) > 0
  assert not np.triu(reach, 1).any()
  past = np.arange(12).reshape(-1, 1) - np.arange(12)
  np.testing.assert_array_equal(reach, (past >= 0) & (past <= 1 + 1 + 2 + 4))  # the receptive field, and all of it


def test_trellisnet_ties_its_weights_over_levels():
  count = lambda dilations: models.count_params(create("trellisnet_digits", dilations=dilations))
  assert count((1,)) == count((1, 1, 2, 4, 8, 16, 32))


def test_trellisnet_computes_only_what_the_last_step_needs():
  """The same h as if every step of every level were computed, and fewer operations than all levels would take."""
  from lra_jax import flops

  model = create("trellisnet", (1024, 3), hidden=6, outputs=3)
  x = normal(2, 1024, 3)
  last = jax.jit(lambda x: model.states(x, np.array([1023])))
  np.testing.assert_allclose(last(x)[:, 0], model.states(x, np.arange(1024))[:, -1], rtol=1e-5, atol=1e-7)
  every_level = 11 * 2 * 2 * 1024 * (2 * 9) * (4 * 9)
  assert flops.count(last.trace(x).jaxpr) < 0.35 * every_level


def test_trellisnets_dropout_masks():
  """One mask of channels for all steps and levels; weights of past taps alone are dropped."""
  model = create("trellisnet_digits", (9, 2), hidden=5, outputs=3, dilations=(1, 2), dropout_weight=0.5)
  weights = model._weights(model.w_hidden, None, jax.random.key(0))
  raw = np.asarray(model.w_hidden[...])
  np.testing.assert_array_equal(weights[1], raw[1])
  dropped = np.asarray(weights[0]) == 0
  assert 0.4 < dropped.mean() < 0.6
  np.testing.assert_allclose(np.asarray(weights[0])[~dropped], 2 * raw[0][~dropped], rtol=1e-6)


# LipschitzRNN


@pytest.mark.parametrize("beta", [1.0, 0.75, 0.5])
def test_lipschitz_matrices_have_the_spectrum_of_their_parametrisation(beta):
  model = create("lipschitz_rnn", (8, 3), width=24, beta=beta, gamma=0.2, init_std=20.0)
  for matrix, raw in zip(model.matrices(), (model.w_a, model.w_w), strict=True):
    matrix, raw = np.asarray(matrix, np.float64), np.asarray(raw[...], np.float64)
    symmetric = (1 - beta) * (raw + raw.T) - 0.2 * np.eye(24)
    np.testing.assert_allclose((matrix + matrix.T) / 2, symmetric, atol=1e-5)
    real = np.linalg.eigvals(matrix).real
    bounds = np.linalg.eigvalsh(symmetric)
    assert bounds[0] - 1e-4 <= real.min() and real.max() <= bounds[-1] + 1e-4
    if beta == 1.0:
      np.testing.assert_allclose(real, -0.2, atol=1e-4)


def test_lipschitz_gate_is_for_euler_alone():
  with pytest.raises(errors.UserError, match="the gated form is defined for 'euler' alone"):
    create("lipschitz_rnn", gated=True, method="rk4")


# Nyströmformer


def qkv(batch=3, length=24, heads=2, width=8):
  return [jnp.asarray(a, jnp.float32) for a in np.random.RandomState(0).randn(3, batch, length, heads, width)]


@pytest.mark.parametrize("pinv_init,independent", [("per_matrix", True), ("global", False)])
def test_nystrom_output_of_an_example_does_not_depend_on_the_others(pinv_init, independent):
  q, k, v = qkv()
  run = functools.partial(nystrom_attention, landmarks=6, pinv_init=pinv_init)
  alone, together = run(q[:1], k[:1], v[:1]), run(q.at[1:].multiply(5), k.at[1:].multiply(5), v)[:1]
  assert (np.abs(alone - together).max() < 1e-6) == independent


@pytest.mark.parametrize("length", [24, 7])
def test_nystrom_with_a_landmark_for_every_token_is_softmax_attention(length):
  q, k, v = qkv(length=length)
  truth = jax.nn.dot_product_attention(q, k, v)
  np.testing.assert_allclose(nystrom_attention(q, k, v, landmarks=length), truth, atol=1e-5)


def test_nystrom_landmarks_are_means_of_equal_segments_or_nearly():
  x = np.random.RandomState(0).randn(2, 23, 2, 4).astype(np.float32)
  truth = np.stack([part.mean(1) for part in np.array_split(x, 5, axis=1)], 1)  # the first ones longer
  np.testing.assert_allclose(reference.segment_means(jnp.asarray(x), 5), truth, atol=1e-6)
  np.testing.assert_allclose(
    reference.segment_means(jnp.asarray(x[:, :20]), 5), x[:, :20].reshape(2, 5, 4, 2, 4).mean(2), atol=1e-6
  )


def test_nystrom_against_numpy_with_a_mask():
  """Equations of the paper in float64, six steps of the iteration, padding at the end."""
  q, k, v = (np.asarray(a, np.float64) for a in qkv(length=20))
  mask = (np.arange(20) < np.array([[20], [13], [5]])).astype(float)
  w_skip = np.random.RandomState(3).randn(5, 2)
  ours = nystrom_attention(
    *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(w_skip, jnp.float32), landmarks=4,
    mask_BL=jnp.asarray(mask),
  )  # fmt: skip

  def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  for b in range(3):
    for n in range(2):
      qs, ks = (a[b, :, n] * 8**-0.25 * mask[b, :, None] for a in (q, k))
      vs = v[b, :, n] * mask[b, :, None]
      ql, kl = qs.reshape(4, 5, 8).mean(1), ks.reshape(4, 5, 8).mean(1)
      a = softmax(ql @ kl.T)
      z = a.T / a.sum(0).max()
      eye = np.eye(4)
      for _ in range(6):
        z = 0.25 * z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z)))
      truth = softmax(qs @ kl.T) @ z @ (softmax(ql @ ks.T - 1e9 * (1 - mask[b])) @ vs)
      truth += np.stack([np.convolve(vs[:, c], w_skip[::-1, n], "same") for c in range(8)], 1)
      np.testing.assert_allclose(ours[b, :, n], truth, atol=2e-5)


def test_nystrom_refuses_what_does_not_fit():
  q, k, v = qkv()
  for keywords, message in (
    (dict(landmarks=25), "must be between 1 and the 24 tokens"),
    (dict(landmarks=4, pinv_init="other"), "'other' is unknown"),
    (dict(landmarks=4, w_skip_RN=jnp.ones((4, 2))), r"expected \(odd, 2\)"),
    (dict(landmarks=4, mask_BL=jnp.ones((3, 23))), r"mask has shape \(3, 23\)"),
    (dict(landmarks=4, implementation="fast"), "'fast' is unknown"),
  ):
    with pytest.raises(ValueError, match=message):
      nystrom_attention(q, k, v, **keywords)
  with pytest.raises(errors.UserError, match="landmarks=65 must be between 1 and the 64 tokens"):
    create("nystromformer_digits", landmarks=65, patch_size=1)


# FNet, gMLP, ViT


def test_fnets_mixing_is_self_adjoint():
  import kernels.fft_mixing

  x, y = normal(2, 12, 8), normal(2, 12, 8)[::-1]
  mix = kernels.fft_mixing.fft_mixing
  np.testing.assert_allclose((mix(x) * y).sum(), (x * mix(y)).sum(), rtol=1e-4)


def test_gmlp_starts_as_the_identity_gate():
  model = create("gmlp_ti16", (32, 32, 3), patch_size=8)
  x = normal(2, 16, 768)
  np.testing.assert_allclose(model.blocks[7].gate(x), x[..., :384], atol=1e-4)


@pytest.mark.parametrize("name,overrides", [("vit_digits", {"patch_size": 1}), ("pit_digits", {})])
def test_without_positions_an_order_of_pixels_means_nothing(name, overrides):
  x, order = normal(2, 64, 1), np.random.RandomState(0).permutation(64)
  for position, same in (("none", True), ("learned", False)):
    model = create(name, (64, 1), position=position, **overrides)
    model.head.kernel[...] = normal(*model.head.kernel.shape)
    assert (np.abs(evaluate(model, x) - evaluate(model, x[:, order])).max() < 1e-4) == same


def test_fixed_positions():
  table = vit.sincos2d(3, 5, 8)
  for row in range(3):
    for column in range(5):
      frequencies = [1.0, 10_000.0**-1]
      truth = [f(t * w) for t in (column, row) for f in (np.sin, np.cos) for w in frequencies]
      np.testing.assert_allclose(table[row * 5 + column], truth, atol=1e-6)
  table = lra_transformer.sinusoidal(7, 6)[0]
  for t in range(7):
    truth = [f(t / 10_000 ** (2 * i / 6)) for i in range(3) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[t], truth, atol=1e-6)
  with pytest.raises(errors.UserError, match="needs an image"):
    create("vit_digits", (64, 1), patch_size=1, position="sincos2d")


# S5 and LRU


@pytest.mark.parametrize(
  "c_init,power",
  [("lecun_normal", 2 / (64 * 64)), ("trunc_standard_normal", 2 / 64), ("complex_normal", 1.0)],
)
def test_s5_draws_c_and_steps_as_its_configuration_says(c_init, power):
  """Mean |C|² of D = P' = 64: both parts have variance 1 / (D P') or 1 / P' before the unitary V, or 1/2 without it."""
  cell = create("s5_digits", (64, 3), c_init=c_init, step_min=0.09, depth=1).blocks[0].cell
  found = np.mean(np.asarray(cell.w_c_re[...]) ** 2 + np.asarray(cell.w_c_im[...]) ** 2)
  assert found == pytest.approx(power, rel=0.1)
  steps = np.exp(np.asarray(cell.log_step[...]))
  assert steps.min() >= 0.09 and steps.max() <= 0.1
  with pytest.raises(errors.UserError, match="c_init: 'lecun' does not exist; did you mean 'lecun_normal'"):
    create("s5_digits", (64, 3), c_init="lecun")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["s5_digits", "lru_digits"])
def test_sequential_and_parallel_scan_agree(name, reverse):
  one, other = (create(name, implementation=i) for i in ("sequential", "associative"))
  x = normal(2, 64, 3)[:, :: -1 if reverse else 1]
  np.testing.assert_allclose(evaluate(one, x), evaluate(other, x), atol=2e-5)
  a = (jnp.full(4, 0.6), jnp.full(4, 0.7))
  states = [
    kernels.linear_recurrence.linear_recurrence(
      normal(2, 33, 4), normal(2, 33, 4), *a, reverse=reverse, implementation=i
    )
    for i in ("sequential", "associative")
  ]
  np.testing.assert_allclose(*states, atol=1e-5)


def test_s5_starts_as_the_official_code():
  """HiPPO-LegS's spectrum at 128 states, and standard deviations, as measured by running lindermanlab/S5."""
  eigenvalues, vectors = s5.hippo_legs(128)
  np.testing.assert_allclose(eigenvalues.real, -0.5)
  assert eigenvalues.imag[0] == pytest.approx(-5214.7, abs=0.1)
  assert eigenvalues.imag[-1] == pytest.approx(-0.235, abs=1e-3)
  n = np.arange(128)
  q = np.sqrt(2 * n + 1)
  hippo = -np.tril(q.reshape(-1, 1) * q, -1) - np.diag(n + 1)  # Gu et al. 2020, equation 4
  low_rank = np.sqrt(n + 0.5)
  normal_part = hippo + low_rank.reshape(-1, 1) * low_rank
  np.testing.assert_allclose(normal_part @ vectors, vectors * eigenvalues, atol=1e-8)
  cell = create("s5", (1024, 1)).blocks[2].cell
  assert cell.w_b_re.shape == (192, 512) and cell.w_c_re.shape == (512, 384)
  b = np.concatenate([cell.w_b_re[...], cell.w_b_im[...]])
  assert np.sqrt((b**2).mean() * 2) == pytest.approx(384**-0.5, rel=0.02)
  c = np.concatenate([cell.w_c_re[...], cell.w_c_im[...]])
  assert c.std() == pytest.approx((512 * 384) ** -0.5, rel=0.02)
  steps = np.asarray(cell.log_step[...])
  assert np.log(1e-3) <= steps.min() < np.log(2e-3) and np.log(5e-2) < steps.max() <= np.log(1e-1)


def test_s5_eigenvalues_can_be_kept_inside_the_unit_circle():
  for clip, inside in ((True, True), (False, False)):
    cell = create("s5_digits", clip_eigenvalues=clip).blocks[0].cell
    assert np.abs(cell.discretized()[0]).max() < 1
    cell.lambda_re[...] = jnp.full_like(cell.lambda_re[...], 3.0)
    assert (np.abs(cell.discretized()[0]).max() < 1) == inside


def test_lru_eigenvalues():
  cell = create("lru", states=4000, r_min=0.5, r_max=0.9, max_phase=1.0, width=8, depth=1).blocks[0].cell
  re, im = (np.asarray(part, np.float64) for part in cell.eigenvalues())
  radius, phase = np.hypot(re, im), np.arctan2(im, re)
  squares = np.histogram(radius**2, bins=8, range=(0.25, 0.81))[0] / 4000
  assert squares.sum() == 1 and abs(squares - 1 / 8).max() < 0.02  # uniform on the ring
  assert phase.min() > 0 and phase.max() < 1.0 and abs(phase.mean() - 0.5) < 0.02
  np.testing.assert_allclose(np.exp(cell.gamma_log[...]), np.sqrt(1 - radius**2), rtol=1e-4)
  cell.nu_log[...] = normal(4000) * 5  # whatever the parameters become
  assert np.hypot(*cell.eigenvalues()).max() <= 1


# All models


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DIGITS)
def test_every_model_runs_on_every_task_that_its_input_allows(name, view):
  task = tasks.get(view)
  overrides = PIXELS[name] if len(task.input_shape) < 3 else {}
  make = lambda: create(name, task.input_shape, vocab_size=task.vocab_size, **overrides)
  images_only = name.startswith(("sequencer2d", "vanilla_sequencer", "convmixer", "resnet"))
  if images_only and view != "digits":
    with pytest.raises(errors.UserError, match=f"model {name} reads image input, the task gives {task.view} of shape"):
      make()
    return
  model = make()
  x = RNG.randint(0, 256, (3, *task.input_shape)) if task.view == "tokens" else RNG.randn(3, *task.input_shape)
  logits = evaluate(model, jnp.asarray(x, jnp.int32 if task.view == "tokens" else jnp.float32))
  assert logits.shape == (3, 10) and logits.dtype == jnp.float32 and np.isfinite(logits).all()


def gradient(model, x):
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def run(params, rest):
    model = nnx.merge(graphdef, params, rest)
    logits = model(x, train=True, rngs=nnx.Rngs(dropout=0))
    return (logits * normal(*logits.shape)).sum(), nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

  return jax.jit(jax.value_and_grad(run, has_aux=True))(nnx.to_pure_dict(params), nnx.to_pure_dict(rest))


# Small enough for seconds; every kind of dropout on.
SMALL = {
  "convmixer_digits": dict(width=8, depth=2),
  "fnet_digits": dict(width=8, depth=2, mlp_hidden=16, dropout=0.3),
  "gmlp_digits": dict(width=8, depth=2, drop_path=0.3),
  "lipschitz_rnn_digits": dict(width=8, dropout=0.3),
  "lra_transformer_digits": dict(
    width=8, depth=2, heads=2, qkv_features=8, mlp_hidden=16, dropout=0.3, attention_dropout=0.3
  ),
  "lru_digits": dict(width=8, depth=2, states=4, dropout=0.3),
  "mlp_mixer_digits": dict(width=8, depth=2, token_hidden=4, channel_hidden=16, dropout=0.3),
  "nystromformer_digits": dict(width=8, depth=2, heads=2, mlp_hidden=16, landmarks=8, dropout=0.3),
  "pit_digits": dict(width=8, depth=2, heads=2, dropout=0.3, drop_path=0.3),
  "resnet_digits": dict(depths=(1, 1), widths=(4, 8), drop_path=0.3),
  "s5_digits": dict(width=8, depth=2, states=8, dropout=0.3),
  "trellisnet_digits": dict(hidden=6, dropout_input=0.1, dropout_hidden=0.3, dropout_output=0.1, dropout_weight=0.1),
  "vit_digits": dict(width=8, depth=2, heads=2, dropout=0.3, attention_dropout=0.3),
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_remat_changes_nothing_and_training_is_random_only_by_its_key(name):
  x = normal(4, 8, 8, 1)
  models_ = [create(name, (8, 8, 1), remat=remat, **SMALL[name]) for remat in (False, True)]
  for model in models_:  # nothing may stay at zero: neither heads nor scales of norms
    for _, variable in nnx.iter_graph(model):
      if isinstance(variable, nnx.Param):
        variable[...] += 0.1 * normal(*variable.shape)
  (loss, rest), grads = gradient(models_[0], x)
  (other_loss, other_rest), other_grads = gradient(models_[1], x)
  np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), other_grads, grads)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), other_rest, rest)  # running statistics
  graphdef, params, rest = nnx.split(models_[0], nnx.Param, ...)
  pure = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
  run = jax.jit(lambda key, *pure: nnx.merge(graphdef, *pure)(x, train=True, rngs=nnx.Rngs(dropout=key)))
  one, again, other = (np.asarray(run(jax.random.key(seed), *pure)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  random = any("drop" in key and value for key, value in SMALL[name].items())
  assert (np.abs(one - other).max() > 1e-5) == random


@pytest.mark.parametrize("name", ["convmixer_digits", "resnet_digits", "s5_digits", "lru_digits"])
def test_batch_statistics_are_learned_in_training_and_used_in_evaluation(name):
  model = create(name, (8, 8, 1), **SMALL[name])
  x = 3 + 2 * normal(64, 8, 8, 1)
  before, (_, rest) = evaluate(model, x), gradient(model, x)[0]
  nnx.update(model, rest)
  after = evaluate(model, x)
  assert np.abs(after - before).max() > 1e-3
  if name == "resnet_digits":  # the stem's norm sees the convolution of x: NumPy says what its statistics must be
    kernel = np.asarray(model.conv.kernel[...], np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(model.norm.mean[...], 0.1 * y.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-3)
  np.testing.assert_allclose(evaluate(model, x[:1]), after[:1], rtol=1e-4, atol=1e-5)  # an example on its own


def test_settings_that_do_not_exist_are_refused():
  for name, overrides, message in (
    ("vit_digits", {"pool": "max"}, "pool: 'max' does not exist"),
    ("vit_digits", {"heads": 5}, "heads=5 does not divide the width 64"),
    ("vit_digits", {"position": "sine"}, "position: 'sine' does not exist; did you mean 'sincos2d'"),
    ("fnet_digits", {"pool": "cls"}, "pool: 'cls' does not exist"),
    ("lru_digits", {"activation": "glu"}, "activation: 'glu' does not exist; did you mean 'gelu' or 'full_glu'"),
    ("s5_digits", {"states": 30, "ssm_blocks": 4}, "states=30 must be a multiple of 2 × ssm_blocks=4"),
    ("lipschitz_rnn_digits", {"method": "rk5"}, "method: 'rk5' does not exist; did you mean 'rk4'"),
    ("trellisnet_digits", {"dilations": ()}, "one dilation of at least 1"),
    ("nystromformer_digits", {"skip_kernel": 4}, "skip_kernel=4 must be odd"),
    ("nystromformer_digits", {"form": "gpt"}, "form: 'gpt' does not exist"),
    ("lra_transformer_digits", {"pool": "max"}, "pool: 'max' does not exist"),
    ("gmlp_digits", {"patch_size": 2}, "patch_size=2: the task gives 64 steps in a row"),
  ):
    with pytest.raises(errors.UserError, match=message):
      create(name, (64, 1), **PIXELS[name] | overrides)
  for name in ("convmixer_digits", "vit_digits"):
    with pytest.raises(errors.UserError, match="patch_size=9 does not fit an image of 8×8 px"):
      create(name, (8, 8, 1), patch_size=9)
  with pytest.raises(errors.UserError, match="activation: 'silu' does not exist"):
    create("convmixer_digits", (8, 8, 1), activation="silu")
