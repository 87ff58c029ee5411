"""The plainest form of the recurrence, one direction and one step after the other: the oracle of the tests."""

import jax
import jax.numpy as jnp


def recurrence(z_BHWF: jax.Array, w_hh_GKF: jax.Array, directions: tuple[tuple[int, bool], ...], unroll: int = 1):
  """Hidden states of every direction; arguments and result as in `xla.recurrence` (`unroll` has no effect)."""
  del unroll
  outputs = []
  for z, w_KF, (axis, reverse) in zip(jnp.split(z_BHWF, len(directions), axis=-1), w_hh_GKF, directions, strict=True):
    z_TNF = jnp.moveaxis(z, axis, 0)
    h = c = jnp.zeros((*z_TNF.shape[1:3], w_KF.shape[0]), jnp.float32)
    states = [None] * len(z_TNF)
    for t in reversed(range(len(z_TNF))) if reverse else range(len(z_TNF)):
      a = z_TNF[t].astype(jnp.float32) + jnp.matmul(h.astype(w_KF.dtype), w_KF, preferred_element_type=jnp.float32)
      i, f, g, o = jnp.split(a, 4, axis=-1)
      c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
      h = jax.nn.sigmoid(o) * jnp.tanh(c)
      states[t] = h
    outputs.append(jnp.stack(states, axis))
  return jnp.concatenate(outputs, axis=-1).astype(z_BHWF.dtype)
