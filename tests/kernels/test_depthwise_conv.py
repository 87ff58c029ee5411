"""kernels.depthwise_conv against NumPy loops in float64, written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.depthwise_conv
from kernels import dispatch
from kernels.depthwise_conv import depthwise_conv2d

IMPLEMENTATIONS = ["xla", "shifted"]  # "reference" is "xla": test_the_reference_is_xlas_convolution


def numpy_conv(x_BHWC, w_RSC):
  """One image row, one column and one tap at a time."""
  y = np.zeros(x_BHWC.shape)
  for h, w, r, s, inside_h, inside_w in _terms(x_BHWC.shape, w_RSC.shape):
    y[:, h, w] += x_BHWC[:, inside_h, inside_w] * w_RSC[r, s]
  return y


def numpy_gradients(x_BHWC, w_RSC, dy_BHWC):
  """Of the sum of y · dy: every term x · w of the forward pass gives one to each."""
  dx, dw = np.zeros(x_BHWC.shape), np.zeros(w_RSC.shape)
  for h, w, r, s, inside_h, inside_w in _terms(x_BHWC.shape, w_RSC.shape):
    dx[:, inside_h, inside_w] += dy_BHWC[:, h, w] * w_RSC[r, s]
    dw[r, s] += (x_BHWC[:, inside_h, inside_w] * dy_BHWC[:, h, w]).sum(0)
  return dx, dw


def _terms(x_shape, w_shape):
  _, height, width, _ = x_shape
  rows, columns, _ = w_shape
  for h, w, r, s in np.ndindex(height, width, rows, columns):
    inside_h, inside_w = h + r - (rows - 1) // 2, w + s - (columns - 1) // 2
    if 0 <= inside_h < height and 0 <= inside_w < width:
      yield h, w, r, s, inside_h, inside_w


def arrays(x_shape, w_shape, seed=0):
  rng = np.random.RandomState(seed)
  return rng.randn(*x_shape), rng.randn(*w_shape), rng.randn(*x_shape)


def relative_error(x, truth):
  return np.abs(np.asarray(x, np.float64) - truth).max() / np.abs(truth).max()


def value_and_gradients(implementation, dtype, x, w, dy):
  """Value, gradient of x and gradient of the kernel under one jit."""

  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: depthwise_conv2d(x, w, implementation=implementation), x, w)
    return y, *pull(dy)

  return jax.jit(run)(jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(dy, dtype))


SHAPES = [
  ((2, 6, 6, 5), (3, 3, 5)),
  ((2, 5, 7, 3), (4, 2, 3)),  # even sizes: the odd zero is at the end
  ((1, 4, 3, 2), (7, 6, 2)),  # kernel larger than the image, batch 1
  ((3, 1, 1, 4), (5, 5, 4)),
  ((2, 9, 11, 3), (1, 11, 3)),  # rows that make uneven strips; more columns than one sum of the gradient takes
  ((2, 3, 4, 128), (3, 5, 128)),  # channels that are padded
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("x_shape,w_shape", SHAPES)
def test_values_and_gradients_equal_numpy(implementation, x_shape, w_shape):
  x, w, dy = arrays(x_shape, w_shape)
  truth = (numpy_conv(x, w), *numpy_gradients(x, w, dy))
  for ours, expected in zip(value_and_gradients(implementation, jnp.float32, x, w, dy), truth, strict=True):
    assert ours.dtype == jnp.float32
    assert relative_error(ours, expected) < 2e-6


@pytest.mark.parametrize("x_shape", [(2, 18, 20, 1024), (3, 17, 5, 900), (6, 7, 9, 65)])
def test_gradients_of_an_image_in_several_parts(x_shape):
  """Images so large that the kernel's gradient is summed over strips, spans and groups of images."""
  x, w, dy = arrays(x_shape, (3, 2, x_shape[-1]))
  _, dx, dw = value_and_gradients("shifted", jnp.float32, x, w, dy)
  expected_dx, expected_dw = numpy_gradients(x, w, dy)
  assert relative_error(dx, expected_dx) < 2e-6
  assert relative_error(dw, expected_dw) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
  x, w, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays((2, 6, 6, 4), (3, 3, 4)))
  y, dx, dw = value_and_gradients(implementation, jnp.bfloat16, x, w, dy)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  for ours, expected in zip((y, dx, dw), (numpy_conv(x, w), *numpy_gradients(x, w, dy)), strict=True):
    assert relative_error(ours, expected) < 1e-2


def test_bfloat16_sums_are_float32():
  """4096 equal terms: a bfloat16 sum would stop growing at 256."""
  x = jnp.ones((16, 16, 16, 1), jnp.bfloat16)
  _, pull = jax.vjp(lambda w: depthwise_conv2d(x, w, implementation="shifted"), jnp.ones((1, 1, 1), jnp.float32))
  assert pull(x)[0].item() == 4096


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_and_checkpoint(implementation):
  x, w, _ = arrays((3, 2, 4, 4, 2), (3, 3, 2))
  x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
  run = lambda x, w: depthwise_conv2d(x, w, implementation=implementation)
  batched = jax.jit(jax.vmap(run, (0, None)))(x, w)
  assert relative_error(batched, np.stack([numpy_conv(a, np.asarray(w)) for a in np.asarray(x)])) < 2e-6
  loss = lambda run: lambda w: (jax.vmap(run, (0, None))(x, w) ** 2).sum()
  plain, again = (jax.jit(jax.grad(loss(f)))(w) for f in (run, jax.checkpoint(run)))
  assert relative_error(again, np.asarray(plain, np.float64)) < 1e-6


def test_the_reference_is_xlas_convolution():
  assert kernels.depthwise_conv.IMPLEMENTATIONS["reference"] is kernels.depthwise_conv.IMPLEMENTATIONS["xla"]


def test_none_takes_the_platforms_best():
  x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2))
  text = lambda: str(jax.make_jaxpr(lambda x, w: depthwise_conv2d(x, w))(x, w))
  assert "conv_general_dilated" not in text()
  with dispatch.compiling_for("gpu"):
    assert dispatch.platform() == "gpu"
    assert "conv_general_dilated" in text()
    with dispatch.compiling_for("cpu"):
      assert "conv_general_dilated" not in text()
    assert dispatch.platform() == "gpu"
  assert dispatch.platform() == "cpu"


def test_wrong_shapes_and_names_are_refused():
  x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2))
  with pytest.raises(ValueError, match="expected 4 axes"):
    depthwise_conv2d(x[0], w)
  for wrong in (w[..., :1], w[0], w[:0]):
    with pytest.raises(ValueError, match=r"w has shape .* with 2 channels"):
      depthwise_conv2d(x, wrong)
  with pytest.raises(ValueError, match="implementation='cuda' is unknown; there are 'reference', 'xla', 'shifted'"):
    depthwise_conv2d(x, w, implementation="cuda")
