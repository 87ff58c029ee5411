"""Token mixing of FNet (Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", section 3.2, eq. 3).

Axes: B batch, L tokens, D width. With C and S the cosine and sine matrices of a length, C_n[j, k] = cos(2πjk/n):

  y = Re(F_L(F_D(x))) = C_L x C_D − S_L x S_D

unnormalised. The operator is real and symmetric, so it is its own gradient, and nothing is kept for it.

On Hopper GPUs "mosaic" folds x to a quarter along its symmetries, and multiplies it by matrices of cosines and sines
in two kernels, of which the second unfolds the result as well: no complex numbers, and half of x in between.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.fft_mixing import reference, xla


def _mosaic(x_BLD):
  from kernels.fft_mixing import mosaic  # loads Pallas

  return mosaic.mixing(x_BLD)


# The form with less to transform and more to copy is faster on CPU (by a tenth, measured on 2 cores) for samples of at
# least so many numbers, in batches of at most so many.
_QUARTER_SAMPLE, _QUARTER_BATCH = 2**14, 2**22


def _xla(x_BLD):
  _, length, width = x_BLD.shape
  quarter = dispatch.platform() == "cpu" and length * width >= _QUARTER_SAMPLE and x_BLD.size <= _QUARTER_BATCH
  return (xla.quarter if quarter else xla.half)(x_BLD)


IMPLEMENTATIONS = {
  "reference": reference.mixing,
  "xla": _xla,
  "half": xla.half,
  "quarter": xla.quarter,
  "folded": xla.folded,
  "mosaic": _mosaic,
}


def fft_mixing(x_BLD: jax.Array, *, implementation: str | None = None) -> jax.Array:
  """The real part of the discrete Fourier transform over tokens and width.

  Args:
    x_BLD: inputs, float32 or bfloat16.
    implementation: "reference" (the complex transform), "half" (the half of it that a real x needs), "quarter" (what
      its real part needs, by real transforms), "xla" ("quarter" on CPU where measured to be faster, else "half"),
      "folded" (products of real matrices, in bfloat16 if x is), "mosaic" (the same as kernels for Hopper GPUs, in
      bfloat16 or TF32; beyond 2048 tokens in two levels) or None: "mosaic"
      for bfloat16 where it is predicted to be faster, since TF32 is less accurate than the transform; else "xla", but
      "folded" on CPU where that is faster.

  Returns:
    (B, L, D) in x's dtype.

  Raises:
    ValueError: x has not three axes, none of them empty, or another dtype; an unknown implementation; or "mosaic" where
      it cannot serve, with the reason.
  """
  if x_BLD.ndim != 3 or 0 in x_BLD.shape:
    raise ValueError(f"fft_mixing: x has shape {x_BLD.shape}, expected 3 axes, none of length 0")
  if x_BLD.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"fft_mixing: x is {x_BLD.dtype}, expected float32 or bfloat16")
  default = "folded" if dispatch.platform() == "cpu" and _folded_is_faster(*x_BLD.shape[1:]) else "xla"
  refuse = functools.partial(_refuse, x_BLD, by_default=implementation is None)
  return dispatch.choose("fft_mixing", IMPLEMENTATIONS, implementation, default, refuse)(x_BLD)


def _refuse(x_BLD, by_default):
  from kernels.fft_mixing import mosaic  # loads Pallas

  return mosaic.refuse(x_BLD, by_default)


def _folded_is_faster(length: int, width: int) -> bool:
  """Measured on CPU: XLA's real transform is slow, at times slower than the complex one, for primes from 97 on.

  The products take half to two thirds of its time there, until they grow too large with the number of tokens.
  """
  return length <= 512 and _largest_prime_factor(width) > 96


def _largest_prime_factor(number: int) -> int:
  """1 for 1."""
  largest, factor = 1, 2
  while factor * factor <= number:
    if number % factor:
      factor += 1
    else:
      largest, number = factor, number // factor
  return max(largest, number)
