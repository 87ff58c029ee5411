"""Augmentation against NumPy and Pillow, on real digits and on ramps, and its statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn import datasets

from configs import common
from lra_jax import errors
from lra_jax.data import augment, resident, sources, tasks

CHINA = datasets.load_sample_images().images[0]

KEYS = jax.random.split(jax.random.key(0), 2000)
PLAIN = dataclasses.replace(tasks.get("digits"), mean=(0.0,), std=(1.0,))
RAMP = np.arange(1, 8 * 6 * 2 + 1, dtype=np.float32).reshape(8, 6, 2)


def test_normalize():
  x = np.random.RandomState(0).randint(0, 256, (3, 4, 5, 2)).astype(np.uint8)
  truth = (x / 255 - [0.1, 0.2]) / [0.5, 0.25]
  np.testing.assert_allclose(augment.normalize(x, (0.1, 0.2), (0.5, 0.25)), truth, rtol=1e-5, atol=1e-6)


def test_pad_and_crop_gives_every_window_of_the_padded_image_equally_often():
  padded = np.pad(RAMP, ((1, 1), (1, 1), (0, 0)))
  windows = {padded[i : i + 8, j : j + 6].tobytes(): (i, j) for i in range(3) for j in range(3)}
  found = [windows[np.asarray(y).tobytes()] for y in jax.vmap(lambda k: augment.pad_and_crop(k, RAMP, 1))(KEYS)]
  counts = np.unique(found, axis=0, return_counts=True)[1]
  assert len(counts) == 9 and abs(counts / len(found) - 1 / 9).max() < 0.03


def test_flip_is_a_fair_coin():
  flipped = np.asarray(jax.vmap(lambda k: augment.random_flip(k, RAMP))(KEYS))
  same = (flipped == RAMP).all((1, 2, 3))
  assert ((flipped == RAMP[:, ::-1]).all((1, 2, 3)) == ~same).all() and abs(same.mean() - 0.5) < 0.04


def test_random_resized_crop_is_pillows_of_the_same_window():
  """The window is drawn here from the same key by the documented rule; Pillow resizes it, bicubic with antialias."""
  image = sources.digits()["train"].inputs[0].repeat(4, 0).repeat(4, 1)  # 32 × 32 × 1
  noise = np.random.RandomState(0).randint(0, 256, (32, 32)).astype(np.float32)
  for pixels in (image[..., 0].astype(np.float32), noise):
    for key in KEYS[:10]:
      key_area, key_ratio, key_place = jax.random.split(key, 3)
      area = float(jax.random.uniform(key_area, (), minval=0.3, maxval=1.0))
      ratio = np.exp(float(jax.random.uniform(key_ratio, (), minval=np.log(0.75), maxval=np.log(4 / 3))))
      size = np.minimum(np.sqrt(area * 1024) * np.array([ratio**-0.5, ratio**0.5]), 32)
      start = np.asarray(jax.random.uniform(key_place, (2,))) * (32 - size)
      box = (start[1], start[0], start[1] + size[1], start[0] + size[0])
      truth = (
        Image.fromarray(pixels, mode=None).crop((0, 0, 32, 32)).resize((32, 32), Image.Resampling.BICUBIC, box=box)
      )
      ours = augment.random_resized_crop(key, jnp.asarray(pixels)[..., None], (0.3, 1.0), (0.75, 4 / 3))[..., 0]
      inside = (slice(4, -4),) * 2  # at the border Pillow leaves out what lies beyond the window, we beyond the image
      error = np.abs(np.asarray(ours) - np.asarray(truth))[inside]
      assert error.max() < 2.0 and np.isfinite(ours).all(), error.max()


def test_random_erasing_covers_the_documented_area():
  image = np.full((32, 32, 3), 7.0, np.float32)
  erased = np.asarray(jax.vmap(lambda k: augment.random_erasing(k, image, 0.25, "constant"))(KEYS))
  hole = (erased == 0).all(-1)
  assert ((erased == 0) | (erased == 7)).all()
  share = hole.mean((1, 2))
  assert abs((share > 0).mean() - 0.25) < 0.03
  share = share[share > 0]
  assert share.min() > 0.01 and share.max() < 0.36 and abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.03
  for mask in hole[hole.any((1, 2))][:50]:  # one rectangle
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and mask.sum() == len(rows) * len(columns)
  noise = np.asarray(jax.vmap(lambda k: augment.random_erasing(k, image, 1.0, "pixel"))(KEYS[:200]))
  noise = noise[noise != 7]
  assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_every_example_is_augmented_on_its_own():
  config = common.base("x", "digits").augment
  config.crop_pad = 2
  x = np.broadcast_to(sources.digits()["train"].inputs[:1], (64, 8, 8, 1))
  y = np.asarray(jax.jit(lambda k: augment.augment(k, x, config, PLAIN))(KEYS[0]))
  assert len({image.tobytes() for image in y}) > 15
  config.crop_pad = 0
  np.testing.assert_allclose(augment.augment(KEYS[0], x, config, PLAIN), x / np.float32(255), rtol=1e-6)


# A CutMix box of area u, uniform, loses √u/4 of each side at the border on average: ∫ u (1 − √u/4)² du = 0.321 remains.
@pytest.mark.parametrize("mixup,cutmix,mean", [(0.8, 0.0, 0.5), (0.0, 1.0, 0.679), (0.8, 1.0, (0.5 + 0.679) / 2)])
def test_targets_are_mixed_as_the_pixels_are(mixup, cutmix, mean):
  """Example i is all of value i and of class i: the image's mean tells the share that its target must have."""
  batch = 16
  x = np.broadcast_to(np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, 8, 8, 1))
  shares = []
  for key in KEYS[:40]:
    images, targets = augment.mix(key, jnp.asarray(x), jnp.eye(batch), mixup, cutmix, 0.7)
    images, targets = np.asarray(images), np.asarray(targets)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(targets @ np.arange(batch), images.mean((1, 2, 3)), atol=1e-4)
    assert (targets[~np.eye(batch, dtype=bool) & ~np.eye(batch, dtype=bool)[::-1]] == 0).all()
    shares.append(np.diag(targets))
    if not mixup:
      assert np.isin(images, np.arange(batch)).all()
  shares = np.concatenate(shares)
  assert 0.25 < (shares == 1).mean() < 0.45  # 30 % are not mixed; a few boxes are empty
  assert abs(shares[shares < 1].mean() - mean) < 0.04


