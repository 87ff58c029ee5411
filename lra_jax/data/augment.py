"""Augmentation on the device: pure functions of a key and images, drawn anew for every example.

Axes: B batch, H rows, W columns, C channels, S classes. Images are float32 in 0 … 1 until `normalize`.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from lra_jax import errors
from lra_jax.data import tasks


def normalize(x_BHWC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """(x − mean) / std per channel, of uint8 pixels as 0 … 1; float32."""
  return (x_BHWC.astype(jnp.float32) / 255 - _channels(mean, 4)) / _channels(std, 4)


def view(x_BHWC: jax.Array, task: tasks.Task) -> jax.Array:
  """Normalised images as the task's model gets them; see `tasks.Task.view`.

  Returns:
    (B, H, W, C) or (B, L, C) float32, or (B, L) int32.
  """
  if task.view == "image":
    return x_BHWC
  x_BLC = x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1])
  permutation = task.permutation
  if permutation is not None:
    x_BLC = x_BLC[:, permutation]
  if task.view == "tokens":
    return jnp.clip(jnp.round(x_BLC[..., 0]), 0, task.vocab_size - 1).astype(jnp.int32)
  return x_BLC


def prepare(x_BHWC: jax.Array, task: tasks.Task) -> jax.Array:
  """uint8 images as the task's model gets them, without augmentation."""
  return view(normalize(x_BHWC, task.mean, task.std), task)


