"""The convolution as a sum of shifted products, for CPU, with both gradients written by hand.

A CPU's first cache maps addresses that differ by a multiple of 4096 bytes to the same few places. Pixels of 256 float32
channels lie 1024 bytes apart, so the many shifted views that one loop reads would push each other out of the cache.
Everything is therefore read from a copy (needed anyhow, for the zeros at the border) whose pixels lie an odd number of
cache lines apart; this alone makes the gradient of the kernel 18 times as fast at 16×16, 256 channels, 5×5.

Sums are float32 whatever the input's dtype. There is no convolution in the sense of XLA here, so all of it may lie
in a loop.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# Taps in one fused loop of the forward pass: more make too many streams, fewer read and write the sum too often.
_TAPS = 15
# Rows in one fused sum of the kernel's gradient, and products in all of it: LLVM unrolls such a sum, and vectorizes the
# loop around it over columns and channels, up to about 80 products.
_ROWS = 8
_PRODUCTS = 72
# Values of one sum of the kernel's gradient, and of the part of dy that is worked on at once (second-level cache).
_SUM = 4096
_CHUNK = 65536


@jax.custom_vjp
def convolution(x_BHWC: jax.Array, w_RSC: jax.Array) -> jax.Array:
  """Depthwise convolution of images and kernels of one dtype: (B, H, W, C) in that dtype."""
  low = [(size - 1) // 2 for size in w_RSC.shape[:2]]
  return _correlate(x_BHWC, w_RSC, low)


def _forward(x_BHWC, w_RSC):
  return convolution(x_BHWC, w_RSC), (x_BHWC, w_RSC)


def _backward(residuals, dy_BHWC):
  x_BHWC, w_RSC = residuals
  dx_BHWC = _correlate(dy_BHWC, w_RSC[::-1, ::-1], [size // 2 for size in w_RSC.shape[:2]])
  return dx_BHWC, _kernel_gradient(x_BHWC, dy_BHWC, w_RSC.shape[:2]).astype(w_RSC.dtype)


convolution.defvjp(_forward, _backward)


def _correlate(x_BHWC, w_RSC, low):
  """Σ_{r,s} x[h + r − low[0], w + s − low[1]] · w[r, s] with zeros outside: (B, H, W, C) in x's dtype."""
  _, height, width, channels = x_BHWC.shape
  rows, columns, _ = w_RSC.shape
  borders = [(before, size - 1 - before) for before, size in zip(low, (rows, columns), strict=True)]
  x = lax.optimization_barrier(_padded(x_BHWC, *borders))
  w = w_RSC.astype(jnp.float32)[:, :, None, None, None]
  taps = [(r, s) for r in range(rows) for s in range(columns)]
  y = None
  for start in range(0, len(taps), _TAPS):
    products = [x[:, r : r + height, s : s + width, :channels] * w[r, s] for r, s in taps[start : start + _TAPS]]
    part = functools.reduce(jnp.add, products)
    y = part if y is None else lax.optimization_barrier(y) + part
  return y.astype(x_BHWC.dtype)


def _kernel_gradient(x_BHWC, dy_BHWC, kernel):
  """Σ_{b,h,w} x[b, h + r − ⌊(R−1)/2⌋, w + s − ⌊(S−1)/2⌋] · dy[b, h, w] for all taps: (R, S, C), float32.

  Works on one part of the images after the other, so that all taps find it in the cache. The taps of one kernel row
  are the operands of one `lax.reduce` over a few image rows: its loop reads dy once for all of them.
  """
  batch, height, width, channels = x_BHWC.shape
  rows, columns = kernel
  # The image in strips of `strip` rows (one fused sum each) and `span` columns; a part is `strips` strips of `images`
  # images. Where the strips or spans do not divide the image, zeros of dy fill the last one.
  strip = _even_part(height, _ROWS)
  span = _even_part(width, max(1, _SUM // channels))
  strips_total, spans_total = -(-height // strip), -(-width // span)
  strips = _largest_divisor(strips_total, _CHUNK // (strip * span * channels))
  images = _largest_divisor(batch, _CHUNK // (strips * strip * span * channels))
  bottom, right = strips_total * strip - height, spans_total * span - width
  low_r, low_s = (rows - 1) // 2, (columns - 1) // 2
  taps_together = max(1, _PRODUCTS // strip)
  parts = strips_total // strips * spans_total

  def group(sums, inputs):
    x, dy = inputs
    x = _padded(x, (low_r, rows - 1 - low_r + bottom), (low_s, columns - 1 - low_s + right))
    dy = _padded(dy, (0, bottom), (0, right))
    pitch = x.shape[-1]
    x, dy = lax.optimization_barrier((x.reshape(*x.shape[:2], -1), dy.reshape(*dy.shape[:2], -1)))

    def taps(sums, x, dy):
      new = []
      for r in range(rows):
        for first in range(0, columns, taps_together):
          products = [
            x[:, r : r + strips * strip, s * pitch : (s + span) * pitch] * dy
            for s in range(first, min(columns, first + taps_together))
          ]
          products = [p.reshape(images * strips, strip, span * pitch) for p in products]
          zeros = [jnp.zeros((), jnp.float32)] * len(products)
          new += lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b, strict=True)], (1,))
      return [a + b for a, b in zip(sums, new, strict=True)]

    def part(sums, index):
      top, left = index // spans_total * strips * strip, index % spans_total * span * pitch
      x_part = lax.dynamic_slice(x, (0, top, left), (images, strips * strip + rows - 1, (span + columns - 1) * pitch))
      dy_part = lax.dynamic_slice(dy, (0, top, left), (images, strips * strip, span * pitch))
      # The barrier makes copies: loops that read at an offset known only at run time are several times slower.
      return taps(sums, *lax.optimization_barrier((x_part, dy_part))), None

    if parts == 1:
      return taps(sums, x, dy), None
    return lax.scan(part, sums, jnp.arange(parts))[0], None

  split = lambda a: a.reshape(batch // images, images, *a.shape[1:])
  sums = [jnp.zeros((images * strips, span * _pitch(channels)), jnp.float32)] * (rows * columns)
  sums, _ = lax.scan(group, sums, (split(x_BHWC), split(dy_BHWC)))
  return jnp.stack(sums).reshape(rows, columns, images * strips * span, -1).sum(2)[..., :channels]


def _padded(x_BHWC, rows, columns):
  """x as float32 with zeros around it, and channels up to an odd number of cache lines."""
  channels = x_BHWC.shape[-1]
  return jnp.pad(x_BHWC.astype(jnp.float32), ((0, 0), rows, columns, (0, _pitch(channels) - channels)))


def _pitch(channels):
  """Values from one pixel to the next: an odd number of cache lines of 16, from 64 channels on."""
  return 16 * (-(-channels // 16) | 1) if channels >= 64 else channels


def _even_part(size, most):
  """The length of the parts when `size` is cut into as few as possible of at most `most`."""
  return math.ceil(size / math.ceil(size / most))


def _largest_divisor(number, most):
  """The largest divisor of `number` that is at most `most`, or 1."""
  return max((d for d in range(1, min(number, most) + 1) if number % d == 0), default=1)
