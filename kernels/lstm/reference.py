"""The plainest form of the recurrence, one direction after another, differentiated by JAX: the oracle of the tests."""

import jax
import jax.numpy as jnp
from jax import lax


def recurrence(z_BHWF: jax.Array, w_hh_GKF: jax.Array, directions: tuple[tuple[int, bool], ...], unroll: int = 1):
  """Hidden states of every direction; arguments and result as in `xla.recurrence` (`unroll` has no effect)."""
  del unroll
  outputs = []
  for z, w_KF, (axis, reverse) in zip(jnp.split(z_BHWF, len(directions), axis=-1), w_hh_GKF, directions, strict=True):
    z_TNF = jnp.moveaxis(z, axis, 0)

    def step(carry, z, w_KF=w_KF):
      h, c = carry
      a = z.astype(jnp.float32) + jnp.matmul(h.astype(w_KF.dtype), w_KF, preferred_element_type=jnp.float32)
      i, f, g, o = jnp.split(a, 4, axis=-1)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      return (h, c), h

    zero = jnp.zeros((*z_TNF.shape[1:3], w_KF.shape[0]), jnp.float32)
    _, h_TNK = lax.scan(step, (zero, zero), z_TNF, reverse=reverse)
    outputs.append(jnp.moveaxis(h_TNK, 0, axis))
  return jnp.concatenate(outputs, axis=-1).astype(z_BHWF.dtype)
