"""Long short-term memory over one or two axes: several independent weight sets (directions) in one call.

Axes: B batch, T time steps, H rows, W columns, C input width, G directions, K hidden units of one direction,
F = 4K gate pre-activations in PyTorch's order: input, forget, cell, output. For every direction, with h_0 = c_0 = 0
(Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the form of `torch.nn.LSTM`):

  a_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh,   i, f, g, o = σ(a_i), σ(a_f), tanh(a_g), σ(a_o)
  c_t = f ⊙ c_{t−1} + i ⊙ g,                     h_t = o ⊙ tanh(c_t)

The input projections of all steps and directions are one product. Carries are float32 whatever the input's dtype.
"mosaic" runs the recurrence of all directions as one kernel on Hopper GPUs, weights in shared memory from the first
step to the last, and its gradient likewise; hidden states that enter a float32 product are rounded to TF32 there. How
many hidden units it takes is bounded by shared memory: 144 in bfloat16, 96 in float32.
"""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.lstm import reference, xla


def _mosaic(z_BHWF, w_hh_GKF, directions, unroll):
  from kernels.lstm import mosaic  # loads Pallas

  return mosaic.recurrence(z_BHWF, w_hh_GKF, directions, unroll)


IMPLEMENTATIONS = {"reference": reference.recurrence, "xla": xla.recurrence, "mosaic": _mosaic}

# A direction: the axis of (B, H, W, ·) that it runs along, and whether from the end to the start.
VERTICAL = ((1, False), (1, True))
HORIZONTAL = ((2, False), (2, True))


def lstm(
  x_BTC: jax.Array,
  w_ih_CGF: jax.Array,
  w_hh_GKF: jax.Array,
  b_ih_GF: jax.Array,
  b_hh_GF: jax.Array,
  *,
  reverse: tuple[bool, ...] = (False, True),
  unroll: int = 1,
  implementation: str | None = None,
) -> jax.Array:
  """One LSTM layer; with `reverse=(False, True)` a bidirectional one.

  Args:
    x_BTC: inputs, float32 or bfloat16.
    w_ih_CGF: input weights of every direction.
    w_hh_GKF: recurrent weights of every direction.
    b_ih_GF: input bias of every direction.
    b_hh_GF: recurrent bias of every direction (kept apart from `b_ih` because published weights have both).
    reverse: for every direction, whether it runs from the last step to the first. Its length is G.
    unroll: time steps in one iteration of the loop.
    implementation: "reference", "xla", "mosaic" or None (the best that can serve).

  Returns:
    (B, T, G·K) in x's dtype: the hidden states, direction after direction.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is unknown or cannot serve.
  """
  _check(x_BTC, 3, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, len(reverse))
  directions = tuple((1, bool(r)) for r in reverse)
  z_BT1F = _project(x_BTC[:, :, None], w_ih_CGF, b_ih_GF, b_hh_GF)
  run = _choose("lstm", implementation, x_BTC, w_hh_GKF)
  return run(z_BT1F, w_hh_GKF.astype(x_BTC.dtype), directions, unroll)[:, :, 0]


def bilstm2d(
  x_BHWC: jax.Array,
  w_ih_CGF: jax.Array,
  w_hh_GKF: jax.Array,
  b_ih_GF: jax.Array,
  b_hh_GF: jax.Array,
  *,
  unroll: int = 1,
  implementation: str | None = None,
) -> jax.Array:
  """Bidirectional LSTMs along columns and rows of an image: BiLSTM2D of Sequencer (Tatsunami & Taki 2022).

  The G = 4 directions are: down, up (along H, for every column), right, left (along W, for every row). Where H = W all
  four run in one loop.

  Args:
    x_BHWC: inputs, float32 or bfloat16.
    w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF: as in `lstm`, G = 4.
    unroll: time steps in one iteration of the loop.
    implementation: "reference", "xla", "mosaic" or None (the best that can serve).

  Returns:
    (B, H, W, 4·K) in x's dtype: vertical states, then horizontal ones.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is unknown or cannot serve.
  """
  _check(x_BHWC, 4, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, 4)
  run = _choose("bilstm2d", implementation, x_BHWC, w_hh_GKF)
  z_BHWF = _project(x_BHWC, w_ih_CGF, b_ih_GF, b_hh_GF)
  w_hh_GKF = w_hh_GKF.astype(x_BHWC.dtype)
  if x_BHWC.shape[1] == x_BHWC.shape[2]:
    return run(z_BHWF, w_hh_GKF, VERTICAL + HORIZONTAL, unroll)
  vertical, horizontal = jnp.split(z_BHWF, 2, axis=-1)
  return jnp.concatenate(
    [run(vertical, w_hh_GKF[:2], VERTICAL, unroll), run(horizontal, w_hh_GKF[2:], HORIZONTAL, unroll)], axis=-1
  )


def _choose(op, implementation, x, w_hh_GKF):
  def refuse():
    from kernels.lstm import mosaic

    return mosaic.refuse(x.dtype, x.shape, w_hh_GKF.shape[1])

  return dispatch.choose(op, IMPLEMENTATIONS, implementation, "xla", refuse)


def _project(x_BHWC, w_ih_CGF, b_ih_GF, b_hh_GF):
  """Pre-activations of all steps and directions without their recurrent part: (B, H, W, G·F) in x's dtype."""
  width = w_ih_CGF.shape[0]
  z = jnp.einsum("bhwc,cf->bhwf", x_BHWC, w_ih_CGF.reshape(width, -1).astype(x_BHWC.dtype))
  return z + (b_ih_GF + b_hh_GF).reshape(1, 1, 1, -1).astype(z.dtype)


def _check(x, ndim, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, directions):
  if x.ndim != ndim:
    raise ValueError(f"lstm: x has shape {x.shape}, expected {ndim} axes")
  hidden = w_hh_GKF.shape[1]
  expected = {
    "w_ih": (w_ih_CGF, (x.shape[-1], directions, 4 * hidden)),
    "w_hh": (w_hh_GKF, (directions, hidden, 4 * hidden)),
    "b_ih": (b_ih_GF, (directions, 4 * hidden)),
    "b_hh": (b_hh_GF, (directions, 4 * hidden)),
  }
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(f"lstm: {name} has shape {array.shape}, expected {shape} for {directions} directions")
