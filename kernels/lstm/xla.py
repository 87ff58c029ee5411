"""The recurrence as one `lax.scan` for all directions, with a backward pass written by hand.

Nothing is transposed: every step reads its slice of (B, H, W, ·) where it lies and writes its result where it belongs,
so the hidden states need no second copy for the backward pass. The barriers matter on CPU only: XLA runs an elementwise
loop that writes straight into a larger array on one core, so the arithmetic is kept apart from that copy.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def recurrence(
  z_BHWF: jax.Array, w_hh_GKF: jax.Array, directions: tuple[tuple[int, bool], ...], unroll: int = 1
) -> jax.Array:
  """Hidden states of every direction.

  Args:
    z_BHWF: gate pre-activations without their recurrent part, direction after direction: F here is G·4K.
    w_hh_GKF: recurrent weights in z's dtype.
    directions: for each, the axis of z (1 or 2) it runs along and whether in reverse. All run over the same number
      of steps.
    unroll: time steps in one iteration of the loop.

  Returns:
    (B, H, W, G·K) in z's dtype.
  """
  return _forward(z_BHWF, w_hh_GKF, directions, unroll)[0]


def _forward(z_BHWF, w_hh_GKF, directions, unroll):
  directions_count, hidden, _ = w_hh_GKF.shape
  steps, sequences = _sizes(z_BHWF, directions)

  def step(carry, t):
    h_GNK, c_GNK, y_BHWK = carry
    a = _read(z_BHWF, t, steps, directions).astype(jnp.float32) + _dot("gnk,gkf->gnf", h_GNK, w_hh_GKF)
    i, f, g, o = jnp.split(a, 4, axis=-1)
    i, f, g, o = _sigmoid(i), _sigmoid(f), jnp.tanh(g), _sigmoid(o)
    c_GNK = f * c_GNK + i * g
    h_GNK = o * jnp.tanh(c_GNK)
    h_GNK, c_GNK, gates = lax.optimization_barrier((h_GNK, c_GNK, jnp.concatenate([i, f, g, o], -1)))
    return (h_GNK, c_GNK, _write(y_BHWK, h_GNK, t, steps, directions)), (c_GNK, gates.astype(z_BHWF.dtype))

  zero = jnp.zeros((directions_count, sequences, hidden), jnp.float32)
  y_BHWK = jnp.zeros((*z_BHWF.shape[:3], directions_count * hidden), z_BHWF.dtype)
  (_, _, y_BHWK), (c_TGNK, gates_TGNF) = lax.scan(step, (zero, zero, y_BHWK), jnp.arange(steps), unroll=unroll)
  return y_BHWK, (y_BHWK, c_TGNK, gates_TGNF, w_hh_GKF)


def _backward(directions, unroll, residuals, dy_BHWK):
  y_BHWK, c_TGNK, gates_TGNF, w_hh_GKF = residuals
  steps, directions_count, sequences, hidden = c_TGNK.shape
  w_GFK = jnp.swapaxes(w_hh_GKF, 1, 2)

  def step(carry, inputs):
    dh, dc, dw_GKF, dz_BHWF = carry
    t, gates, c = inputs
    before = jnp.maximum(t - 1, 0)
    c_before = jnp.where(t == 0, 0.0, lax.dynamic_index_in_dim(c_TGNK, before, 0, keepdims=False))
    h_before = jnp.where(t == 0, 0.0, _read(y_BHWK, before, steps, directions))
    i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
    tanh_c = jnp.tanh(c)
    dh = dh + _read(dy_BHWK, t, steps, directions).astype(jnp.float32)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dz = jnp.concatenate(
      [dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)], -1
    )
    dz, dc = lax.optimization_barrier((dz.astype(dy_BHWK.dtype), dc * f))
    dw_GKF = dw_GKF + _dot("gnk,gnf->gkf", h_before, dz)
    return (_dot("gnf,gfk->gnk", dz, w_GFK), dc, dw_GKF, _write(dz_BHWF, dz, t, steps, directions)), None

  zero = jnp.zeros((directions_count, sequences, hidden), jnp.float32)
  dz_BHWF = jnp.zeros((*dy_BHWK.shape[:3], directions_count * 4 * hidden), dy_BHWK.dtype)
  initial = (zero, zero, jnp.zeros(w_hh_GKF.shape, jnp.float32), dz_BHWF)
  (_, _, dw_GKF, dz_BHWF), _ = lax.scan(
    step, initial, (jnp.arange(steps), gates_TGNF, c_TGNK), reverse=True, unroll=unroll
  )
  return dz_BHWF, dw_GKF.astype(w_hh_GKF.dtype)


recurrence.defvjp(_forward, _backward)


def _sizes(z_BHWF, directions):
  """Steps of a sequence, and number of sequences that one direction has."""
  batch, *lengths, _ = z_BHWF.shape
  steps = {lengths[axis - 1] for axis, _ in directions}
  if len(steps) != 1:
    raise ValueError(f"lstm: directions {directions} of an input of shape {z_BHWF.shape} differ in length")
  (steps,) = steps
  return steps, batch * lengths[0] * lengths[1] // steps


def _sigmoid(x):
  return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _dot(equation, x, y):
  """A product with operands in y's dtype and a float32 sum."""
  return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _read(x_BHWF, t, steps, directions):
  """Step t of every direction, counted from where the direction starts: (G, N, F) of an array of G·F channels."""
  width = x_BHWF.shape[-1] // len(directions)
  parts = []
  for index, (axis, reverse) in enumerate(directions):
    part = lax.slice_in_dim(x_BHWF, index * width, (index + 1) * width, axis=3)
    part = lax.dynamic_slice_in_dim(part, steps - 1 - t if reverse else t, 1, axis)
    parts.append(part.reshape(-1, width))
  return jnp.stack(parts)


def _write(x_BHWF, values_GNF, t, steps, directions):
  """The inverse of `_read`: x with step t of every direction replaced."""
  width = values_GNF.shape[-1]
  for index, (axis, reverse) in enumerate(directions):
    shape = [*x_BHWF.shape[:3], width]
    shape[axis] = 1
    start = [0, 0, 0, index * width]
    start[axis] = steps - 1 - t if reverse else t
    x_BHWF = lax.dynamic_update_slice(x_BHWF, values_GNF[index].reshape(shape).astype(x_BHWF.dtype), start)
  return x_BHWF
