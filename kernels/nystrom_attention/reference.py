"""The plainest form of the operation: the oracle of the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import depthwise_conv

MASKED = -1e9  # score of a padded key


def nystrom_attention(q_BLNK, k_BLNK, v_BLNK, w_skip_RN, *, landmarks, pinv_iterations, pinv_init, mask_BL):
  """Arguments and result as of `kernels.nystrom_attention.nystrom_attention`."""
  length, width = q_BLNK.shape[1], q_BLNK.shape[-1]
  q, k, v = q_BLNK * jnp.asarray(width**-0.25, q_BLNK.dtype), k_BLNK * jnp.asarray(width**-0.25, k_BLNK.dtype), v_BLNK
  bias = jnp.zeros((1, 1, 1, 1), jnp.float32)
  if mask_BL is not None:
    keep = mask_BL.reshape(*mask_BL.shape, 1, 1)
    q, k, v = (x * keep.astype(x.dtype) for x in (q, k, v))
    bias = MASKED * (1 - mask_BL.astype(jnp.float32)[:, None, None])
  if landmarks == length:
    out = _apply(_softmax(_scores(q, k) + bias), v)
  else:
    q_landmarks, k_landmarks = segment_means(q, landmarks), segment_means(k, landmarks)
    inverse = pseudo_inverse(_softmax(_scores(q_landmarks, k_landmarks)), pinv_iterations, pinv_init)
    values = _apply(_softmax(_scores(q_landmarks, k) + bias), v)  # (B, M, N, K)
    values = _apply(inverse, values.astype(jnp.float32))
    out = _apply(_softmax(_scores(q, k_landmarks)), values.astype(v.dtype))
  if w_skip_RN is not None:
    out = out + skip_convolution(v, w_skip_RN)
  return out.astype(v_BLNK.dtype)


# The products' operands are converted, as XLA on CPU has no bfloat16 product with a float32 result for some layouts.


def _scores(q, k):
  return jnp.einsum("blnk,bmnk->bnlm", q.astype(jnp.float32), k.astype(jnp.float32))


def _softmax(scores):
  return jax.nn.softmax(scores, axis=-1)


def _apply(weights_BNLM, v_BMNK):
  weights = weights_BNLM.astype(v_BMNK.dtype)
  return jnp.einsum("bnlm,bmnk->blnk", weights.astype(jnp.float32), v_BMNK.astype(jnp.float32))


def segment_means(x_BLNK: jax.Array, landmarks: int) -> jax.Array:
  """Means of `landmarks` segments of the tokens, in order; the first L mod M segments are one token longer."""
  batch, length, heads, width = x_BLNK.shape
  size, longer = divmod(length, landmarks)
  x = x_BLNK.astype(jnp.float32)
  if not longer:
    means = x.reshape(batch, landmarks, size, heads, width).mean(2)
  else:
    edges = np.cumsum([0] + [size + 1] * longer + [size] * (landmarks - longer))
    first, last = edges[:-1].reshape(-1, 1), edges[1:].reshape(-1, 1)
    inside = (np.arange(length) >= first) & (np.arange(length) < last)
    means = jnp.einsum("ml,blnk->bmnk", jnp.asarray(inside / (last - first), jnp.float32), x)
  return means.astype(x_BLNK.dtype)


def first_inverse(a_BNMM: jax.Array, init: str) -> jax.Array:
  """Aᵀ / (largest column sum of A), of every matrix or, with "global", of all of them."""
  sums = a_BNMM.sum(-2)
  largest = sums.max() if init == "global" else sums.max(-1)[..., None, None]
  return a_BNMM.swapaxes(-1, -2) / largest


def pseudo_inverse(a_BNMM: jax.Array, iterations: int, init: str) -> jax.Array:
  """Z ← ¼ Z (13 I − AZ (15 I − AZ (7 I − AZ))) from Z = Aᵀ / (largest column sum of A); rows of A sum to 1."""
  z = first_inverse(a_BNMM, init)
  eye = jnp.eye(a_BNMM.shape[-1], dtype=a_BNMM.dtype).reshape(1, 1, *a_BNMM.shape[-2:])
  for _ in range(iterations):
    az = a_BNMM @ z
    z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
  return z


def skip_convolution(v_BLNK: jax.Array, w_RN: jax.Array) -> jax.Array:
  """Every head's values convolved along the tokens with its filter; zeros beyond the ends."""
  batch, length, heads, width = v_BLNK.shape
  # (R, 1, N·K); repeated in float32, so that their gradient is summed over a head's channels in float32.
  filters = jnp.repeat(w_RN.astype(jnp.float32), width, axis=1)[:, None].astype(v_BLNK.dtype)
  return depthwise_conv.depthwise_conv2d(v_BLNK.reshape(batch, length, 1, heads * width), filters).reshape(v_BLNK.shape)
