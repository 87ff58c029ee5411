"""kernels.conv2d against NumPy loops in float64, written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.conv2d
from kernels import dispatch
from kernels.conv2d import conv2d

IMPLEMENTATIONS = ["xla", "im2col"]  # "reference" is "xla": test_the_reference_is_xlas_convolution


def numpy_conv(x_BHWC, w_RSIO, strides, padding):
  """One output pixel and one tap at a time."""
  y = np.zeros(_output_shape(x_BHWC.shape, w_RSIO.shape, strides, padding))
  for h, w, r, s, inside_h, inside_w in _terms(x_BHWC.shape, w_RSIO.shape, strides, padding):
    y[:, h, w] += x_BHWC[:, inside_h, inside_w] @ w_RSIO[r, s]
  return y


def numpy_gradients(x_BHWC, w_RSIO, dy_BHWO, strides, padding):
  """Of the sum of y · dy: every term x · w of the forward pass gives one to each."""
  dx, dw = np.zeros(x_BHWC.shape), np.zeros(w_RSIO.shape)
  for h, w, r, s, inside_h, inside_w in _terms(x_BHWC.shape, w_RSIO.shape, strides, padding):
    dx[:, inside_h, inside_w] += dy_BHWO[:, h, w] @ w_RSIO[r, s].T
    dw[r, s] += x_BHWC[:, inside_h, inside_w].T @ dy_BHWO[:, h, w]
  return dx, dw


def _axis(size, kernel, strides, padding):
  """Length of an output axis and zeros before the input."""
  if padding == "SAME":
    length = -(-size // strides)
    return length, max((length - 1) * strides + kernel - size, 0) // 2
  return (size + 2 * padding - kernel) // strides + 1, padding


def _output_shape(x_shape, w_shape, strides, padding):
  lengths = [_axis(size, kernel, strides, padding)[0] for size, kernel in zip(x_shape[1:3], w_shape[:2], strict=True)]
  return x_shape[0], *lengths, w_shape[3]


def _terms(x_shape, w_shape, strides, padding):
  (height, top), (width, left) = (_axis(x_shape[a + 1], w_shape[a], strides, padding) for a in (0, 1))
  for h, w, r, s in np.ndindex(height, width, *w_shape[:2]):
    inside_h, inside_w = h * strides + r - top, w * strides + s - left
    if 0 <= inside_h < x_shape[1] and 0 <= inside_w < x_shape[2]:
      yield h, w, r, s, inside_h, inside_w


def arrays(x_shape, w_shape, strides, padding, seed=0):
  rng = np.random.RandomState(seed)
  return rng.randn(*x_shape), rng.randn(*w_shape), rng.randn(*_output_shape(x_shape, w_shape, strides, padding))


def relative_error(x, truth):
  return np.abs(np.asarray(x, np.float64) - truth).max() / np.abs(truth).max()


def value_and_gradients(dtype, x, w, dy, **keywords):
  """Value, gradient of x and gradient of the kernel under one jit."""

  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: conv2d(x, w, **keywords), x, w)
    return y, *pull(dy)

  return jax.jit(run)(jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(dy, dtype))


CASES = [
  ((2, 6, 6, 3), (3, 3, 3, 4), 1, 1),
  ((2, 6, 6, 3), (3, 3, 3, 4), 2, 1),
  ((2, 5, 7, 3), (3, 3, 3, 4), 2, 1),
  ((2, 6, 5, 3), (1, 1, 3, 4), 1, 0),
  ((2, 6, 5, 3), (1, 1, 3, 4), 2, 0),
  ((1, 12, 11, 3), (7, 7, 3, 2), 2, 3),
  ((2, 6, 5, 3), (2, 4, 3, 2), 3, 2),
  ((2, 6, 6, 3), (3, 3, 3, 4), 2, "SAME"),
  ((2, 5, 4, 3), (4, 2, 3, 4), 1, "SAME"),
  ((2, 7, 8, 2), (1, 2, 2, 3), 4, "SAME"),
  ((1, 3, 2, 2), (6, 5, 2, 3), 1, "SAME"),  # kernel larger than the image
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("x_shape,w_shape,strides,padding", CASES)
def test_values_and_gradients_equal_numpy(implementation, x_shape, w_shape, strides, padding):
  x, w, dy = arrays(x_shape, w_shape, strides, padding)
  truth = (numpy_conv(x, w, strides, padding), *numpy_gradients(x, w, dy, strides, padding))
  keywords = {"strides": strides, "padding": padding, "implementation": implementation}
  for ours, expected in zip(value_and_gradients(jnp.float32, x, w, dy, **keywords), truth, strict=True):
    assert ours.dtype == jnp.float32
    assert relative_error(ours, expected) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel,strides,padding", [(3, 2, 1), (1, 1, 0)])
def test_bfloat16(implementation, kernel, strides, padding):
  x, w, dy = (
    np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
    for a in arrays((2, 6, 6, 4), (kernel, kernel, 4, 5), strides, padding)
  )
  keywords = {"strides": strides, "padding": padding, "implementation": implementation}
  y, dx, dw = value_and_gradients(jnp.bfloat16, x, w, dy, **keywords)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  truth = (numpy_conv(x, w, strides, padding), *numpy_gradients(x, w, dy, strides, padding))
  for ours, expected in zip((y, dx, dw), truth, strict=True):
    assert relative_error(ours, expected) < 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_and_checkpoint(implementation):
  x, w, _ = arrays((2, 4, 4, 2), (3, 3, 2, 3), 2, 1)
  x, w = jnp.asarray(np.stack([x, -2 * x, 3 * x]), jnp.float32), jnp.asarray(w, jnp.float32)
  run = lambda x, w: conv2d(x, w, strides=2, padding=1, implementation=implementation)
  batched = jax.jit(jax.vmap(run, (0, None)))(x, w)
  assert relative_error(batched, np.stack([numpy_conv(a, np.asarray(w), 2, 1) for a in np.asarray(x)])) < 2e-6
  loss = lambda run: lambda w: (jax.vmap(run, (0, None))(x, w) ** 2).sum()
  plain, again = (jax.jit(jax.grad(loss(f)))(w) for f in (run, jax.checkpoint(run)))
  assert relative_error(again, np.asarray(plain, np.float64)) < 1e-6


def test_the_reference_is_xlas_convolution():
  assert kernels.conv2d.IMPLEMENTATIONS["reference"] is kernels.conv2d.IMPLEMENTATIONS["xla"]


def test_none_takes_the_platforms_best():
  def uses_xla(size, kernel, strides=1):
    shapes = jnp.ones((1, size, size, 2)), jnp.ones((kernel, kernel, 2, 3))
    return "conv_general_dilated" in str(jax.make_jaxpr(lambda x, w: conv2d(x, w, strides=strides))(*shapes))

  assert uses_xla(8, 3)
  assert not uses_xla(8, 1) and not uses_xla(4, 3) and not uses_xla(8, 3, 2) and not uses_xla(5, 7)
  with dispatch.compiling_for("gpu"):
    assert uses_xla(8, 1) and uses_xla(4, 3)
  assert not uses_xla(8, 1)


def test_wrong_shapes_and_names_are_refused():
  x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
  with pytest.raises(ValueError, match="expected 4 axes"):
    conv2d(x[0], w)
  for wrong in (w[:, :, :1], w[0], w[:0]):
    with pytest.raises(ValueError, match=r"w has shape .* with 2 inputs"):
      conv2d(x, wrong)
  with pytest.raises(ValueError, match="strides=0"):
    conv2d(x, w, strides=0)
  with pytest.raises(ValueError, match="padding='VALID'"):
    conv2d(x, w, padding="VALID")
  with pytest.raises(ValueError, match="padding=-1"):
    conv2d(x, w, padding=-1)
  with pytest.raises(ValueError, match="padding=0 does not serve an axis of 4 and a kernel of 6"):
    conv2d(x, jnp.ones((6, 6, 2, 5)), padding=0)
  with pytest.raises(ValueError, match="implementation='cuda' is unknown; there are 'reference', 'xla', 'im2col'"):
    conv2d(x, w, implementation="cuda")
