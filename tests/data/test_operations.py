"""Image operations against Pillow, on photographs and on digits.

Photographs are scikit-learn's (china.jpg, flower.jpg), digits its 8 × 8 ones, enlarged.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn import datasets

from lra_jax.data import operations as ops
from lra_jax.data import sources

CHINA, FLOWER = datasets.load_sample_images().images
DIGIT = sources.digits()["train"].inputs[0, :, :, 0].repeat(4, 0).repeat(4, 1)
IMAGES = {
  "china": CHINA[150:214, 200:280],  # roofs: fine detail, 64 × 80
  "flower": FLOWER[100:132, 300:332],
  "dark": FLOWER[100:160, 300:350] // 5 + 3,  # a range of levels from 3 to 54
  "grey": np.asarray(Image.fromarray(CHINA[100:148, 300:340]).convert("L")),
  "digit": DIGIT,
  "flat": np.full((9, 7, 3), 77, np.uint8),
  "tiny": CHINA[:2, :5],
}
EACH = pytest.mark.parametrize("name", IMAGES)
GREY_BLUE = (101, 117, 120)


def levels(image):
  return jnp.asarray(image, jnp.float32).reshape(*image.shape[:2], -1)


def pil(image):
  return Image.fromarray(image)


def assert_equal(ours, truth):
  ours, truth = np.asarray(ours), np.asarray(truth)
  np.testing.assert_array_equal(ours, truth.reshape(ours.shape))


def assert_blend(ours, truth):
  """Equal but for results that float32 rounds to the other side of a whole number: one level, one value in 1000."""
  difference = np.abs(np.asarray(ours) - np.asarray(truth, np.float32).reshape(ours.shape))
  assert difference.max() <= 1 and (difference > 0).mean() <= 0.001, (difference.max(), (difference > 0).mean())


@EACH
def test_autocontrast_and_equalize(name):
  image = IMAGES[name]
  assert_equal(ops.autocontrast(levels(image)), ImageOps.autocontrast(pil(image)))
  assert_equal(ops.equalize(levels(image)), ImageOps.equalize(pil(image)))


def test_autocontrast_of_every_range():
  """All 32,640 pairs of lowest and highest level, each image holding all levels between."""
  table = jax.jit(jax.vmap(lambda x: ops.autocontrast_table(x)[:, 0]))
  for low in range(256):
    images = np.clip(np.arange(256), low, np.maximum(np.arange(256), low)[:, None]).astype(np.uint8)
    ours = np.asarray(table(jnp.asarray(images, jnp.float32)[:, None, :, None]))
    truth = np.stack([np.asarray(ImageOps.autocontrast(pil(image[None])))[0] for image in images[low:]])
    np.testing.assert_array_equal(np.take_along_axis(ours, images.astype(int), 1)[low:], truth)


def test_equalize_of_skewed_histograms():
  """Few and many levels, some so rare or so frequent that the table passes 255 or the step is 0."""
  random = np.random.RandomState(0)
  for size in (3, 16, 17, 40):
    for power in (0.2, 1, 3, 8):
      image = (random.uniform(size=(size, size, 3)) ** power * 255).astype(np.uint8)
      assert_equal(ops.equalize(levels(image)), ImageOps.equalize(pil(image)))


@EACH
def test_pointwise(name):
  image, x = IMAGES[name], levels(IMAGES[name])
  assert_equal(ops.invert(x), ImageOps.invert(pil(image)))
  for bits in range(1, 9):
    assert_equal(ops.posterize(x, bits), ImageOps.posterize(pil(image), bits))
  assert not ops.posterize(x, 0).any()
  for threshold in (0, 1, 100, 127.5, 255, 256):
    assert_equal(ops.solarize(x, threshold), ImageOps.solarize(pil(image), threshold))
  for amount in (0, 1, 60, 110, 128):
    table = [min(255, level + amount) if level < 128 else level for level in range(256)] * x.shape[-1]
    assert_equal(ops.solarize_add(x, amount), pil(image).point(table))


@EACH
def test_enhance(name):
  image, x = IMAGES[name], levels(IMAGES[name])
  assert_equal(ops.grey(x), pil(image).convert("L"))
  if name == "tiny":  # smaller than the filter
    assert_equal(ops.smooth(x), image)
  else:
    assert_equal(ops.smooth(x), pil(image).filter(ImageFilter.SMOOTH))
  for factor in (0.0, 0.1, 0.37, 0.5, 1.0, 1.3, 1.9, 2.7):
    assert_blend(ops.brightness(x, factor), ImageEnhance.Brightness(pil(image)).enhance(factor))
    assert_blend(ops.contrast(x, factor, ops.grey_mean(x)), ImageEnhance.Contrast(pil(image)).enhance(factor))
    assert_blend(ops.color(x, factor), ImageEnhance.Color(pil(image)).enhance(factor))
    if name != "tiny":
      assert_blend(ops.sharpness(x, factor), ImageEnhance.Sharpness(pil(image)).enhance(factor))


def test_one_channel_has_no_colour():
  x = levels(DIGIT)
  assert_equal(ops.color(x, 0.1), DIGIT)
  assert_equal(ops.hue(x, 0.3), DIGIT)


@pytest.mark.parametrize("name", ["china", "flower", "dark", "flat"])
def test_hue(name):
  """torchvision's recipe on Pillow: HSV, add to the 8-bit hue with wrap-around, back to RGB."""
  image = IMAGES[name]
  for shift in (-0.5, -0.1, 0.0, 0.02, 0.25, 0.5):
    hue, saturation, value = (np.asarray(band) for band in pil(image).convert("HSV").split())
    hue = ((hue.astype(int) + int(shift * 255)) % 256).astype(np.uint8)
    hsv = Image.merge("HSV", [pil(hue), pil(saturation), pil(value)])
    difference = np.abs(np.asarray(ops.hue(levels(image), shift)) - np.asarray(hsv.convert("RGB"), np.float32))
    assert difference.max() <= 6 and (difference > 1).mean() < 0.001 and (difference > 0).mean() < 0.02, (
      shift,
      difference.max(),
      (difference > 0).mean(),
    )


