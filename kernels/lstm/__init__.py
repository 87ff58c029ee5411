"""Long short-term memory over one or two axes: several independent weight sets (directions) in one call.

Axes: B batch, T time steps, H rows, W columns, C input width, G directions, K hidden units of one direction,
F = 4K gate pre-activations in PyTorch's order: input, forget, cell, output. For every direction, with h_0 = c_0 = 0
(Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the form of `torch.nn.LSTM`):

  a_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh,   i, f, g, o = σ(a_i), σ(a_f), tanh(a_g), σ(a_o)
  c_t = f ⊙ c_{t−1} + i ⊙ g,                     h_t = o ⊙ tanh(c_t)

The input projections of all steps and directions are one product. Carries are float32 whatever the input's dtype.
"mosaic" runs the recurrence of all directions as one kernel on Hopper GPUs, weights in shared memory from the first
step to the last, and its gradient likewise; hidden states that enter a float32 product are rounded to TF32 there. It
takes up to 256 hidden units. From 145 on in bfloat16, and from 97 on in float32, a part of the weights is copied again
at every step. "cudnn" is cuDNN's LSTM, in float32, for GPUs of other generations and to compare with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.lstm import reference, xla


def _projected(recurrence: Callable) -> Callable:
  """A layer of a recurrence that takes pre-activations: their part that is not recurrent is one product for all."""

  def run(z_BHWF, w_hh_GKF, directions, unroll):
    one = lambda z_BHWF, w_hh_GKF: recurrence(z_BHWF, w_hh_GKF, directions, unroll)
    return dispatch.per_device(one, (True, False))(z_BHWF, w_hh_GKF)

  def layers(x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, launches, unroll):
    z_BHWF = _project(x_BHWC, w_ih_CGF, b_ih_GF, b_hh_GF)
    w_hh_GKF = w_hh_GKF.astype(x_BHWC.dtype)
    if len(launches) == 1:
      return run(z_BHWF, w_hh_GKF, launches[0], unroll)
    parts = zip(jnp.split(z_BHWF, len(launches), -1), jnp.split(w_hh_GKF, len(launches)), launches, strict=True)
    return jnp.concatenate([run(z, w_hh, directions, unroll) for z, w_hh, directions in parts], axis=-1)

  return layers


def _mosaic(z_BHWF, w_hh_GKF, directions, unroll):
  from kernels.lstm import mosaic  # loads Pallas

  return mosaic.recurrence(z_BHWF, w_hh_GKF, directions, unroll)


def _cudnn(*arguments):
  from kernels.lstm import cudnn  # loads jax.experimental.rnn

  return cudnn.layers(*arguments)


IMPLEMENTATIONS = {
  "reference": _projected(reference.recurrence),
  "xla": _projected(xla.recurrence),
  "mosaic": _projected(_mosaic),
  "cudnn": _cudnn,
}

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
    implementation: "reference", "xla", "mosaic", "cudnn" (never under `jax.vmap`) or None: "mosaic" where it can serve
      and is predicted to be faster, else "xla".

  Returns:
    (B, T, G·K) in x's dtype: the hidden states, direction after direction.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is unknown or cannot serve.
  """
  _check(x_BTC, 3, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, len(reverse))
  directions = tuple((1, bool(r)) for r in reverse)
  arguments = x_BTC[:, :, None], w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, (directions,)
  return _choose("lstm", implementation, x_BTC.shape, *arguments)(*arguments, unroll)[:, :, 0]


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
    implementation: "reference", "xla", "mosaic", "cudnn" (never under `jax.vmap`) or None: "mosaic" where it can serve
      and is predicted to be faster, else "xla".

  Returns:
    (B, H, W, 4·K) in x's dtype: vertical states, then horizontal ones.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is unknown or cannot serve.
  """
  _check(x_BHWC, 4, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, 4)
  square = x_BHWC.shape[1] == x_BHWC.shape[2]
  launches = (VERTICAL + HORIZONTAL,) if square and implementation != "cudnn" else (VERTICAL, HORIZONTAL)
  arguments = x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, launches
  return _choose("bilstm2d", implementation, x_BHWC.shape, *arguments)(*arguments, unroll)


def _choose(op, implementation, shape, x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, launches):
  """The implementation for these arguments; `shape` is that of the input as the caller knows it."""
  dtype, hidden = x_BHWC.dtype, w_hh_GKF.shape[1]

  def refuse():
    from kernels.lstm import mosaic

    refusal = mosaic.refuse(dtype, shape, hidden)
    if refusal or implementation:
      return refusal
    return next(filter(None, (mosaic.outrun(dtype, x_BHWC.shape, hidden, each) for each in launches)), None)

  def refuse_cudnn():
    from kernels.lstm import cudnn

    return cudnn.refuse(dtype, shape, launches)

  return dispatch.choose(op, IMPLEMENTATIONS, implementation, "xla", refuse, {"cudnn": refuse_cudnn})


def _project(x_BHWC, w_ih_CGF, b_ih_GF, b_hh_GF):
  """Pre-activations of all steps and directions without their recurrent part: (B, H, W, G·F) in x's dtype."""
  # Directions and gates become one axis afterwards: merged before, weights that are split along F would be gathered
  # merged, and their gradients summed up whole.
  z_BHWGF = jnp.einsum("bhwc,cgf->bhwgf", x_BHWC, w_ih_CGF.astype(x_BHWC.dtype))
  z_BHWGF += (b_ih_GF + b_hh_GF).astype(z_BHWGF.dtype)[None, None, None]
  return jax.lax.collapse(z_BHWGF, 3)


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
