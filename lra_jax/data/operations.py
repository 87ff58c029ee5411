"""Image operations on the device with Pillow's meaning, arithmetic and rounding.

Published augmentation policies were searched and trained with Pillow on 8 bits. Here every operation is a pure function
of one image, jit- and vmap-able, with a magnitude that may be traced. Axes: H rows, W columns, C channels (1 or 3).
Images are (H, W, C) float32 of whole numbers 0 … 255 ("levels"), as are results; `to_levels` makes them.

What equals Pillow exactly, and what only within a bound, is said at each operation and tested on photographs. dm-pix
has some of these names with TensorFlow's meaning on real numbers (contrast about each channel's mean, saturation by
HSV, no bicubic warp, no equalisation), so that none of them serves here; `jax.image` has the resampling filters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def to_levels(x_HWC: jax.Array) -> jax.Array:
  """Levels of an image in 0 … 1, rounded and clipped."""
  return jnp.clip(jnp.round(x_HWC * 255), 0, 255)


def blend(a: jax.Array, b: jax.Array, factor: jax.Array) -> jax.Array:
  """a + factor · (b − a), clipped, fraction cut off, as `Image.blend`: factors below 0 and above 1 extrapolate.

  A result within float32's rounding of a whole number may come out one level below Pillow's.
  """
  return jnp.floor(jnp.clip(a + factor * (b - a), 0, 255))


def grey(x_HWC: jax.Array) -> jax.Array:
  """(H, W, 1) luma, ITU-R BT.601 in 16 fractional bits as `convert("L")`, exact; one channel stays as it is."""
  if x_HWC.shape[-1] == 1:
    return x_HWC
  red, green, blue = jnp.split(x_HWC.astype(jnp.int32), 3, axis=-1)
  return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(jnp.float32)


# Pointwise operations: of an image, or of a table of all levels.


def invert(x: jax.Array) -> jax.Array:
  """255 − x, `ImageOps.invert`, exact."""
  return 255 - x


def posterize(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Keeps the `bits` highest of 8 bits, `ImageOps.posterize`, exact; 0 bits, which Pillow now refuses, give black."""
  step = jnp.left_shift(1, 8 - jnp.clip(jnp.asarray(bits, jnp.int32), 0, 8)).astype(jnp.float32)
  return jnp.floor(x / step) * step


def solarize(x: jax.Array, threshold: jax.Array) -> jax.Array:
  """Inverts the levels from `threshold` on, `ImageOps.solarize`, exact."""
  return jnp.where(x < threshold, x, 255 - x)


def solarize_add(x: jax.Array, amount: jax.Array) -> jax.Array:
  """Adds `amount` to the levels below 128, at most to 255; as timm, exact."""
  return jnp.where(x < 128, jnp.minimum(x + amount, 255), x)


