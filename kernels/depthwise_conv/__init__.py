"""Depthwise convolution of images: every channel with its own kernel.

Axes: B batch, H rows, W columns, C channels, R kernel rows, S kernel columns. With zeros outside of the image,

  y[b, h, w, c] = Σ_{r,s} x[b, h + r − ⌊(R−1)/2⌋, w + s − ⌊(S−1)/2⌋, c] · k[r, s, c]

that is stride 1 and "same" padding, with the odd one at the end for even kernels, as in XLA's SAME and in
`torch.nn.Conv2d(C, C, (R, S), padding="same", groups=C)` (a cross-correlation: the kernel is not flipped).
"""

import jax

from kernels import dispatch
from kernels.depthwise_conv import reference, xla

IMPLEMENTATIONS = {"reference": reference.convolution, "xla": reference.convolution, "shifted": xla.convolution}


def depthwise_conv2d(x_BHWC: jax.Array, w_RSC: jax.Array, *, implementation: str | None = None) -> jax.Array:
  """Depthwise convolution with stride 1 and "same" padding.

  Args:
    x_BHWC: images, float32 or bfloat16.
    w_RSC: kernels; taken in x's dtype.
    implementation: "reference" and "xla" (XLA's convolution), "shifted" (a sum of shifted products), or None:
      "shifted" on CPU, "xla" elsewhere. On CPU only "shifted" may lie in a `lax.scan`: XLA's convolutions are many
      times slower there.

  Returns:
    (B, H, W, C) in x's dtype.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  if x_BHWC.ndim != 4:
    raise ValueError(f"depthwise_conv2d: x has shape {x_BHWC.shape}, expected 4 axes")
  if w_RSC.ndim != 3 or w_RSC.shape[-1] != x_BHWC.shape[-1] or 0 in w_RSC.shape:
    raise ValueError(
      f"depthwise_conv2d: w has shape {w_RSC.shape}, "
      f"expected (rows, columns, channels) with {x_BHWC.shape[-1]} channels"
    )
  default = "shifted" if dispatch.platform() == "cpu" else "xla"
  run = dispatch.choose("depthwise_conv2d", IMPLEMENTATIONS, implementation, default)
  return run(x_BHWC, w_RSC.astype(x_BHWC.dtype))
