"""Augmentation policies: which operations an image goes through, at which strength. Drawn anew for every image.

Axes: H rows, W columns, C channels. Images are levels as in `operations`. Under vmap a choice among operations computes
all of them; so an operation is written as an affine map, a table of levels and a blend, of which all but one do
nothing, and a choice costs one warp, one table and one blend whatever the number of operations.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lra_jax import errors
from lra_jax.data import operations as ops

IDENTITY = "identity"
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_POINTWISE = (
  "autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness",
)  # fmt: skip
_BLENDED = ("color", "sharpness")
OPERATIONS = (IDENTITY, *_GEOMETRIC, *_POINTWISE, *_BLENDED)
_FACTORS = np.isin(OPERATIONS, ("brightness", "color", "contrast", "sharpness"))  # 1 changes nothing
_SIGNED = _FACTORS | np.isin(OPERATIONS, _GEOMETRIC)  # may go either way

Policy = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def apply(
  operation: jax.Array, value: jax.Array, x_HWC: jax.Array, fill_C: jax.Array, cubic: jax.Array | None
) -> jax.Array:
  """One operation, which may be traced, exactly as its function in `operations`.

  Args:
    operation: () int32, index into `OPERATIONS`.
    value: () float32, its own argument: degrees; slope; pixels; bits; threshold; amount; or factor. The picture moves
      left and up by positive pixels.
    x_HWC: levels.
    fill_C: levels of what comes from outside.
    cubic: () bool, bicubic or bilinear resampling; None for the nearest pixel.

  Returns:
    (H, W, C) levels.
  """
  height, width, channels = x_HWC.shape

  def chosen(name):
    return operation == OPERATIONS.index(name)

  matrix = jnp.eye(2, 3)
  for name, candidate in (
    ("rotate", ops.rotate_matrix(value, height, width)),
    ("shear_x", ops.shear_x_matrix(value)),
    ("shear_y", ops.shear_y_matrix(value)),
    ("translate_x", ops.translate_matrix(value, 0)),
    ("translate_y", ops.translate_matrix(0, value)),
  ):
    matrix = jnp.where(chosen(name), candidate, matrix)
  if cubic is None:
    x_HWC = ops.warp_nearest(x_HWC, matrix, fill_C)
  else:
    x_HWC = ops.floor_levels(ops.warp(x_HWC, matrix, fill_C, cubic))
  # Without barriers XLA's CPU compiler puts the warp into each of its readers and computes it a dozen times over.
  x_HWC = jax.lax.optimization_barrier(x_HWC)

  levels = jnp.broadcast_to(jnp.arange(256.0)[:, None], (256, channels))
  table = levels
  for name, candidate in (
    ("autocontrast", ops.autocontrast_table(x_HWC)),
    ("equalize", ops.equalize_table(x_HWC)),
    ("invert", ops.invert(levels)),
    ("posterize", ops.posterize(levels, value)),
    ("solarize", ops.solarize(levels, value)),
    ("solarize_add", ops.solarize_add(levels, value)),
    ("contrast", ops.contrast(levels, value, ops.grey_mean(x_HWC))),
    ("brightness", ops.brightness(levels, value)),
  ):
    table = jnp.where(chosen(name), candidate, table)
  x_HWC = jax.lax.optimization_barrier(ops.lookup(x_HWC, jax.lax.optimization_barrier(table)))

  is_color = chosen("color")
  start = jnp.where(is_color, jnp.broadcast_to(ops.grey(x_HWC), x_HWC.shape), ops.smooth(x_HWC))
  return ops.blend(start, x_HWC, jnp.where(is_color | chosen("sharpness"), value, 1.0))


def get(name: str) -> Policy | None:
  """The policy of that name.

  Args:
    name: "" for none; "rand-m9-mstd0.5-inc1" and the like, see `RandAugment.parse`; "cifar_autoaugment" or "trivial".

  Returns:
    A function of an image's key, levels (H, W, C) and fill (C,), which gives levels; or None.

  Raises:
    UserError: there is none of that name.
  """
  if not name:
    return None
  if name.split("-")[0] == "rand":
    return RandAugment.parse(name)
  known = {"cifar_autoaugment": cifar_autoaugment, "trivial": trivial}
  errors.check_known("config.augment.policy:", name, (*known, "rand-m9-mstd0.5-inc1"))
  return known[name]


# RandAugment as timm has it: names of its operations, in its order.
_RAND = (
  "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
  "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_RAND_INDEX = np.array([OPERATIONS.index(name) for name in _RAND], np.int32)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """RandAugment (Cubuk et al. 2020) with timm's operations, ranges and noise.

  Each of `n` operations is drawn from fifteen, all alike, with replacement, and then left out with probability 1 − p.
  Rotations, shears and shifts take either sign, and resample by a bilinear or bicubic filter on the toss of a coin, as
  timm's "random" interpolation. What comes from outside is filled. timm fails at 0 bits of posterize (m at 10) with
  today's Pillow; here the image is black, as it was with earlier ones.

  Attributes:
    n: operations for each image.
    m: strength, 0 … 10.
    mstd: standard deviation of a normal around `m`, drawn for each operation; infinite for uniform in 0 … m.
    mmax: what strengths are cut to.
    inc: posterize, solarize and the factors of colour, contrast, brightness and sharpness get stronger with m, both
      ways from 1; else, as in the first implementation, weaker, or from 0.1 to 1.9.
    p: probability of each operation.
  """

  n: int = 2
  m: float = 10.0
  mstd: float = 0.0
  mmax: float = 10.0
  inc: bool = False
  p: float = 0.5

  @classmethod
  def parse(cls, text: str) -> "RandAugment":
    """Reads timm's notation: "rand", then in any order m9, n2, mstd0.5, mmax10, inc1, p0.5; mstd above 100 is infinite.

    Raises:
      UserError: a field or a value that there is not.
    """
    where = f"config.augment.policy={text!r}:"
    fields = {}
    for part in text.split("-")[1:]:
      match = re.fullmatch(r"([a-z]*)(.*)", part)
      errors.check_known(f"{where} field", match[1], [field.name for field in dataclasses.fields(cls)])
      if not re.fullmatch(r"\d+(\.\d+)?", match[2]):
        raise errors.UserError(f"{where} {part!r} needs a number after {match[1]!r}, as in 'rand-m9-mstd0.5-inc1'")
      fields[match[1]] = float(match[2])
    policy = cls(**fields | {name: kind(fields[name]) for name, kind in (("n", int), ("inc", bool)) if name in fields})
    if policy.n < 1 or fields.get("n", 1) % 1 or fields.get("inc", 0) not in (0, 1) or policy.p > 1:
      raise errors.UserError(f"{where} expected a whole n of at least 1, inc of 0 or 1, and p of at most 1")
    return dataclasses.replace(policy, mstd=math.inf) if policy.mstd > 100 else policy

  def __call__(self, key: jax.Array, x_HWC: jax.Array, fill_C: jax.Array) -> jax.Array:
    """Augments one image; see `Policy`."""
    height, width, _ = x_HWC.shape
    for layer in range(self.n):
      keys = jax.random.split(jax.random.fold_in(key, layer), 5)
      choice = jax.random.randint(keys[0], (), 0, len(_RAND))
      applied = jax.random.bernoulli(keys[1], self.p)
      if self.mstd == math.inf:
        strength = jax.random.uniform(keys[2], (), maxval=self.m)
      else:
        strength = self.m + self.mstd * jax.random.normal(keys[2], ())
      strength = jnp.clip(strength, 0, self.mmax)
      sign = jnp.where(jax.random.bernoulli(keys[3]), 1.0, -1.0)
      value = self.values(strength, sign, height, width)[choice]
      operation = jnp.where(applied, jnp.asarray(_RAND_INDEX)[choice], OPERATIONS.index(IDENTITY))
      x_HWC = apply(operation, value, x_HWC, fill_C, jax.random.bernoulli(keys[4]))
    return x_HWC

  def values(self, strength: jax.Array, sign: jax.Array, height: int, width: int) -> jax.Array:
    """Each operation's own argument, (15,) in the order of timm's list; `sign` is 1 or −1 where one is drawn."""
    share = strength / 10
    bits, threshold = jnp.floor(share * 4), jnp.floor(share * 256)
    if self.inc:
      bits, threshold = 4 - bits, 256 - threshold
      factor = jnp.maximum(1 + sign * share * 0.9, 0.1)
    else:
      factor = share * 1.8 + 0.1
    nothing = jnp.zeros(())
    shear, shift = sign * share * 0.3, sign * share * 0.45
    return jnp.stack([
      nothing, nothing, nothing, sign * share * 30, bits, threshold, jnp.minimum(jnp.floor(share * 110), 128), factor,
      factor, factor, factor, shear, shear, shift * width, shift * height,
    ])  # fmt: skip


# AutoAugment (Cubuk et al. 2019, table 7): 25 pairs of (operation, probability, tenth of its range).
_CIFAR = (
  (("invert", 0.1, 0), ("contrast", 0.2, 6)),
  (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
  (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
  (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
  (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
  (("color", 0.4, 3), ("brightness", 0.6, 7)),
  (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
  (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
  (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
  (("color", 0.7, 7), ("translate_x", 0.5, 8)),
  (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
  (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
  (("brightness", 0.9, 6), ("color", 0.2, 8)),
  (("solarize", 0.5, 2), ("invert", 0.0, 0)),
  (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
  (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
  (("color", 0.9, 9), ("equalize", 0.6, 0)),
  (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
  (("brightness", 0.1, 3), ("color", 0.7, 0)),
  (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
  (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
  (("equalize", 0.8, 0), ("invert", 0.1, 0)),
  (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def cifar_autoaugment(key: jax.Array, x_HWC: jax.Array, fill_C: jax.Array) -> jax.Array:
  """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019) on one image, with torchvision's ranges of ten strengths.

  One of 25 pairs of operations, each applied with its probability; signs are fair coins. Pixels are taken from the
  nearest place, and 0 from outside, as there; `fill_C` is not used.
  """
  del fill_C
  height, width, _ = x_HWC.shape
  values = _ranges(10, 0.3, 150 / 331 * width, 150 / 331 * height, 30, 0.9, 4)
  operations = np.array([[OPERATIONS.index(name) for name, _, _ in pair] for pair in _CIFAR], np.int32)
  probabilities = np.array([[probability for _, probability, _ in pair] for pair in _CIFAR], np.float32)
  strengths = np.array([[strength for _, _, strength in pair] for pair in _CIFAR])
  key_pair, key_applied, key_sign = jax.random.split(key, 3)
  pair = jax.random.randint(key_pair, (), 0, len(_CIFAR))
  applied = jax.random.uniform(key_applied, (2,)) < jnp.asarray(probabilities)[pair]
  signs = jax.random.bernoulli(key_sign, shape=(2,))
  for i in range(2):
    operation = jnp.asarray(operations)[pair, i]
    value = _argument(operation, jnp.asarray(values)[operation, jnp.asarray(strengths)[pair, i]], signs[i])
    x_HWC = apply(jnp.where(applied[i], operation, 0), value, x_HWC, jnp.zeros(x_HWC.shape[-1]), None)
  return x_HWC


_TRIVIAL = (
  IDENTITY, *_GEOMETRIC, "brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast",
  "equalize",
)  # fmt: skip


def trivial(key: jax.Array, x_HWC: jax.Array, fill_C: jax.Array) -> jax.Array:
  """TrivialAugment (Müller & Hutter 2021) on one image, with its "wide" ranges of 31 strengths.

  One of 14 operations at one of 31 strengths, all alike; signs are fair coins. Pixels are taken from the nearest place,
  and 0 from outside, as in its implementation and torchvision's; `fill_C` is not used.
  """
  del fill_C
  values = _ranges(31, 0.99, 32, 32, 135, 0.99, 6)
  key_operation, key_strength, key_sign = jax.random.split(key, 3)
  index = jnp.asarray([OPERATIONS.index(name) for name in _TRIVIAL])
  operation = index[jax.random.randint(key_operation, (), 0, len(_TRIVIAL))]
  strength = jnp.asarray(values)[operation, jax.random.randint(key_strength, (), 0, 31)]
  value = _argument(operation, strength, jax.random.bernoulli(key_sign))
  return apply(operation, value, x_HWC, jnp.zeros(x_HWC.shape[-1]), None)


def _ranges(count, shear, columns, rows, degrees, factor, bits):
  """(operations, count) strengths from none to the largest; of factors the distance from 1."""
  steps = np.linspace(0, 1, count)
  values = np.zeros((len(OPERATIONS), count), np.float32)
  values[_FACTORS] = factor * steps
  for name, row in {
    "rotate": degrees * steps,
    "shear_x": shear * steps,
    "shear_y": shear * steps,
    "translate_x": np.trunc(columns * steps),
    "translate_y": np.trunc(rows * steps),
    "posterize": 8 - np.round(bits * steps),
    "solarize": 255 * (1 - steps),
  }.items():
    values[OPERATIONS.index(name)] = row
  return values


def _argument(operation, strength, is_negative):
  """What `apply` takes, of a strength from `_ranges`."""
  strength = jnp.where(is_negative & jnp.asarray(_SIGNED)[operation], -strength, strength)
  return strength + jnp.asarray(_FACTORS)[operation]
