"""cuDNN's LSTM by `jax.experimental.rnn`, input projections included: for any NVIDIA GPU, and to compare with.

It takes float32 alone, so bfloat16 inputs are converted, which doubles the bytes; products are in TF32 unless
`jax.default_matmul_precision` asks for "float32" or "highest". It has no rule for `jax.vmap`. It asks cuDNN for sizes
while it is traced, so it cannot be compiled where that is absent.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import rnn

from kernels import dispatch

# For every direction, whether it is reversed: what cuDNN calls unidirectional and bidirectional.
_SERVED = (False,), (False, True)


def refuse(dtype, shape: tuple[int, ...], launches: tuple[tuple[tuple[int, bool], ...], ...]) -> str | None:
  """Why `layers` cannot serve here, in words; None if it can."""
  if dispatch.platform() not in ("gpu", "cuda"):
    return f"it needs an NVIDIA GPU, and this is {dispatch.platform()}"
  if jax.default_backend() != "gpu" or not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
    return "it asks cuDNN for sizes while it is traced, and cuDNN is not here"
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"it takes float32 or bfloat16, and the input is {dtype}"
  if 0 in shape:
    return f"an input of shape {tuple(shape)} is empty"
  for directions in launches:
    reverse = tuple(reverse for _, reverse in directions)
    if reverse not in _SERVED:
      return f"it takes reverse={' or '.join(map(str, _SERVED))}, not {reverse}"
  return None


def layers(x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, launches, unroll: int = 1) -> jax.Array:
  """Hidden states of every direction, one call of cuDNN for each of `launches`.

  Args:
    x_BHWC: inputs, float32 or bfloat16.
    w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF: as in `lstm`, float32; all directions of all launches, one after another.
    launches: for each, its directions: the axis of x (1 or 2) that they run along, and whether in reverse.
    unroll: has no effect.

  Returns:
    (B, H, W, G·K) in x's dtype.

  Raises:
    UnsupportedError: cuDNN fails, or the call is under `jax.vmap`.
  """
  del unroll

  def run(x_BHWC, *parameters):
    outputs, first = [], 0
    for directions in launches:
      last = first + len(directions)
      w_ih, w_hh, b_ih, b_hh = parameters
      own = w_ih[:, first:last], w_hh[first:last], b_ih[first:last], b_hh[first:last]
      outputs.append(_layer(x_BHWC, *own, axis=directions[0][0]))
      first = last
    return jnp.concatenate(outputs, -1)

  return dispatch.per_device(run, (True, *[False] * 4))(x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF)


def pack(w_ih_CGF: jax.Array, w_hh_GKF: jax.Array, b_ih_GF: jax.Array, b_hh_GF: jax.Array) -> jax.Array:
  """Weights as cuDNN wants them, one vector of float32: the matrices of all directions, then their biases.

  Of every direction W_ih (F, C) before W_hh (F, K), and b_ih before b_hh; gates in our order.
  """
  matrices = [m.T for g in range(len(w_hh_GKF)) for m in (w_ih_CGF[:, g], w_hh_GKF[g])]
  biases = [b[g] for g in range(len(w_hh_GKF)) for b in (b_ih_GF, b_hh_GF)]
  return jnp.concatenate([part.astype(jnp.float32).ravel() for part in matrices + biases])


def _layer(x_BHWC, w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF, axis):
  """One layer of one or two directions along `axis`."""
  x = jnp.moveaxis(x_BHWC, axis, 2)  # sequences are adjacent in memory
  count, hidden, _ = w_hh_GKF.shape
  sequences_NTC = x.reshape(-1, *x.shape[2:]).astype(jnp.float32)
  batch, steps, channels = sequences_NTC.shape
  zero = jnp.zeros((count, batch, hidden), jnp.float32)
  exact = jax.config.jax_default_matmul_precision in ("float32", "highest")
  try:
    y_NTK, _, _ = rnn.lstm(
      sequences_NTC,
      zero,
      zero,
      pack(w_ih_CGF, w_hh_GKF, b_ih_GF, b_hh_GF),
      jnp.full(batch, steps, jnp.int32),
      channels,
      hidden,
      1,  # layer
      0.0,  # dropout
      count == 2,
      lax.Precision.HIGHEST if exact else lax.Precision.HIGH,  # the latter is TF32
    )
  except RuntimeError as error:  # JAX's error of cuDNN, or that there is no rule for vmap
    raise dispatch.UnsupportedError(f"lstm: implementation='cudnn' cannot serve: {error}") from error
  return jnp.moveaxis(y_NTK.reshape(*x.shape[:3], -1), 2, axis).astype(x_BHWC.dtype)
