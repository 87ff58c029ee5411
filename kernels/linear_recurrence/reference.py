"""The plainest form of the recurrence, in complex numbers, differentiated by JAX: the oracle of the tests."""

import jax
import jax.numpy as jnp
from jax import lax


def recurrence(
  x_re_BTN: jax.Array, x_im_BTN: jax.Array, a_re: jax.Array, a_im: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """States of all steps; arguments and result as in `xla.sequential`."""
  x_TBN = jnp.moveaxis(lax.complex(x_re_BTN.astype(jnp.float32), x_im_BTN.astype(jnp.float32)), 1, 0)
  a_TBN = jnp.moveaxis(jnp.broadcast_to(lax.complex(a_re, a_im), x_re_BTN.shape), 1, 0)

  def step(h_BN, inputs):
    x_BN, a_BN = inputs
    h_BN = a_BN * h_BN + x_BN
    return h_BN, h_BN

  _, h_TBN = lax.scan(step, jnp.zeros(x_TBN.shape[1:], x_TBN.dtype), (x_TBN, a_TBN), reverse=reverse)
  h_BTN = jnp.moveaxis(h_TBN, 0, 1)
  return h_BTN.real.astype(x_re_BTN.dtype), h_BTN.imag.astype(x_re_BTN.dtype)