def test_no_mixing_is_the_identity():
  x, targets = jnp.ones((4, 2, 2, 1)), jnp.eye(4)
  same = augment.mix(KEYS[0], x, targets, 0.0, 0.0, 1.0)
  assert same[0] is x and same[1] is targets


@pytest.mark.parametrize("mixup,cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_by_the_batch_is_one_draw_for_all(mixup, cutmix):
  """timm's default: the same share, the same box and the same choice for all examples, with the probability of each."""
  batch = 6
  x = np.broadcast_to(np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, 16, 16, 1))
  shares, cut = [], []
  mix = jax.jit(lambda key: augment.mix(key, jnp.asarray(x), jnp.eye(batch), mixup, cutmix, 0.7, per="batch"))
  for key in KEYS[:150]:
    images, targets = mix(key)
    images, targets = np.asarray(images), np.asarray(targets)
    np.testing.assert_allclose(targets @ np.arange(batch), images.mean((1, 2, 3)), atol=1e-4)
    own = np.diag(targets)
    np.testing.assert_allclose(own, own[0])
    mask = images[0] != 0
    assert all(((image != i) == mask).all() for i, image in enumerate(images))
    shares.append(own[0])
    cut.append(np.isin(images, np.arange(batch)).all())
  shares, cut = np.array(shares), np.array(cut)[np.array(shares) < 1]
  assert 0.18 < (shares == 1).mean() < 0.48
  assert cut.mean() == (0 if not cutmix else 1) if not (mixup and cutmix) else 0.3 < cut.mean() < 0.7


def test_mixing_per_something_else_is_refused():
  with pytest.raises(errors.UserError, match="mix_per: 'batches' does not exist; did you mean 'batch'"):
    augment.mix(KEYS[0], jnp.ones((2, 2, 2, 1)), jnp.eye(2), 1.0, 0.0, 1.0, per="batches")


def test_repeated_augmentation():
  """Every batch has each of its examples `repeats` times; the distinct ones go on through the epochs' permutations."""
  plain = resident.train_indices(100, 8, 5, 3, seed=1)
  np.testing.assert_array_equal(plain, resident.train_indices(100, 8, 5, 3, seed=1, repeats=1))
  batches = resident.train_indices(100, 24, 5, 3, seed=1, repeats=3)
  np.testing.assert_array_equal(batches, np.concatenate([plain] * 3, 1))
  seen = resident.train_indices(100, 24, 0, 25, seed=1, repeats=3)[:, :8]
  assert sorted(seen.ravel()) == sorted([*range(100)] * 2)
  for repeats in (0, 5):
    with pytest.raises(errors.UserError, match=f"repeats={repeats}: expected 1 or more, of which .*batch_size=24"):
      resident.train_indices(100, 24, 0, 1, seed=1, repeats=repeats)


