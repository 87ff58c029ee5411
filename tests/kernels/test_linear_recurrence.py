"""kernels.linear_recurrence against loops in NumPy's complex128, written from the equations, with their adjoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.linear_recurrence import IMPLEMENTATIONS, linear_recurrence

ANYWHERE = [name for name in IMPLEMENTATIONS if name != "mosaic"]
every_implementation = pytest.mark.parametrize("implementation", ANYWHERE)
both_directions = pytest.mark.parametrize("reverse", [False, True])
both_diagonals = pytest.mark.parametrize("per_step", [False, True])
SHAPES = [(3, 7, 5), (1, 1, 2), (2, 1, 3), (1, 10, 1)]
FAST = [name for name in ANYWHERE if name != "reference"]


def arrays(shape, per_step, seed=0):
  """x, a and a cotangent in complex64; |a| up to 1."""
  rng = np.random.RandomState(seed)
  a_shape = shape if per_step else shape[-1:]
  a = np.sqrt(rng.uniform(0.5, 1, a_shape)) * np.exp(1j * rng.uniform(-np.pi, np.pi, a_shape))
  x, g = (rng.randn(*shape) + 1j * rng.randn(*shape) for _ in range(2))
  return [value.astype(np.complex64) for value in (x, a, g)]


def numpy_recurrence(x_BTN, a, reverse):
  """h_t = a_t h_{t-1} + x_t, a step at a time."""
  a_BTN = np.broadcast_to(a, x_BTN.shape).astype(np.complex128)
  h_BTN = np.zeros(x_BTN.shape, np.complex128)
  h = 0
  times = range(x_BTN.shape[1])
  for t in reversed(times) if reverse else times:
    h = h_BTN[:, t] = a_BTN[:, t] * h + x_BTN[:, t]
  return h_BTN


def numpy_adjoint(x_BTN, a, g_BTN, reverse):
  """Cotangents of x and a, from the last step computed back to the first: each h_t hands on conj(a_t) of its own."""
  h_BTN = numpy_recurrence(x_BTN, a, reverse)
  a_BTN = np.broadcast_to(a, x_BTN.shape).astype(np.complex128)
  dx_BTN, da_BTN = np.zeros_like(h_BTN), np.zeros_like(h_BTN)
  order = list(range(x_BTN.shape[1]))[:: -1 if reverse else 1]
  dh = 0
  for index in reversed(range(len(order))):
    t = order[index]
    dx_BTN[:, t] = dh + g_BTN[:, t]
    if index > 0:
      da_BTN[:, t] = np.conj(h_BTN[:, order[index - 1]]) * dx_BTN[:, t]
    dh = np.conj(a_BTN[:, t]) * dx_BTN[:, t]
  return dx_BTN, da_BTN if a.ndim == 3 else da_BTN.sum((0, 1))


def parts(*values, dtype=jnp.float32):
  """Real and imaginary parts, one after the other."""
  return [jnp.asarray(part, dtype) for value in values for part in (value.real, value.imag)]


def whole(re, im):
  return np.asarray(re, np.float64) + 1j * np.asarray(im, np.float64)


def error(x, truth):
  return np.abs(x - truth).max() / max(np.abs(truth).max(), 1e-30)


def run(x, a, g, reverse, implementation):
  """States, and the cotangents of x and a for the cotangent g of the states, in complex128."""

  @jax.jit
  def both(g, *arguments):
    h, pull = jax.vjp(lambda *p: linear_recurrence(*p, reverse=reverse, implementation=implementation), *arguments)
    return *h, *pull(g)

  results = both(tuple(parts(g, dtype=x[0].dtype)), *x, *a)
  for result, like in zip(results, (*x, *x, *a), strict=True):
    assert (result.shape, result.dtype) == (like.shape, like.dtype)
  return [whole(*results[index : index + 2]) for index in (0, 2, 4)]


@every_implementation
@both_directions
@both_diagonals
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy_with_gradients(implementation, reverse, per_step, shape):
  x, a, g = arrays(shape, per_step)
  h, dx, da = run(parts(x), parts(a), g, reverse, implementation)
  assert error(h, numpy_recurrence(x, a, reverse)) < 2e-6
  dx_truth, da_truth = numpy_adjoint(x, a, g, reverse)
  assert error(dx, dx_truth) < 2e-6
  assert error(da, da_truth) < 5e-6


@both_directions
@both_diagonals
def test_adjoint_of_this_file_equals_finite_differences(reverse, per_step):
  x, a, g = arrays((2, 5, 3), per_step, seed=1)
  rng = np.random.RandomState(2)
  for truth, which in zip(numpy_adjoint(x, a, g, reverse), (0, 1), strict=True):
    direction = rng.randn(*truth.shape) + 1j * rng.randn(*truth.shape)
    x_step, a_step = (1e-6 * direction, 0) if which == 0 else (0, 1e-6 * direction)
    above, below = (numpy_recurrence(x + s * x_step, a + s * a_step, reverse) for s in (1, -1))
    difference = (np.conj(g) * (above - below)).real.sum() / 2e-6
    np.testing.assert_allclose((np.conj(truth) * direction).real.sum(), difference, rtol=1e-7)


@every_implementation
def test_long_sequences_of_slow_states(implementation):
  """|a| = 0.9999 over 512 steps: errors of powers and of sums must not grow."""
  x, a, g = arrays((2, 512, 8), False)
  a = (0.9999 * a / np.abs(a)).astype(np.complex64)
  h, dx, da = run(parts(x), parts(a), g, False, implementation)
  assert error(h, numpy_recurrence(x, a, False)) < 1e-5
  dx_truth, da_truth = numpy_adjoint(x, a, g, False)
  assert error(dx, dx_truth) < 1e-5 and error(da, da_truth) < 2e-5


@every_implementation
@both_diagonals
def test_bfloat16_keeps_float32_carries(implementation, per_step):
  """200 steps of slow forgetting: a bfloat16 state would lose the small additions."""
  x, a, g = arrays((2, 200, 6), per_step, seed=3)
  a = (0.999 * a / np.abs(a)).astype(np.complex64)
  x, g = (whole(*parts(value, dtype=jnp.bfloat16)) for value in (x, g))
  h, dx, da = run(parts(x, dtype=jnp.bfloat16), parts(a), g, False, implementation)
  assert error(h, numpy_recurrence(x, a, False)) < 5e-3  # the rounding of the result
  dx_truth, da_truth = numpy_adjoint(x, a, g, False)
  assert error(dx, dx_truth) < 5e-3
  assert np.linalg.norm(da - da_truth) < 1e-2 * np.linalg.norm(da_truth)


@every_implementation
def test_bfloat16_diagonal_has_bfloat16_gradient(implementation):
  x, a, g = arrays((2, 5, 3), True, seed=4)
  a = whole(*parts(a, dtype=jnp.bfloat16))
  _, dx, da = run(parts(x), parts(a, dtype=jnp.bfloat16), g, False, implementation)
  dx_truth, da_truth = numpy_adjoint(x, a, g, False)
  assert error(dx, dx_truth) < 2e-6 and error(da, da_truth) < 5e-3


@pytest.mark.parametrize("implementation", FAST)
@both_directions
def test_vmap_and_checkpoint(implementation, reverse):
  """Mapped over independent x and a, rematerialised, under jit: as the reference."""
  rng = np.random.RandomState(5)
  x_re, x_im = jnp.asarray(rng.randn(2, 4, 3, 7, 5), jnp.float32)
  a_re, a_im = jnp.asarray(rng.uniform(-0.7, 0.7, (2, 4, 5)), jnp.float32)

  def loss(implementation, *arguments):
    one = lambda *a: linear_recurrence(*a, reverse=reverse, implementation=implementation)
    h_re, h_im = jax.vmap(jax.checkpoint(one))(*arguments)
    return (h_re**2 + jnp.sin(h_im)).sum()

  every = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
  arguments = (x_re, x_im, a_re, a_im)
  for ours, truth in zip(every(implementation, *arguments), every("reference", *arguments), strict=True):
    assert error(np.asarray(ours), np.asarray(truth)) < 5e-6


@pytest.mark.parametrize("implementation", FAST)
def test_arguments_are_left_as_they_are(implementation):
  """The loop writes over what it was given inside XLA, never over the caller's array."""
  x, a, _ = arrays((2, 6, 3), True)
  arguments = parts(x, a)
  jax.jit(linear_recurrence, static_argnames="implementation")(*arguments, implementation=implementation)
  for before, after in zip(parts(x, a), arguments, strict=True):
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("platform,expected", [(("cpu",), "sequential"), (("gpu", "8.0"), "associative")])
def test_default_depends_on_the_platform(platform, expected):
  arguments = parts(*arrays((2, 5, 3), False)[:2])
  with dispatch.compiling_for(*platform):
    default, chosen = (
      str(jax.make_jaxpr(lambda *a, name=name: linear_recurrence(*a, implementation=name))(*arguments))
      for name in (None, expected)
    )
  assert ("scan[" in default) == ("scan[" in chosen) == (expected == "sequential")