MATRICES = {
  "identity": ((1, 0, 0, 0, 1, 0), lambda h, w: ops.affine_matrix(h, w)),
  "shear_x": ((1, 0.2718, 0, 0, 1, 0), lambda h, w: ops.shear_x_matrix(0.2718)),
  "shear_y": ((1, 0, 0, -0.3183, 1, 0), lambda h, w: ops.shear_y_matrix(-0.3183)),
  "translate_whole": ((1, 0, -5, 0, 1, 0), lambda h, w: ops.translate_matrix(-5, 0)),
  "translate_half": ((1, 0, 3.5, 0, 1, 0), lambda h, w: ops.translate_matrix(3.5, 0)),
  "translate": ((1, 0, 0, 0, 1, 7.3137), lambda h, w: ops.translate_matrix(0, 7.3137)),
  "far": ((1, 0, 1e6, 0, 1, 0), lambda h, w: ops.translate_matrix(1e6, 0)),
}
FILTERS = {False: Image.Resampling.BILINEAR, True: Image.Resampling.BICUBIC, None: Image.Resampling.NEAREST}


@functools.partial(jax.jit, static_argnames="cubic")
def warped(x, matrix, fill, cubic):
  if cubic is None:
    return ops.warp_nearest(x, matrix, fill)
  return ops.floor_levels(ops.warp(x, matrix, fill, cubic))


def assert_warped(ours, truth):
  """Equal but for one level, where float32 rounds to the other side of a whole number, in one pixel of 1000."""
  difference = np.abs(np.asarray(ours) - np.asarray(truth, np.float32).reshape(ours.shape)).max(-1)
  assert difference.max() <= 1 and (difference > 0).sum() <= 1 + 0.001 * difference.size, (
    difference.max(),
    (difference > 0).mean(),
  )