def brightness(x: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends from black, `ImageEnhance.Brightness`; see `blend`."""
  return blend(jnp.zeros_like(x), x, factor)


def grey_mean(x_HWC: jax.Array) -> jax.Array:
  """() mean luma, rounded as `ImageEnhance.Contrast` does, exact to 2,000 × 2,000 pixels."""
  total = grey(x_HWC).astype(jnp.int32).sum()
  count = x_HWC.shape[0] * x_HWC.shape[1]
  return ((2 * total + count) // (2 * count)).astype(jnp.float32)


def contrast(x: jax.Array, factor: jax.Array, mean: jax.Array) -> jax.Array:
  """Blends from a flat image of level `mean` (see `grey_mean`), `ImageEnhance.Contrast`; see `blend`."""
  return blend(jnp.broadcast_to(mean, x.shape), x, factor)


# Operations by a table for each image and channel.


def lookup(x_HWC: jax.Array, table_VC: jax.Array) -> jax.Array:
  """Replaces every level by its entry in the channel's table; V = 256 levels."""
  levels = x_HWC.astype(jnp.int32).reshape(-1, x_HWC.shape[-1])
  return jnp.take_along_axis(table_VC, levels, axis=0).reshape(x_HWC.shape)


def autocontrast_table(x_HWC: jax.Array) -> jax.Array:
  """(256, C) table of `ImageOps.autocontrast`, exact: stretches each channel's range to 0 … 255, cutting fractions off.

  Pillow's float64 falls one short of some whole numbers, which float32 cannot reproduce: `_shortfalls` lists them.
  """
  low, high = x_HWC.min((0, 1)).astype(jnp.int32), x_HWC.max((0, 1)).astype(jnp.int32)
  extent = jnp.maximum(high - low, 1)
  divisor, short = jnp.asarray(np.gcd(np.arange(256), 255))[extent], jnp.asarray(_shortfalls())[low, extent]

  def entry(level, low, extent, divisor, short):
    scaled = jnp.clip(level - low, 0, extent) * 255
    stretched = scaled // extent
    is_short = (scaled % extent == 0) & ((short >> (stretched * divisor // 255)) & 1 == 1)
    return stretched - is_short

  levels = jnp.arange(256)
  table = jax.vmap(jax.vmap(entry, (None, 0, 0, 0, 0)), (0, None, None, None, None))
  table_VC = table(levels, low, extent, divisor, short)
  return jnp.where((high > low)[None], table_VC, levels[:, None]).astype(jnp.float32)


@functools.cache
def _shortfalls():
  """(low, extent): bit j says that Pillow has one less than the whole number j · 255/gcd(extent, 255) that is due.

  Whole numbers occur at every (extent/gcd)-th level above the lowest; all others are at least 1/255 away from one.
  """
  bits = np.zeros((256, 256), np.int32)
  for extent in range(1, 256):
    divisor = math.gcd(extent, 255)
    scale = 255.0 / extent
    low = np.arange(256 - extent)[:, None]
    index = np.arange(divisor + 1)
    short = np.floor((low + index * (extent // divisor)) * scale + -low * scale) < index * (255 // divisor)
    if short.any():  # never where the divisor is above 30: the scale is then exact
      bits[: 256 - extent, extent] = (short[:, 1:] << index[1:]).sum(1)  # level 0 is clipped
  return bits


def equalize_table(x_HWC: jax.Array) -> jax.Array:
  """(256, C) table of `ImageOps.equalize`, exact: makes each channel's cumulative histogram a straight line."""
  channels = x_HWC.shape[-1]
  # A scatter: a comparison with each of 256 levels costs 60 times as much on CPU, sorting 4 times.
  bins = (x_HWC.astype(jnp.int32) + 256 * jnp.arange(channels)[None, None]).reshape(-1)
  counts = jnp.zeros(256 * channels, jnp.int32).at[bins].add(1).reshape(channels, 256).T
  levels = jnp.broadcast_to(jnp.arange(256)[:, None], counts.shape)
  total = x_HWC.shape[0] * x_HWC.shape[1]
  last = jnp.take_along_axis(counts, x_HWC.max((0, 1)).astype(jnp.int32)[None], axis=0)
  step = (total - last) // 255
  below = jnp.cumsum(counts, 0) - counts
  table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)  # (256, C)
  return jnp.where(step > 0, table, levels).astype(jnp.float32)  # one single level has step 0, too


def autocontrast(x_HWC: jax.Array) -> jax.Array:
  """See `autocontrast_table`."""
  return lookup(x_HWC, autocontrast_table(x_HWC))


def equalize(x_HWC: jax.Array) -> jax.Array:
  """See `equalize_table`."""
  return lookup(x_HWC, equalize_table(x_HWC))


# Operations on neighbours and on colours.


def smooth(x_HWC: jax.Array) -> jax.Array:
  """Mean of 3 × 3 pixels with weight 5 for the middle, `ImageFilter.SMOOTH`, exact; the border stays as it is."""
  height, width, _ = x_HWC.shape
  padded = jnp.pad(x_HWC, ((1, 1), (1, 1), (0, 0)))
  total = 4 * x_HWC + sum(padded[i : height + i, j : width + j] for i in range(3) for j in range(3))
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
  inside = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
  return jnp.where(inside[..., None], jnp.floor(total / 13 + 0.5), x_HWC)  # whole numbers by 13 are never near a half


def sharpness(x_HWC: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends from the smoothed image, `ImageEnhance.Sharpness`; see `blend`."""
  return blend(smooth(x_HWC), x_HWC, factor)


def color(x_HWC: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends from the grey image, `ImageEnhance.Color`; see `blend`. One channel stays as it is."""
  return blend(jnp.broadcast_to(grey(x_HWC), x_HWC.shape), x_HWC, factor)


def hue(x_HWC: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue by `shift` of a full circle, in Pillow's 8-bit HSV; one channel stays as it is.

  As torchvision's `adjust_hue` of a Pillow image, to one level of hue and of the result.
  """
  if x_HWC.shape[-1] == 1:
    return x_HWC
  red, green, blue = (x_HWC[..., i] for i in range(3))
  value, extent = x_HWC.max(-1), x_HWC.max(-1) - x_HWC.min(-1)
  divisor = jnp.maximum(extent, 1)
  red, green, blue = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
  sixth = jnp.where(red == 0, blue - green, jnp.where(green == 0, 2 + red - blue, 4 + green - red)) / 6
  angle = jnp.floor(jnp.where(sixth < 0, sixth + 1, sixth) * 255)
  saturation = jnp.floor(extent / jnp.maximum(value, 1) * 255)

  angle = jnp.mod(angle + jnp.trunc(shift * 255), 256) * 6 / 255
  sector = jnp.floor(angle)
  fraction, share = angle - sector, saturation / 255
  low, falling, rising = (
    jnp.floor(value * (1 - share * part) + 0.5) for part in (jnp.ones_like(share), fraction, 1 - fraction)
  )
  table = (
    (value, rising, low), (falling, value, low), (low, value, rising),
    (low, falling, value), (rising, low, value), (value, low, falling),
  )  # fmt: skip
  turned = jnp.select([(sector % 6 == i)[..., None] for i in range(6)], [jnp.stack(rgb, -1) for rgb in table])
  return jnp.where((extent == 0)[..., None], x_HWC, turned)


# Geometry. A matrix maps (column, row, 1) of a pixel of the result to (column, row) in the image, pixel centres at
# halves, as the first six numbers of `Image.transform(size, AFFINE, …)`.


def shear_x_matrix(slope: jax.Array) -> jax.Array:
  """(2, 3): (column, row) comes from (column + slope · row, row)."""
  return _matrix(1, slope, 0, 0, 1, 0)


def shear_y_matrix(slope: jax.Array) -> jax.Array:
  """(2, 3): (column, row) comes from (column, row + slope · column)."""
  return _matrix(1, 0, 0, slope, 1, 0)


def translate_matrix(columns: jax.Array, rows: jax.Array) -> jax.Array:
  """(2, 3): (column, row) comes from (column + columns, row + rows), in pixels."""
  return _matrix(1, 0, columns, 0, 1, rows)


def rotate_matrix(degrees: jax.Array, height: int, width: int) -> jax.Array:
  """(2, 3): turns about the middle of an image of that size, anticlockwise as `Image.rotate`."""
  return affine_matrix(height, width, degrees=degrees)


def affine_matrix(
  height: int,
  width: int,
  *,
  degrees: jax.Array = 0.0,
  slope: jax.Array = 0.0,
  zoom: jax.Array = 1.0,
  columns: jax.Array = 0.0,
  rows: jax.Array = 0.0,
) -> jax.Array:
  """Shears, zooms and turns about the middle, then moves: the picture's point p goes to R · Z · S · (p − m) + m + t.

  Args:
    height, width: of the image.
    degrees: of the turn, anticlockwise.
    slope: columns of the picture move by `slope` · row.
    zoom: above 1 things get larger.
    columns, rows: the picture moves right and down by so many pixels.

  Returns:
    (2, 3) float32, the inverse, as `warp` takes it.
  """
  radians = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
  cos, sin = jnp.cos(radians), jnp.sin(radians)
  # A quarter turn has to hit pixels: 1e-8 beside them costs a level nearly everywhere.
  cos, sin = (jnp.where(jnp.abs(value) < 1e-6, 0, value) / zoom for value in (cos, sin))
  a, b, c, d = cos - slope * sin, -sin - slope * cos, sin, cos
  x, y = width / 2, height / 2
  return _matrix(a, b, x - a * (x + columns) - b * (y + rows), c, d, y - c * (x + columns) - d * (y + rows))


def _matrix(*numbers):
  return jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers]).reshape(2, 3)


def warp(x_HWC: jax.Array, matrix_23: jax.Array, fill_C: jax.Array, cubic: jax.Array | bool) -> jax.Array:
  """Resamples by an affine map, `Image.transform` with BILINEAR or BICUBIC (which is a = −1 there); no antialias.

  Every operation that moves pixels is one call of this with its matrix, so that a random choice among them costs one.

  Args:
    x_HWC: image; any real numbers.
    matrix_23: from result to image; see `affine_matrix` and its neighbours.
    fill_C: what is taken where a pixel of the result comes from outside.
    cubic: False for bilinear, True for bicubic; may be traced.

  Returns:
    (H, W, C) float32, not rounded: bicubic values may lie beyond those of the image. `floor_levels` makes Pillow's
    levels of them, which are one off where float32 and Pillow's float64 fall on either side of a whole number: one
    pixel in 1000 at the most, a few in 100 where the weights are simple fractions (shifts by 0.3 pixels). Which pixels
    of the border are outside may differ where a centre comes to lie on the border.
  """
  height, width, channels = x_HWC.shape
  column, row = _sources(matrix_23, height, width)
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  column, row = column - 0.5, row - 0.5
  left, top = jnp.floor(column), jnp.floor(row)
  column_part, row_part = (column - left)[..., None], (row - top)[..., None]
  # Indices far outside would overflow; those pixels are filled anyway.
  left, top = (jnp.clip(first, -2, size).astype(jnp.int32) for first, size in ((left, width), (top, height)))
  pixels = x_HWC.reshape(-1, channels)
  is_linear = isinstance(cubic, bool) and not cubic
  taps = (0, 1) if is_linear else (-1, 0, 1, 2)

  def interpolate(values, part):
    if is_linear:
      return values[0] + (values[1] - values[0]) * part
    a, b, c, d = values
    # In Pillow's order of operations: where all four are equal, so is the result, and no level is lost to rounding.
    third = b + part * (c - a + part * (2 * (a - b) + c - d + part * (b - a + d - c)))
    return jnp.where(cubic, third, b + (c - b) * part)

  def line(i):
    start = jnp.clip(top + i, 0, height - 1) * width
    return interpolate([pixels[start + jnp.clip(left + j, 0, width - 1)] for j in taps], column_part)

  return jnp.where(inside[..., None], interpolate([line(i) for i in taps], row_part), fill_C[None, None])


def floor_levels(x_HWC: jax.Array) -> jax.Array:
  """Clips to 0 … 255 and cuts fractions off, as Pillow does with what `warp` returns."""
  return jnp.floor(jnp.clip(x_HWC, 0, 255))


def warp_nearest(x_HWC: jax.Array, matrix_23: jax.Array, fill_C: jax.Array) -> jax.Array:
  """`warp` with NEAREST, in Pillow's 16-bit fixed point; exact where float32 and float64 round the matrix alike."""
  height, width, channels = x_HWC.shape
  fixed = jnp.floor(matrix_23 * 65536 + 0.5).astype(jnp.int32)
  start = jnp.floor((matrix_23[:, 2] + (matrix_23[:, 0] + matrix_23[:, 1]) / 2) * 65536 + 0.5).astype(jnp.int32)
  columns, rows = jnp.arange(width)[None], jnp.arange(height)[:, None]
  column, row = ((start[i] + fixed[i, 0] * columns + fixed[i, 1] * rows) >> 16 for i in range(2))
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
  return jnp.where(inside[..., None], x_HWC.reshape(-1, channels)[index], fill_C[None, None])


def _sources(matrix_23, height, width):
  """Where the centres of all pixels come from: column (H, W) and row (H, W)."""
  columns, rows = (jnp.arange(width) + 0.5)[None], (jnp.arange(height) + 0.5)[:, None]
  return tuple(matrix_23[i, 0] * columns + matrix_23[i, 1] * rows + matrix_23[i, 2] for i in range(2))


def resize(x_HWC: jax.Array, height: int, width: int) -> jax.Array:
  """Bicubic (a = −1/2) with antialias, one axis after the other, each rounded: `Image.resize(…, BICUBIC)` to one level.

  First goes the axis that leaves the smaller image between, as Pillow 13 has it; earlier ones start with the width.
  """
  old_height, old_width, channels = x_HWC.shape
  shapes = [(old_height, width, channels), (height, width, channels)]
  if height * old_width < old_height * width:
    shapes[0] = (height, old_width, channels)
  for shape in shapes:
    x_HWC = jax.image.resize(x_HWC, shape, method="cubic", antialias=True)
    x_HWC = jnp.floor(jnp.clip(x_HWC + 0.5, 0, 255))
  return x_HWC