@pytest.mark.parametrize("share", [0.875, 0.7])
def test_evaluation_crop_is_pillows(share):
  images = CHINA[None, 100:132, 300:332]
  task = dataclasses.replace(tasks.get("cifar10"), mean=(0.0,) * 3, std=(1.0,) * 3)
  larger = int(32 / share)
  start = round((larger - 32) / 2)
  truth = Image.fromarray(images[0]).resize((larger, larger), Image.Resampling.BICUBIC)
  truth = np.asarray(truth.crop((start, start, start + 32, start + 32)), np.float32)
  ours = np.asarray(augment.prepare(images, task, share))[0] * 255
  assert ours.shape == (32, 32, 3) and np.abs(ours - truth).max() < 1.01 and (np.abs(ours - truth) > 0.01).mean() < 0.01
  np.testing.assert_array_equal(augment.prepare(images, task, 1.0), augment.prepare(images, task))
  tokens = augment.prepare(sources.digits()["test"].inputs[:4], tasks.get("digits_tokens"), share)
  assert tokens.dtype == jnp.int32 and tokens.shape == (4, 64) and len(np.unique(tokens)) > 17
  for wrong in (0.0, 1.2):
    with pytest.raises(errors.UserError, match=f"eval_crop_share={wrong}: expected above 0 and at most 1"):
      augment.prepare(images, task, wrong)


def test_random_affine_is_one_bilinear_warp_of_the_documented_draws():
  """The matrix is made here in float64 from the same draws; Pillow warps each channel as real numbers."""
  image = CHINA[100:148, 300:364].astype(np.float32)
  for key in KEYS[:5]:
    turn, slant, right, down = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (4,), minval=-1.0), np.float64)
    draw = jax.random.uniform(jax.random.fold_in(key, 1), (), minval=jnp.log(0.8), maxval=jnp.log(1.5))
    angle, slope, zoom = np.deg2rad(20 * turn), np.tan(np.deg2rad(15 * slant)), np.exp(float(draw))
    linear = zoom * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ [[1, slope], [0, 1]]
    middle, inverse = np.array([32, 24]), np.linalg.inv(linear)
    offset = middle - inverse @ (middle + 0.1 * np.array([64 * right, 48 * down]))
    coefficients = np.column_stack([inverse, offset]).ravel()
    bilinear, affine = Image.Resampling.BILINEAR, Image.Transform.AFFINE
    channels = [Image.fromarray(image[..., i]).transform((64, 48), affine, coefficients, bilinear) for i in range(3)]
    ours = np.asarray(augment.random_affine(key, jnp.asarray(image), 20.0, 0.1, (0.8, 1.5), 15.0))
    difference = np.abs(ours - np.stack([np.asarray(channel) for channel in channels], -1)).max(-1)
    assert (difference > 0.02).sum() <= 2 and (ours != image).any()  # a border pixel may be outside for one of them


def test_color_jitter_is_pillows_in_the_drawn_order():
  image = CHINA[100:132, 300:332]
  orders = set()
  for key in KEYS[:12]:
    draws = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (4,)), np.float64)
    # 1 − 1.2 is below 0, so that saturation starts at 0.
    factors = 1 + 0.4 * (2 * draws[0] - 1), 1 + 0.3 * (2 * draws[1] - 1), 2.2 * draws[2]
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), 4)).tolist()
    orders.add(tuple(order))
    picture = Image.fromarray(image)
    for change in order:
      if change == 3:
        hue, saturation, value = picture.convert("HSV").split()
        shift = int((2 * draws[3] - 1) * 0.1 * 255)
        hue = Image.fromarray(((np.asarray(hue).astype(int) + shift) % 256).astype(np.uint8))
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
      else:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
        picture = enhance(picture).enhance(factors[change])
    ours = np.asarray(augment.color_jitter(key, jnp.asarray(image, jnp.float32), (0.4, 0.3, 1.2, 0.1)))
    difference = np.abs(ours - np.asarray(picture, np.float32))
    assert (difference > 1).mean() < 0.01 and difference.mean() < 0.1, (order, difference.max())
  assert len(orders) > 6


def test_jitter_of_one_channel_and_of_amounts_that_are_0():
  digit = jnp.asarray(sources.digits()["train"].inputs[0], jnp.float32)
  np.testing.assert_array_equal(augment.color_jitter(KEYS[0], digit, (0.0, 0.0, 0.5, 0.5)), digit)
  factor = 1 - 0.4 + 0.8 * jax.random.uniform(jax.random.fold_in(KEYS[0], 0), (4,))[0]
  truth = np.floor(np.clip(digit * factor, 0, 255))
  np.testing.assert_array_equal(augment.color_jitter(KEYS[0], digit, (0.4, 0, 0, 0)), truth)


