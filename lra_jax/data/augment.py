"""Augmentation on the device: pure functions of a key and images, drawn anew for every example.

Axes: B batch, H rows, W columns, C channels, S classes. Images are float32 in 0 … 1 until `normalize`; what has
Pillow's meaning on 8 bits is in `operations`, and choices among them in `policies`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections

from lra_jax import errors, parallel
from lra_jax.data import operations, policies, tasks

# Purposes of an example's keys, besides the four that `augment` splits off: numbers from 4 on are never equal to those.
_AFFINE, _FLIP_VERTICAL, _POLICY, _JITTER, _CUTOUT = range(4, 9)


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


def prepare(x_BHWC: jax.Array, task: tasks.Task, crop_share: float = 1.0) -> jax.Array:
  """uint8 images as the task's model gets them, without augmentation.

  Args:
    x_BHWC: uint8.
    task: mean, deviation and view.
    crop_share: 0 < share ≤ 1; below 1 the middle of that share of each side, at the size of the whole: images are
      resized to ⌊size / share⌋ (bicubic, antialias, as Pillow), then cut, as timm's `crop_pct`.

  Raises:
    UserError: a share outside of this range.
  """
  if not 0 < crop_share <= 1:
    raise errors.UserError(f"config.augment.eval_crop_share={crop_share}: expected above 0 and at most 1 (1 is off)")
  _, height, width, _ = x_BHWC.shape
  larger = math.floor(height / crop_share), math.floor(width / crop_share)
  if larger != (height, width):
    top, left = round((larger[0] - height) / 2), round((larger[1] - width) / 2)
    resize = jax.vmap(lambda x: operations.resize(x.astype(jnp.float32), *larger))
    x_BHWC = resize(x_BHWC)[:, top : top + height, left : left + width]
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


def random_affine(
  key: jax.Array, x_HWC: jax.Array, rotate: float, translate: float, zoom: tuple[float, float], shear: float
) -> jax.Array:
  """Shears, zooms, turns and shifts at random, by one bilinear resampling; what comes from outside is 0.

  Args:
    key: of this example.
    x_HWC: image.
    rotate: degrees; turns are uniform in ± this.
    translate: share of height and width; shifts along both axes are uniform in ± this.
    zoom: smallest and largest factor of size; uniform in the logarithm.
    shear: degrees along rows; uniform in ± this.
  """
  height, width, channels = x_HWC.shape
  turn, slant, right, down = jax.random.uniform(jax.random.fold_in(key, 0), (4,), minval=-1.0)
  log_zoom = jax.random.uniform(jax.random.fold_in(key, 1), (), minval=jnp.log(zoom[0]), maxval=jnp.log(zoom[1]))
  matrix = operations.affine_matrix(
    height,
    width,
    degrees=rotate * turn,
    slope=jnp.tan(jnp.deg2rad(shear * slant)),
    zoom=jnp.exp(log_zoom),
    columns=translate * width * right,
    rows=translate * height * down,
  )
  return operations.warp(x_HWC, matrix, jnp.zeros(channels), cubic=False)


def color_jitter(key: jax.Array, x_HWC: jax.Array, amounts: tuple[float, float, float, float]) -> jax.Array:
  """Changes brightness, contrast, saturation and hue in a random order, as torchvision's ColorJitter of Pillow images.

  Args:
    key: of this example.
    x_HWC: levels, see `operations`; one channel has neither saturation nor hue.
    amounts: of brightness, contrast and saturation a, for a factor uniform in 1 − a … 1 + a and not below 0; of hue a
      share of the circle, uniform in ± this.

  Returns:
    (H, W, C) levels.
  """
  brightness, contrast, saturation, hue = amounts
  draws = jax.random.uniform(jax.random.fold_in(key, 0), (4,))
  low = jnp.array([max(1 - a, 0.0) for a in amounts[:3]] + [-hue])
  high = jnp.array([1 + brightness, 1 + contrast, 1 + saturation, hue])
  values = low + draws * (high - low)
  order = jax.random.permutation(jax.random.fold_in(key, 1), 4)
  changes = (
    lambda x: operations.brightness(x, values[0]),
    lambda x: operations.contrast(x, values[1], operations.grey_mean(x)),
    lambda x: operations.color(x, values[2]),
    lambda x: operations.hue(x, values[3]),
  )
  active = [i for i, amount in enumerate(amounts) if amount]
  for turn in range(4):
    x_HWC = jnp.select([order[turn] == i for i in active], [changes[i](x_HWC) for i in active], x_HWC)
    x_HWC = jax.lax.optimization_barrier(x_HWC)  # see policies.apply
  return x_HWC


def cutout(key: jax.Array, x_HWC: jax.Array, size: int) -> jax.Array:
  """Sets a square to 0, the mean of a normalised image (DeVries & Taylor 2017).

  Its centre is any pixel, each as likely as another; so parts of the square may lie outside.

  Args:
    key: of this example.
    x_HWC: normalised image.
    size: side of the square, pixels.
  """
  height, width, _ = x_HWC.shape
  row = jax.random.randint(jax.random.fold_in(key, 0), (), 0, height) - size // 2
  column = jax.random.randint(jax.random.fold_in(key, 1), (), 0, width) - size // 2
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
  inside = (rows >= row) & (rows < row + size) & (columns >= column) & (columns < column + size)
  return jnp.where(inside[:, :, None], 0.0, x_HWC)


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
    UserError: normal noise is to be pasted into integer tokens, or a field has a value that there is not.
  """
  policy = policies.get(config.policy)
  _check(config)
  fill_C = jnp.array([min(round(255 * mean), 255) for mean in task.mean], jnp.float32)  # as timm's, of policies
  is_affine = config.rotate or config.translate or config.zoom or config.shear
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
    if is_affine:
      zoom = tuple(config.zoom) or (1.0, 1.0)
      x = random_affine(jax.random.fold_in(key, _AFFINE), x, config.rotate, config.translate, zoom, config.shear)
    if config.flip:
      x = random_flip(keys[2], x)
    if config.flip_vertical:
      x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, _FLIP_VERTICAL)), x[::-1], x)
    if policy or config.jitter:
      x = operations.to_levels(x)
      if policy:
        x = policy(jax.random.fold_in(key, _POLICY), x, fill_C)
      if config.jitter:
        x = color_jitter(jax.random.fold_in(key, _JITTER), x, tuple(config.jitter))
      x = x / 255
    x = (x - _channels(task.mean, 3)) / _channels(task.std, 3)
    if config.erase_probability:
      x = random_erasing(keys[3], x, config.erase_probability, config.erase_mode)
    if config.cutout:
      x = cutout(jax.random.fold_in(key, _CUTOUT), x, config.cutout)
    return x

  return jax.vmap(one)(jax.random.split(key, len(x_BHWC)), x_BHWC)