@pytest.mark.parametrize("name", ["china", "flower", "grey", "digit", "tiny"])
@pytest.mark.parametrize("cubic", FILTERS)
def test_warp(name, cubic):
  image, x = IMAGES[name], levels(IMAGES[name])
  height, width = image.shape[:2]
  fill = GREY_BLUE if image.ndim == 3 else 101
  fill_C = jnp.asarray(fill, jnp.float32).reshape(-1)
  for coefficients, make in MATRICES.values():
    truth = pil(image).transform((width, height), Image.Transform.AFFINE, coefficients, FILTERS[cubic], fillcolor=fill)
    assert_warped(warped(x, make(height, width), fill_C, cubic), truth)
  assert_equal(warped(x, ops.affine_matrix(height, width), fill_C, cubic), image)
  for degrees in (-30, -3.3, 0, 12.5, 90, 133.7):
    truth = pil(image).rotate(degrees, FILTERS[cubic], fillcolor=fill)
    assert_warped(warped(x, ops.rotate_matrix(degrees, height, width), fill_C, cubic), truth)


def test_warp_with_a_traced_filter_is_that_filter():
  x, fill = levels(IMAGES["china"]), jnp.zeros(3)
  matrix = ops.rotate_matrix(17.0, 64, 80)
  both = jax.jit(jax.vmap(lambda cubic: ops.floor_levels(ops.warp(x, matrix, fill, cubic))))(jnp.array([False, True]))
  for ours, cubic in zip(both, (False, True), strict=True):
    truth = pil(IMAGES["china"]).rotate(17.0, FILTERS[cubic], fillcolor=(0, 0, 0))
    assert_warped(ours, truth)


def test_affine_matrix_is_the_inverse_of_its_steps():
  """Moves ∘ turns ∘ zooms ∘ shears about the middle, as 3 × 3 matrices in float64."""
  height, width, degrees, slope, zoom, columns, rows = 48, 64, 25.0, 0.2, 1.3, 4.5, -2.25
  angle = math.radians(degrees)
  at = lambda x, y: np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])
  # Anticlockwise on a screen, whose rows count downwards.
  turn = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
  shear = np.array([[1, slope, 0], [0, 1, 0], [0, 0, 1]])
  forward = at(columns, rows) @ at(width / 2, height / 2) @ turn @ np.diag([zoom, zoom, 1]) @ shear
  forward = forward @ at(-width / 2, -height / 2)
  ours = ops.affine_matrix(height, width, degrees=degrees, slope=slope, zoom=zoom, columns=columns, rows=rows)
  np.testing.assert_allclose(ours, np.linalg.inv(forward)[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["china", "flower", "grey", "digit"])
def test_resize(name):
  image = IMAGES[name]
  height, width = image.shape[:2]
  for new in ((height, width), (36, 36), (20, 33), (width * 2, height + 1), (7, 5)):
    width_first = height * new[1] <= new[0] * width
    between = (new[1], height) if width_first else (width, new[0])
    cubic = Image.Resampling.BICUBIC
    truth = np.asarray(pil(image).resize(between, cubic).resize(new[::-1], cubic), np.float32)
    ours = np.asarray(ops.resize(levels(image), *new))
    difference = np.abs(ours - truth.reshape(ours.shape))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (new, difference.max(), (difference > 0).mean())
    # In one call Pillow may take the axes in the other order, by its version.
    truth = np.asarray(pil(image).resize(new[::-1], cubic), np.float32)
    assert np.abs(ours - truth.reshape(ours.shape)).mean() < 0.5


def test_levels_are_rounded_and_clipped():
  x = jnp.array([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 127.2 / 255, 1.0, 1.7])[None, :, None]
  assert ops.to_levels(x)[0, :, 0].tolist() == [0, 0, 0, 1, 127, 255, 255]