@pytest.mark.parametrize("size", [4, 5])
def test_cutout_is_a_square_around_any_pixel(size):
  cut = np.asarray(jax.vmap(lambda k: augment.cutout(k, jnp.full((8, 6, 2), 7.0), size))(KEYS)) == 0
  assert (cut[..., 0] == cut[..., 1]).all()
  masks = {mask.tobytes() for mask in cut[..., 0]}
  truth = set()
  for row in range(8):
    for column in range(6):
      mask = np.zeros((8, 6), bool)
      top, left = row - size // 2, column - size // 2
      mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
      truth.add(mask.tobytes())
  assert masks == truth


def test_vertical_flip_is_a_fair_coin_of_its_own():
  config = common.base("x", "digits").augment
  config.flip, config.flip_vertical = True, True
  x = np.broadcast_to(sources.digits()["train"].inputs[:1], (600, 8, 8, 1))
  y = np.asarray(augment.augment(KEYS[0], x, config, PLAIN)) * 255
  found = np.zeros(4, int)
  for image in np.round(y):
    matches = [(image == x[0][::vertical, ::flat]).all() for vertical in (1, -1) for flat in (1, -1)]
    found[matches.index(True)] += 1
  assert found.sum() == 600 and found.min() > 110


def test_everything_at_once_is_jitted_and_leaves_the_default_as_it_was():
  """With all new fields off, images of a key are those of the operations that were there before, bit for bit."""
  config = common.base("x", "cifar10").augment
  images = np.stack([CHINA[i : i + 32, i : i + 32] for i in range(0, 64, 4)])
  task = tasks.get("cifar10")
  config.crop_pad, config.flip, config.crop_scale, config.erase_probability = 2, True, (0.5, 1.0), 0.5

  def before(key, x):
    keys = jax.random.split(key, 4)
    x = augment.pad_and_crop(keys[0], x.astype(jnp.float32) / 255, 2)
    x = augment.random_resized_crop(keys[1], x, (0.5, 1.0), (3 / 4, 4 / 3))
    x = augment.random_flip(keys[2], x)
    x = (x - jnp.array(task.mean)[None, None]) / jnp.array(task.std)[None, None]
    return augment.random_erasing(keys[3], x, 0.5, "pixel")

  run = jax.jit(lambda key: augment.augment(key, images, config, task))
  truth = jax.jit(lambda key: jax.vmap(before)(jax.random.split(key, 16), images))(KEYS[0])
  np.testing.assert_array_equal(run(KEYS[0]), truth)
  config.rotate, config.translate, config.zoom, config.shear = 10.0, 0.1, (0.9, 1.1), 5.0
  config.flip_vertical, config.policy, config.jitter, config.cutout = True, "trivial", (0.2, 0.2, 0.2, 0.1), 8
  y = jax.jit(lambda key: augment.augment(key, images, config, task))(KEYS[0])
  assert y.shape == images.shape and np.isfinite(y).all() and len({image.tobytes() for image in np.asarray(y)}) == 16


def test_a_policy_of_tokens_gives_tokens():
  config = common.base("x", "digits_tokens").augment
  config.policy = "rand-m9-mstd0.5-inc1"
  task = tasks.get("digits_tokens")
  images = sources.digits()["train"].inputs[:64]
  x = np.asarray(augment.augment(KEYS[0], images, config, task))
  assert (
    np.abs(x - np.round(x)).max() < 1e-4 and x.min() >= 0 and x.max() < 255.01 and (x[..., 0] != images[..., 0]).any()
  )


@pytest.mark.parametrize(
  "field,value,message",
  [
    ("policy", "rand-m9-x1", "field 'x' does not exist"),
    ("jitter", (0.4, 0.4), "jitter=.*expected four numbers"),
    ("jitter", (0.4, 0.4, 0.4, 0.6), "the last at most 0.5"),
    ("zoom", (1.2, 0.8), "zoom=.*the smallest and the largest"),
    ("shear", 90.0, "shear=90.0: expected degrees"),
    ("cutout", -1, "cutout=-1: expected a number of pixels"),
  ],
)
def test_values_that_mean_nothing(field, value, message):
  config = common.base("x", "digits").augment
  config[field] = value
  with pytest.raises(errors.UserError, match=message):
    augment.augment(KEYS[0], sources.digits()["train"].inputs[:2], config, PLAIN)
