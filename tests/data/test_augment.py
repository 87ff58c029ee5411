"""Augmentation against NumPy and Pillow, on real digits and on ramps, and its statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from lra_jax.data import augment, sources, tasks

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