def _channels(values, ndim):
  return jnp.asarray(values, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def pad_and_crop(key: jax.Array, x_HWC: jax.Array, pad: int) -> jax.Array:
  """Pads with zeros by `pad` pixels on every side, then cuts out a window of the original size at a random place."""
  rows, columns = jax.random.randint(key, (2,), 0, 2 * pad + 1)
  padded = jnp.pad(x_HWC, ((pad, pad), (pad, pad), (0, 0)))
  return jax.lax.dynamic_slice(padded, (rows, columns, 0), x_HWC.shape)


def random_flip(key: jax.Array, x_HWC: jax.Array) -> jax.Array:
  """Mirrors left and right with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), x_HWC[:, ::-1], x_HWC)


def random_resized_crop(
  key: jax.Array, x_HWC: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
  """A window of random area and aspect ratio, resized to the original size by a bicubic filter with antialias.

  Area is uniform in `scale` (a share of the image), the logarithm of width/height uniform in log `ratio`, as in
  Inception's crop (Szegedy et al. 2015, section 6). A window larger than the image is cut to it.
  """
  height, width = x_HWC.shape[:2]
  key_area, key_ratio, key_place = jax.random.split(key, 3)
  area = jax.random.uniform(key_area, (), minval=scale[0], maxval=scale[1])
  log_ratio = jax.random.uniform(key_ratio, (), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
  window = jnp.sqrt(area * height * width) * jnp.exp(jnp.stack([-log_ratio, log_ratio]) / 2)
  window = jnp.minimum(window, jnp.array([height, width], jnp.float32))
  place = jax.random.uniform(key_place, (2,)) * (jnp.array([height, width], jnp.float32) - window)
  zoom = jnp.array([height, width], jnp.float32) / window
  return jax.image.scale_and_translate(x_HWC, x_HWC.shape, (0, 1), zoom, -place * zoom, "cubic", antialias=True)


def random_erasing(
  key: jax.Array,
  x_HWC: jax.Array,
  probability: float,
  mode: str,
  area: tuple[float, float] = (0.02, 1 / 3),
  ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> jax.Array:
  """Replaces a random rectangle of a normalised image (Zhong et al. 2020; areas and ratios of timm).

  Args:
    key: of this example.
    x_HWC: normalised image.
    probability: that anything is erased.
    mode: "pixel" fills with standard normal noise, "constant" with 0, the mean of the data.
    area: smallest and largest share of the image.
    ratio: smallest and largest height/width, uniform in the logarithm.
  """
  height, width = x_HWC.shape[:2]
  key_whether, key_area, key_ratio, key_place, key_noise = jax.random.split(key, 5)
  size = jax.random.uniform(key_area, (), minval=area[0], maxval=area[1]) * height * width
  log_ratio = jax.random.uniform(key_ratio, (), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
  window = jnp.sqrt(size) * jnp.exp(jnp.stack([log_ratio, -log_ratio]) / 2)
  window = jnp.minimum(jnp.round(window), jnp.array([height, width], jnp.float32))
  start = jnp.floor(jax.random.uniform(key_place, (2,)) * (jnp.array([height, width], jnp.float32) - window + 1))
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
  inside = (rows >= start[0]) & (rows < start[0] + window[0]) & (columns >= start[1]) & (columns < start[1] + window[1])
  inside &= jax.random.bernoulli(key_whether, probability)
  fill = jax.random.normal(key_noise, x_HWC.shape) if mode == "pixel" else jnp.zeros_like(x_HWC)
  return jnp.where(inside[:, :, None], fill, x_HWC)


def augment(key: jax.Array, x_BHWC: jax.Array, config: ml_collections.ConfigDict, task: tasks.Task) -> jax.Array:
  """Augments and normalises a batch.

  Args:
    key: of this step; every example gets its own.
    x_BHWC: uint8.
    config: `config.augment`.
    task: its mean and deviation.

  Returns:
    (B, H, W, C) float32, whatever the task's view.

  Raises:
    UserError: normal noise is to be pasted into integer tokens.
  """
  if config.erase_probability and config.erase_mode == "pixel" and task.view == "tokens":
    raise errors.UserError(
      f"config.augment.erase_mode='pixel' pastes normal noise, which integer tokens ({task.name}) cannot hold; "
      "take 'constant'"
    )

  def one(key, x):
    keys = jax.random.split(key, 4)
    x = x.astype(jnp.float32) / 255
    if config.crop_pad:
      x = pad_and_crop(keys[0], x, config.crop_pad)
    if config.crop_scale:
      x = random_resized_crop(keys[1], x, tuple(config.crop_scale), tuple(config.crop_ratio))
    if config.flip:
      x = random_flip(keys[2], x)
    x = (x - _channels(task.mean, 3)) / _channels(task.std, 3)
    if config.erase_probability:
      x = random_erasing(keys[3], x, config.erase_probability, config.erase_mode)
    return x

  return jax.vmap(one)(jax.random.split(key, len(x_BHWC)), x_BHWC)


def mix(
  key: jax.Array, x_BHWC: jax.Array, targets_BS: jax.Array, mixup: float, cutmix: float, probability: float
) -> tuple[jax.Array, jax.Array]:
  """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of every example with the one at the other end of the batch.

  Args:
    key: of this step.
    x_BHWC: normalised images.
    targets_BS: class probabilities.
    mixup: α of MixUp's Beta(α, α); 0 switches it off.
    cutmix: α of CutMix's Beta(α, α); 0 switches it off. With both on, a fair coin decides for each example.
    probability: that an example is mixed at all.

  Returns:
    Images and targets, mixed by the same share; CutMix's share is that of the pixels really pasted.
  """
  if not mixup and not cutmix:
    return x_BHWC, targets_BS
  batch, height, width, _ = x_BHWC.shape
  keys = jax.random.split(key, 6)
  is_cut = jax.random.bernoulli(keys[0], 0.5, (batch,)) if mixup and cutmix else jnp.full((batch,), bool(cutmix))
  mixed = jax.random.bernoulli(keys[1], probability, (batch,))
  share = jnp.ones((batch,))  # of the example itself; the rest is its partner's
  if mixup:
    share = jnp.where(is_cut, share, jax.random.beta(keys[2], mixup, mixup, (batch,)))
  if cutmix:
    share = jnp.where(is_cut, jax.random.beta(keys[3], cutmix, cutmix, (batch,)), share)
  share = jnp.where(mixed, share, 1.0)

  place = jax.random.uniform(keys[4], (batch, 2))
  boxes = jax.vmap(functools.partial(_box, height, width))(place, share) & is_cut[:, None, None]
  share = jnp.where(is_cut, 1 - boxes.mean((1, 2)), share)
  pixel_share = jnp.where(is_cut[:, None, None], 1.0 - boxes, share[:, None, None])[..., None]
  x = pixel_share * x_BHWC + (1 - pixel_share) * x_BHWC[::-1]
  return x, share[:, None] * targets_BS + (1 - share[:, None]) * targets_BS[::-1]


def _box(height, width, place, share):
  """CutMix's box around a random centre, cut at the border: (H, W) bool."""
  half = jnp.sqrt(1 - share) / 2
  inside = []
  for axis, size in enumerate((height, width)):
    centre = place[axis] * size
    positions = jnp.arange(size)
    inside.append((positions >= jnp.floor(centre - half * size)) & (positions < jnp.floor(centre + half * size)))
  return inside[0][:, None] & inside[1][None]
