"""The plainest form: the complex transform, differentiated by JAX. The oracle of the tests."""

import jax
import jax.numpy as jnp


def mixing(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D) in x's dtype, computed in float32."""
  return jnp.fft.fft2(x_BLD.astype(jnp.float32)).real.astype(x_BLD.dtype)
