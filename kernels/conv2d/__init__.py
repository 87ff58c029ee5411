"""Dense convolution of images.

Axes: B batch, H rows, W columns, C input channels (named I in the kernel), O output channels, R kernel rows, S kernel
columns. With stride t, zeros outside of the image and p of them before its first row and column,

  y[b, h, w, o] = Σ_{r,s,i} x[b, h·t + r − p, w·t + s − p, i] · k[r, s, i, o]

(a cross-correlation, as `torch.nn.Conv2d`, whose weights are (O, I, R, S)).
"""

import jax

from kernels import dispatch
from kernels.conv2d import reference, xla

IMPLEMENTATIONS = {"reference": reference.convolution, "xla": reference.convolution, "im2col": xla.convolution}

# Pixels of a result up to which one matrix product beats XLA's convolution on CPU.
_FEW_PIXELS = 16


def conv2d(
  x_BHWC: jax.Array,
  w_RSIO: jax.Array,
  *,
  strides: int = 1,
  padding: str | int = "SAME",
  implementation: str | None = None,
) -> jax.Array:
  """Dense convolution.

  Args:
    x_BHWC: images, float32 or bfloat16.
    w_RSIO: the kernel; taken in x's dtype.
    strides: step along both axes.
    padding: an integer p: p zeros on every side, as torch's; or "SAME": ⌈H/strides⌉ rows come out, and of an odd number
      of zero rows the larger half is at the end. With strides > 1 the two differ: for even H, 3×3 and strides 2 torch's
      p = 1 starts a row earlier than "SAME".
    implementation: "reference" and "xla" (XLA's convolution), "im2col" (patches and one matrix product), or None:
      on CPU "im2col" for 1×1 kernels, for results of at most 16 pixels and for kernels larger than the image, "xla"
      else. On CPU only "im2col" may lie in a `lax.scan`: XLA's convolutions are many times slower there.

  Returns:
    (B, H', W', O) in x's dtype; with an integer padding H' = ⌊(H + 2p − R)/strides⌋ + 1.

  Raises:
    ValueError: shapes that do not fit, a wrong padding or stride, or an unknown implementation.
  """
  if x_BHWC.ndim != 4:
    raise ValueError(f"conv2d: x has shape {x_BHWC.shape}, expected 4 axes")
  if w_RSIO.ndim != 4 or w_RSIO.shape[2] != x_BHWC.shape[-1] or 0 in w_RSIO.shape:
    raise ValueError(
      f"conv2d: w has shape {w_RSIO.shape}, expected (rows, columns, inputs, outputs) with {x_BHWC.shape[-1]} inputs"
    )
  if strides < 1:
    raise ValueError(f"conv2d: strides={strides}, expected a positive integer")
  borders = tuple(_border(*sizes, strides, padding) for sizes in zip(x_BHWC.shape[1:3], w_RSIO.shape[:2], strict=True))
  default = "xla" if dispatch.platform() != "cpu" else _best_on_cpu(x_BHWC.shape, w_RSIO.shape, strides, borders)
  run = dispatch.choose("conv2d", IMPLEMENTATIONS, implementation, default)
  return run(x_BHWC, w_RSIO.astype(x_BHWC.dtype), strides, borders)


def _best_on_cpu(x_shape, w_shape, strides, borders):
  """Measured, 2 cores, float32, with gradients: 1×1 kernels take a third to a half of XLA's time as matrix products;
  3×3 at 4×4 pixels 0.8 to 0.9 of it; kernels larger than the image, for which XLA has no fast form, a tenth (7×7 at 6×6
  pixels) to a fiftieth (3×3 at 2×2); 3×3 at 8×8 pixels as long, and above XLA's is faster.
  """
  if w_shape[:2] == (1, 1) or w_shape[0] > x_shape[1] or w_shape[1] > x_shape[2]:
    return "im2col"
  pixels = 1
  for size, kernel, border in zip(x_shape[1:3], w_shape[:2], borders, strict=True):
    pixels *= (size + sum(border) - kernel) // strides + 1
  return "im2col" if pixels <= _FEW_PIXELS else "xla"


def _border(size, kernel, strides, padding):
  """Zeros before and after an axis."""
  if isinstance(padding, str):
    if padding != "SAME":
      raise ValueError(f'conv2d: padding={padding!r}, expected "SAME" or an integer')
    total = max((-(-size // strides) - 1) * strides + kernel - size, 0)
    return total // 2, total - total // 2
  if padding < 0 or size + 2 * padding < kernel:
    raise ValueError(f"conv2d: padding={padding} does not serve an axis of {size} and a kernel of {kernel}")
  return padding, padding
