"""kernels.lstm against NumPy in float64, written from the equations, and its finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.lstm


def parameters(rng, channels, hidden, directions):
  shapes = [(channels, directions, 4 * hidden), (directions, hidden, 4 * hidden), *[(directions, 4 * hidden)] * 2]
  return [rng.uniform(-(hidden**-0.5), hidden**-0.5, shape) for shape in shapes]


def numpy_lstm(x_BTC, w_ih, w_hh, b_ih, b_hh, reverse):
  """The equations, one direction and one step at a time, in float64."""
  outputs = []
  for g, backward in enumerate(reverse):
    hidden = w_hh.shape[1]
    h = c = np.zeros((len(x_BTC), hidden))
    y = np.zeros((*x_BTC.shape[:2], hidden))
    times = range(x_BTC.shape[1])
    for t in reversed(times) if backward else times:
      a = x_BTC[:, t] @ w_ih[:, g] + b_ih[g] + h @ w_hh[g] + b_hh[g]
      i, f, o = (1 / (1 + np.exp(-a[:, k * hidden : (k + 1) * hidden])) for k in (0, 1, 3))
      c = f * c + i * np.tanh(a[:, 2 * hidden : 3 * hidden])
      h = o * np.tanh(c)
      y[:, t] = h
    outputs.append(y)
  return np.concatenate(outputs, -1)


def numpy_bilstm2d(x_BHWC, w_ih, w_hh, b_ih, b_hh):
  batch, rows, columns, channels = x_BHWC.shape
  columns_first = x_BHWC.transpose(0, 2, 1, 3).reshape(-1, rows, channels)
  down_up = numpy_lstm(columns_first, w_ih[:, :2], w_hh[:2], b_ih[:2], b_hh[:2], (False, True))
  down_up = down_up.reshape(batch, columns, rows, -1).transpose(0, 2, 1, 3)
  right_left = numpy_lstm(
    x_BHWC.reshape(-1, columns, channels), w_ih[:, 2:], w_hh[2:], b_ih[2:], b_hh[2:], (False, True)
  )
  return np.concatenate([down_up, right_left.reshape(batch, rows, columns, -1)], -1)


def relative_error(x, truth):
  return np.abs(np.asarray(x, np.float64) - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("batch,steps,channels,hidden", [(3, 7, 5, 4), (1, 1, 2, 3), (2, 33, 3, 8)])
def test_lstm_equals_numpy(implementation, reverse, batch, steps, channels, hidden):
  rng = np.random.RandomState(0)
  x = rng.randn(batch, steps, channels)
  arguments = parameters(rng, channels, hidden, len(reverse))
  truth = numpy_lstm(x, *arguments, reverse)
  y = kernels.lstm.lstm(*_float32(x, *arguments), reverse=reverse, implementation=implementation)
  assert y.dtype == jnp.float32
  assert relative_error(y, truth) < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 5), (1, 6)])
def test_bilstm2d_equals_numpy(implementation, rows, columns):
  rng = np.random.RandomState(1)
  x = rng.randn(2, rows, columns, 6)
  arguments = parameters(rng, 6, 5, 4)
  y = kernels.lstm.bilstm2d(*_float32(x, *arguments), implementation=implementation)
  assert relative_error(y, numpy_bilstm2d(x, *arguments)) < 2e-6


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 5)])
def test_gradient_equals_finite_differences(unroll, rows, columns):
  """The directional derivative along random directions, by central differences of the float64 NumPy forward."""
  rng = np.random.RandomState(2)
  x = rng.randn(2, rows, columns, 3)
  arguments = [x, *parameters(rng, 3, 4, 4)]
  weight = rng.randn(2, rows, columns, 16)

  def loss(*arrays):
    return (kernels.lstm.bilstm2d(*arrays, unroll=unroll) * weight.astype(np.float32)).sum()

  gradients = jax.grad(loss, argnums=tuple(range(5)))(*_float32(*arguments))
  for index, gradient in enumerate(gradients):
    direction = rng.randn(*arguments[index].shape)
    shifted = [[a + sign * 1e-6 * direction if k == index else a for k, a in enumerate(arguments)] for sign in (1, -1)]
    above, below = ((numpy_bilstm2d(*arrays) * weight).sum() for arrays in shifted)
    truth = (above - below) / 2e-6
    assert abs((np.asarray(gradient, np.float64) * direction).sum() - truth) < 2e-5 * np.abs(truth) + 1e-4


@pytest.mark.parametrize("rows,columns", [(5, 5), (2, 7)])
def test_xla_equals_reference_with_gradients(rows, columns):
  rng = np.random.RandomState(3)
  arrays = _float32(rng.randn(2, rows, columns, 6), *parameters(rng, 6, 8, 4))

  def loss(implementation, *arrays):
    return (kernels.lstm.bilstm2d(*arrays, implementation=implementation) ** 2).sum()

  every = tuple(range(1, 6))
  ours = jax.jit(jax.grad(loss, argnums=every), static_argnums=0)("xla", *arrays)
  truth = jax.grad(loss, argnums=every)("reference", *arrays)
  for a, b in zip(ours, truth, strict=True):
    assert relative_error(a, np.asarray(b, np.float64)) < 5e-6


def test_bfloat16_keeps_float32_carries():
  """200 steps of slow forgetting: a bfloat16 cell state would lose the small additions."""
  rng = np.random.RandomState(4)
  x = rng.randn(2, 200, 4)
  arguments = parameters(rng, 4, 8, 1)
  arguments[2][:, 8:16] += 5.0  # forget gates near 1
  truth = numpy_lstm(x, *arguments, (False,))
  y = kernels.lstm.lstm(jnp.asarray(x, jnp.bfloat16), *_float32(*arguments), reverse=(False,))
  assert y.dtype == jnp.bfloat16
  assert np.linalg.norm(np.asarray(y, np.float64) - truth) < 2e-2 * np.linalg.norm(truth)


def test_wrong_shapes_and_names_are_refused():
  rng = np.random.RandomState(5)
  x, w_ih, w_hh, b_ih, b_hh = _float32(rng.randn(2, 3, 4), *parameters(rng, 4, 5, 2))
  with pytest.raises(ValueError, match="w_ih has shape"):
    kernels.lstm.lstm(x, w_ih[:-1], w_hh, b_ih, b_hh)
  with pytest.raises(ValueError, match="expected 4 axes"):
    kernels.lstm.bilstm2d(x, w_ih, w_hh, b_ih, b_hh)
  with pytest.raises(ValueError, match="implementation='cuda' is unknown; there are 'reference', 'xla'"):
    kernels.lstm.lstm(x, w_ih, w_hh, b_ih, b_hh, implementation="cuda")


def _float32(*arrays):
  return [jnp.asarray(a, jnp.float32) for a in arrays]
