"""The plainest form of the recurrence, differentiated by JAX: the oracle of the tests."""

import jax
import jax.numpy as jnp

from kernels.lipschitz_rnn import rule


def recurrence(
  z_BTD: jax.Array, gate_BTD: jax.Array | None, a_DD: jax.Array, w_DD: jax.Array, settings: rule.Settings
) -> jax.Array:
  """Arguments and result as of `xla.recurrence` (`settings.unroll` has no effect)."""
  dtype, epsilon = z_BTD.dtype, settings.epsilon

  def dot(h, matrix):
    return jnp.matmul(h.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)

  def step(h, t):
    z = z_BTD[:, t].astype(jnp.float32)

    def f(h):
      velocity = dot(h, a_DD) + jnp.tanh(dot(h, w_DD) + z)
      if gate_BTD is None:
        return velocity
      return velocity * jax.nn.sigmoid(dot(h, w_DD) + gate_BTD[:, t].astype(jnp.float32))

    k1 = f(h)
    if settings.method == "euler":
      h = h + epsilon * k1
    elif settings.method == "midpoint":
      h = h + epsilon * f(h + epsilon / 2 * k1)
    else:
      k2 = f(h + epsilon / 3 * k1)
      k3 = f(h + epsilon * (k2 - k1 / 3))
      k4 = f(h + epsilon * (k1 - k2 + k3))
      h = h + epsilon / 8 * (k1 + 3 * (k2 + k3) + k4)
    return h, h

  batch, steps, width = z_BTD.shape
  last, states_TBD = jax.lax.scan(step, jnp.zeros((batch, width), jnp.float32), jnp.arange(steps))
  return last if settings.last else states_TBD.swapaxes(0, 1).astype(dtype)