def _check(config):
  """Raises UserError for values of `config.augment` that mean nothing."""
  if config.jitter and (len(config.jitter) != 4 or min(config.jitter) < 0 or config.jitter[3] > 0.5):
    raise errors.UserError(
      f"config.augment.jitter={tuple(config.jitter)}: expected four numbers from 0 on, of brightness, contrast, "
      "saturation and hue, the last at most 0.5; or () for off"
    )
  if config.zoom and (len(config.zoom) != 2 or not 0 < config.zoom[0] <= config.zoom[1]):
    raise errors.UserError(
      f"config.augment.zoom={tuple(config.zoom)}: expected two factors above 0, the smallest and the largest; or () "
      "for off"
    )
  if not 0 <= config.shear < 90:
    raise errors.UserError(f"config.augment.shear={config.shear}: expected degrees from 0 to below 90")
  if config.cutout < 0:
    raise errors.UserError(f"config.augment.cutout={config.cutout}: expected a number of pixels, 0 for off")


def mix(
  key: jax.Array,
  x_BHWC: jax.Array,
  targets_BS: jax.Array,
  mixup: float,
  cutmix: float,
  probability: float,
  per: str = "example",
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
  """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of every example with the one at the other end of the batch.

  Args:
    key: of this step.
    x_BHWC: normalised images.
    targets_BS: class probabilities.
    mixup: α of MixUp's Beta(α, α); 0 switches it off.
    cutmix: α of CutMix's Beta(α, α); 0 switches it off. With both on, a fair coin decides for each example.
    probability: that an example is mixed at all.
    per: "example", or "batch" for one draw of all this that all examples share, timm's default.
    mesh: of the devices that the batch is split over. Each draws all shares itself: they come from loops that end when
      all are found, which the devices would have to ask each other in every turn.

  Returns:
    Images and targets, mixed by the same share; CutMix's share is that of the pixels really pasted.

  Raises:
    UserError: `per` is neither.
  """
  errors.check_known("config.train.mix_per:", per, ("example", "batch"))
  if not mixup and not cutmix:
    return x_BHWC, targets_BS
  batch, height, width, _ = x_BHWC.shape
  batch = batch if per == "example" else 1
  keys = jax.random.split(key, 6)
  is_cut = jax.random.bernoulli(keys[0], 0.5, (batch,)) if mixup and cutmix else jnp.full((batch,), bool(cutmix))
  mixed = jax.random.bernoulli(keys[1], probability, (batch,))

  def beta(key, alpha):
    draws = jax.random.beta(key, alpha, alpha, (batch,))
    return draws if mesh is None else jax.lax.with_sharding_constraint(draws, parallel.replicated(mesh))

  share = jnp.ones((batch,))  # of the example itself; the rest is its partner's
  if mixup:
    share = jnp.where(is_cut, share, beta(keys[2], mixup))
  if cutmix:
    share = jnp.where(is_cut, beta(keys[3], cutmix), share)
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
