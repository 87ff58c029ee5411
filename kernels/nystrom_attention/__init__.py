"""Nyström approximation of softmax self-attention (Xiong et al. 2021, arXiv 2102.03902).

Axes: B batch, L tokens, N heads, K head width, M landmarks, R taps of the skip convolution. With queries and keys
scaled by K^(−1/4) each, landmarks Q̃, K̃ the means of M segments of the tokens, and Z ≈ (softmax Q̃K̃ᵀ)⁺ by six steps
of an iteration that starts from a multiple of the transpose (equations 11, 13 and 14 of the paper):

  out = softmax(Q K̃ᵀ) Z (softmax(Q̃ Kᵀ) V) + conv(V)

Cost and memory grow with L·M. The official code (mlpen/Nystromformer) takes the multiple from the largest value in the
whole batch, so that an example's output depends on the others; that is `pinv_init="global"`, not the default.

On a Hopper GPU two kernels stream tokens past the landmarks and keep both L×M softmaxes on the chip, in the forward
pass and, computed anew, in the backward pass; a third kernel computes the pseudo-inverse of up to 64 landmarks. Means,
skip convolution and the inverse of more landmarks are XLA's.
"""

import jax

from kernels import dispatch
from kernels.nystrom_attention import reference, xla


def _mosaic(*arrays, **options):
  from kernels.nystrom_attention import mosaic

  return mosaic.nystrom_attention(*arrays, **options)


IMPLEMENTATIONS = {"reference": reference.nystrom_attention, "xla": xla.nystrom_attention, "mosaic": _mosaic}
PINV_INITS = ("per_matrix", "global")


def nystrom_attention(
  q_BLNK: jax.Array,
  k_BLNK: jax.Array,
  v_BLNK: jax.Array,
  w_skip_RN: jax.Array | None = None,
  *,
  landmarks: int,
  pinv_iterations: int = 6,
  pinv_init: str = "per_matrix",
  mask_BL: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attention of all tokens to all tokens through M landmarks; exact softmax attention where M = L.

  Args:
    q_BLNK, k_BLNK, v_BLNK: queries, keys and values, float32 or bfloat16.
    w_skip_RN: filter of the skip convolution along the tokens, one a head for all its channels, R odd; None for none.
    landmarks: M. Where M does not divide L, the first L mod M segments are one token longer than the others.
    pinv_iterations: steps towards the pseudo-inverse; the paper takes 6, where it has not yet converged.
    pinv_init: the multiple that the iteration starts from: "per_matrix", 1 / (largest column sum) of every matrix, or
      "global", the same of the whole batch, as published results have it.
    mask_BL: 1 for tokens, 0 for padding: padding is no key, and counts as zeros in the means of the segments.
    implementation: "reference"; "xla", the same without anything of size L·M kept for the gradient; "mosaic", kernels
      for Hopper GPUs with at most 128 landmarks and heads of width 128 at most, where products of float32 inputs are
      three bfloat16 products of their high and low halves (relative error about 1e-5); or None, "mosaic" where it can
      serve, else "xla".

  Returns:
    (B, L, N, K) in the dtype of v. Products of bfloat16 inputs are bfloat16 with float32 sums; softmax and
    pseudo-inverse are float32.

  Raises:
    ValueError: shapes that do not fit, more landmarks than tokens, an even filter, an unknown option, or an
      implementation that cannot serve.
  """
  if not q_BLNK.shape == k_BLNK.shape == v_BLNK.shape or q_BLNK.ndim != 4:
    raise ValueError(
      f"nystrom_attention: q {q_BLNK.shape}, k {k_BLNK.shape}, v {v_BLNK.shape} must be equal, (B, L, N, K)"
    )
  length, heads = q_BLNK.shape[1:3]
  if not 1 <= landmarks <= length:
    raise ValueError(f"nystrom_attention: landmarks={landmarks} must be between 1 and the {length} tokens")
  if pinv_init not in PINV_INITS:
    raise ValueError(f"nystrom_attention: pinv_init={pinv_init!r} is unknown; there are {PINV_INITS}")
  if w_skip_RN is not None and (w_skip_RN.ndim != 2 or w_skip_RN.shape[1] != heads or w_skip_RN.shape[0] % 2 == 0):
    raise ValueError(f"nystrom_attention: w_skip has shape {w_skip_RN.shape}, expected (odd, {heads})")
  if mask_BL is not None and mask_BL.shape != q_BLNK.shape[:2]:
    raise ValueError(f"nystrom_attention: mask has shape {mask_BL.shape}, expected {q_BLNK.shape[:2]}")

  def refuse():
    from kernels.nystrom_attention import mosaic

    return mosaic.refuse(q_BLNK, k_BLNK, v_BLNK, landmarks)

  run = dispatch.choose("nystrom_attention", IMPLEMENTATIONS, implementation, "xla", refuse)
  return run(
    q_BLNK,
    k_BLNK,
    v_BLNK,
    w_skip_RN,
    landmarks=landmarks,
    pinv_iterations=pinv_iterations,
    pinv_init=pinv_init,
    mask_BL=mask_BL,
  )
