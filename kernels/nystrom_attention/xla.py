"""The fastest form without a kernel: heads first, segments as reshapes, one scaling of the few landmarks.

Nothing of size L·M is kept for the gradient: both softmaxes between tokens and landmarks are computed anew there,
which on CPU takes no longer than to keep them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.nystrom_attention import reference


def nystrom_attention(q_BLNK, k_BLNK, v_BLNK, w_skip_RN, *, landmarks, pinv_iterations, pinv_init, mask_BL):
  """Arguments and result as of `kernels.nystrom_attention.nystrom_attention`."""
  q_BLNK, k_BLNK, v_BLNK = (masked(x_BLNK, mask_BL) for x_BLNK in (q_BLNK, k_BLNK, v_BLNK))
  bias = jnp.zeros((), jnp.float32)
  if mask_BL is not None:
    bias = reference.MASKED * (1 - mask_BL.astype(jnp.float32)[:, None, None])
  k_BNLK, v_BNLK = k_BLNK.swapaxes(1, 2), v_BLNK.swapaxes(1, 2)
  # Where there is a landmark for every token, its mean is the token itself.
  q_BMNK = scaled_landmarks(q_BLNK, landmarks)
  values_BNMK = _attend(q_BMNK.swapaxes(1, 2), k_BNLK, v_BNLK, bias)
  if landmarks == q_BLNK.shape[1]:
    out_BLNK = values_BNMK.swapaxes(1, 2)
  else:
    k_BMNK = scaled_landmarks(k_BLNK, landmarks)
    inverse = functools.partial(reference.pseudo_inverse, iterations=pinv_iterations, init=pinv_init)
    values_BNMK = through_inverse(q_BMNK, k_BMNK, values_BNMK, inverse).astype(v_BLNK.dtype)
    out_BNLK = _attend(q_BLNK.swapaxes(1, 2), k_BMNK.swapaxes(1, 2), values_BNMK, jnp.zeros((), jnp.float32))
    out_BLNK = out_BNLK.swapaxes(1, 2)
  if w_skip_RN is not None:
    out_BLNK = out_BLNK + reference.skip_convolution(v_BLNK, w_skip_RN)
  return out_BLNK.astype(v_BLNK.dtype)


@jax.checkpoint
def _attend(q_BNLK, k_BNMK, v_BNMK, bias):
  """softmax(q kᵀ + bias) v, float32."""
  scores = jnp.einsum("bnlk,bnmk->bnlm", q_BNLK, k_BNMK, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(scores + bias).astype(v_BNMK.dtype)
  return jnp.einsum("bnlm,bnmk->bnlk", weights, v_BNMK, preferred_element_type=jnp.float32)


def masked(x_BLNK: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
  """x with zeros where the mask is 0."""
  return x_BLNK if mask_BL is None else x_BLNK * mask_BL[..., None, None].astype(x_BLNK.dtype)


def scaled_landmarks(x_BLNK: jax.Array, landmarks: int) -> jax.Array:
  """Means of segments as of `reference.segment_means`, times K^(−1/2): (B, M, N, K) in the dtype of x."""
  batch, length, heads, width = x_BLNK.shape
  size, longer = divmod(length, landmarks)
  split = longer * (size + 1)
  parts = (x_BLNK[:, :split], longer, size + 1), (x_BLNK[:, split:], landmarks - longer, size)
  means = [
    part.reshape(batch, count, tokens, heads, width).mean(2, dtype=jnp.float32)
    for part, count, tokens in parts
    if count
  ]
  return (jnp.concatenate(means, 1) * width**-0.5).astype(x_BLNK.dtype)


def through_inverse(
  q_BMNK: jax.Array, k_BMNK: jax.Array, values_BNMK: jax.Array, inverse: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """(softmax(Q̃ K̃ᵀ))⁺ values, from landmarks as of `scaled_landmarks`: (B, N, M, K), float32.

  `inverse` makes the pseudo-inverse of that softmax, (B, N, M, M), float32.
  """
  # A GPU would else round the operands of float32 products to 11 bits, and the inverse enlarges such errors.
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("blnk,bmnk->bnlm", q_BMNK, k_BMNK, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q_BMNK.shape[-1] ** 0.5)
    return inverse(weights) @ values_BNMK