def test_wrong_shapes_and_names_are_refused():
  x_re, x_im, a_re, a_im = parts(*arrays((2, 5, 3), False)[:2])
  with pytest.raises(ValueError, match="expected 3 axes"):
    linear_recurrence(x_re[0], x_im[0], a_re, a_im)
  with pytest.raises(ValueError, match="x_im is float32 of shape"):
    linear_recurrence(x_re, x_im[:, 1:], a_re, a_im)
  with pytest.raises(ValueError, match="x_im is bfloat16"):
    linear_recurrence(x_re, x_im.astype(jnp.bfloat16), a_re, a_im)
  with pytest.raises(ValueError, match="expected float32 or bfloat16"):
    linear_recurrence(x_re.astype(jnp.float16), x_im.astype(jnp.float16), a_re, a_im)
  for wrong in (a_re[1:], a_re[None, None], jnp.ones((5, 3)), jnp.ones((2, 5, 3))):
    with pytest.raises(ValueError, match=r"a_(re|im) has shape"):
      linear_recurrence(x_re, x_im, a_re, wrong)
  with pytest.raises(ValueError, match="a_re has shape"):
    linear_recurrence(x_re, x_im, a_re[1:], a_im[1:])
  with pytest.raises(ValueError, match="implementation='cuda' is unknown; there are 'reference', 'sequential', 'assoc"):
    linear_recurrence(x_re, x_im, a_re, a_im, implementation="cuda")
