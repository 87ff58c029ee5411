"""Policies against their publications, carried out by Pillow on the same draws, and the statistics of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn import datasets

from lra_jax import errors
from lra_jax.data import policies, sources

CHINA, FLOWER = datasets.load_sample_images().images
PHOTOGRAPH = CHINA[150:214, 200:280]  # 64 × 80
FILL = (100, 110, 120)
FILL_C = jnp.array(FILL, jnp.float32)
APPLY = jax.jit(policies.apply)
NEAREST, BILINEAR, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def by_pillow(name, value, image, fill, resample):
  """The operation of that name, as timm and torchvision call Pillow."""
  moved = lambda *matrix: image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)
  table = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
  return {
    "identity": lambda: image,
    "rotate": lambda: image.rotate(value, resample, fillcolor=fill),
    "shear_x": lambda: moved(1, value, 0, 0, 1, 0),
    "shear_y": lambda: moved(1, 0, 0, value, 1, 0),
    "translate_x": lambda: moved(1, 0, value, 0, 1, 0),
    "translate_y": lambda: moved(1, 0, 0, 0, 1, value),
    "autocontrast": lambda: ImageOps.autocontrast(image),
    "equalize": lambda: ImageOps.equalize(image),
    "invert": lambda: ImageOps.invert(image),
    "posterize": lambda: ImageOps.posterize(image, int(value)) if value else Image.new(image.mode, image.size),
    "solarize": lambda: ImageOps.solarize(image, value),
    "solarize_add": lambda: image.point(table * len(image.getbands())),
    "contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
    "brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
    "color": lambda: ImageEnhance.Color(image).enhance(value),
    "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
  }[name]()


VALUES = {"rotate": 17.3, "shear_x": -0.2718, "shear_y": 0.1732, "translate_x": 7.3137, "translate_y": -3.1416}
VALUES |= {"posterize": 3, "solarize": 130, "solarize_add": 77, "contrast": 1.43}
VALUES |= {"brightness": 0.63, "color": 1.81, "sharpness": 0.19}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_is_pillows(channels):
  image = Image.fromarray(PHOTOGRAPH).convert("L" if channels == 1 else "RGB")
  x = jnp.asarray(np.asarray(image), jnp.float32).reshape(64, 80, channels)
  fill = 100 if channels == 1 else FILL
  for name in policies.OPERATIONS:
    value = VALUES.get(name, 0.0)
    for cubic, resample in ((None, NEAREST), (jnp.array(False), BILINEAR), (jnp.array(True), BICUBIC)):
      truth = np.asarray(by_pillow(name, value, image, fill, resample), np.float32).reshape(x.shape)
      operation = jnp.int32(policies.OPERATIONS.index(name))
      ours = APPLY(operation, jnp.float32(value), x, FILL_C[:channels], cubic)
      difference = np.abs(np.asarray(ours) - truth)
      assert difference.max() <= 1 and (difference > 0).mean() < 0.001, (name, resample, difference.max())
      changed = channels == 3 or name != "color"
      assert (np.asarray(ours) != np.asarray(x)).any() == (changed and name != "identity"), name


def test_strengths_of_randaugment():
  """timm's numbers at strength 9 for an image of 40 × 100, by hand."""
  names = policies._RAND
  increasing = policies.RandAugment.parse("rand-m9-mstd0.5-inc1")
  for sign in (1.0, -1.0):
    factor = 1.81 if sign > 0 else 0.19
    truth = {"rotate": 27 * sign, "posterize": 1, "solarize": 26, "solarize_add": 99, "shear_x": 0.27 * sign}
    truth |= {"shear_y": 0.27 * sign, "translate_x": 40.5 * sign, "translate_y": 16.2 * sign}
    truth |= dict.fromkeys(("color", "contrast", "brightness", "sharpness"), factor)
    ours = dict(zip(names, np.asarray(increasing.values(jnp.float32(9), sign, 40, 100)), strict=True))
    for name, value in truth.items():
      assert ours[name] == pytest.approx(value, rel=1e-6), name
  ours = dict(zip(names, np.asarray(policies.RandAugment().values(jnp.float32(9), -1.0, 40, 100)), strict=True))
  assert (ours["posterize"], ours["solarize"]) == (3, 230) and ours["color"] == pytest.approx(1.72)
  at = lambda strength, sign: dict(zip(names, np.asarray(increasing.values(strength, sign, 9, 9)), strict=True))
  assert (at(10.0, 1.0)["posterize"], at(10.0, 1.0)["solarize"]) == (0, 0)
  assert at(10.0, -1.0)["color"] == pytest.approx(0.1)  # never below
  assert (at(0.0, 1.0)["posterize"], at(0.0, 1.0)["solarize"]) == (4, 256)


def recorded(monkeypatch, policy, keys, height=32, width=32):
  """Name, value and filter of each operation that the policy applies, (keys, operations) each."""
  calls = []

  def record(operation, value, x_HWC, fill_C, cubic):
    calls.append(jnp.stack([operation, value, -1.0 if cubic is None else cubic]))
    return x_HWC

  def run(key):
    calls.clear()
    policy(key, jnp.zeros((height, width, 3)), FILL_C)
    return jnp.stack(calls)

  with monkeypatch.context() as patch:
    patch.setattr(policies, "apply", record)
    draws = np.asarray(jax.jit(jax.vmap(run))(keys))
  return np.array(policies.OPERATIONS)[draws[..., 0].astype(int)], draws[..., 1], draws[..., 2]


def test_draws_of_randaugment(monkeypatch):
  keys = jax.random.split(jax.random.key(1), 20_000)
  names, values, cubic = recorded(monkeypatch, policies.get("rand-m9-mstd0.5-inc1"), keys)
  assert names.shape == (20_000, 2)
  assert abs((names == "identity").mean() - 0.5) < 0.01 and abs(cubic.mean() - 0.5) < 0.01
  for name in policies._RAND:
    assert abs((names == name).mean() - 0.5 / 15) < 0.004, name
  independent = ((names[:, 0] == "invert") & (names[:, 1] == "invert")).mean()  # with replacement
  assert 0 < independent < 0.003
  degrees = values[names == "rotate"]
  assert abs((degrees > 0).mean() - 0.5) < 0.05 and abs(degrees).max() <= 30
  # A normal of mean 27 and deviation 1.5, cut at 30: 2.3 % lie there.
  assert abs(np.median(abs(degrees)) - 27) < 0.2 and abs((abs(degrees) == 30).mean() - 0.0228) < 0.02
  assert abs(np.percentile(abs(degrees), 16) - 25.5) < 0.3
  bits = values[names == "posterize"]  # 0 at 10, 2 below 7.5, three deviations away
  assert set(bits) <= {0, 1, 2} and abs((bits == 0).mean() - 0.0228) < 0.02 and (bits == 2).mean() < 0.01


def test_fields_of_randaugment(monkeypatch):
  keys = jax.random.split(jax.random.key(2), 5000)
  names, values, _ = recorded(monkeypatch, policies.get("rand-n3-p1-m6-mstd101"), keys)
  assert names.shape == (5000, 3) and not (names == "identity").any()
  degrees = abs(values[names == "rotate"])  # uniform in 0 … 18
  assert degrees.max() <= 18 and abs(degrees.mean() - 9) < 0.5 and degrees.min() < 0.5
  names, values, _ = recorded(monkeypatch, policies.get("rand-m15-mmax20"), keys)
  assert set(np.round(abs(values[names == "rotate"]), 3)) == {45}
  names, values, _ = recorded(monkeypatch, policies.get("rand-m15"), keys)
  assert set(np.round(abs(values[names == "rotate"]), 3)) == {30}


# Table 7 of the paper (operation, probability, magnitude), numbers without their dots.
PUBLISHED = """
  Invert 1 7 Contrast 2 6 | Rotate 7 2 TranslateX 3 9 | Sharpness 8 1 Sharpness 9 3 | ShearY 5 8 TranslateY 7 9 |
  AutoContrast 5 8 Equalize 9 2 | ShearY 2 7 Posterize 3 7 | Color 4 3 Brightness 6 7 | Sharpness 3 9 Brightness 7 9 |
  Equalize 6 5 Equalize 5 1 | Contrast 6 7 Sharpness 6 5 | Color 7 7 TranslateX 5 8 | Equalize 3 7 AutoContrast 4 8 |
  TranslateY 4 3 Sharpness 2 6 | Brightness 9 6 Color 2 8 | Solarize 5 2 Invert 0 3 | Equalize 2 0 AutoContrast 6 0 |
  Equalize 2 8 Equalize 6 4 | Color 9 9 Equalize 6 6 | AutoContrast 8 4 Solarize 2 8 | Brightness 1 3 Color 7 0 |
  Solarize 4 5 AutoContrast 9 3 | TranslateY 9 9 TranslateY 7 9 | AutoContrast 9 2 Solarize 8 3 |
  Equalize 8 8 Invert 1 3 | TranslateY 7 9 AutoContrast 9 1
"""
OURS = {"TranslateX": "translate_x", "TranslateY": "translate_y", "ShearX": "shear_x", "ShearY": "shear_y"}


def test_draws_of_cifar_autoaugment(monkeypatch):
  """Each of the 25 pairs comes up with its probabilities; values are a tenth of torchvision's ranges."""
  keys = jax.random.split(jax.random.key(3), 50_000)
  names, values, filters = recorded(monkeypatch, policies.get("cifar_autoaugment"), keys, height=32, width=64)
  assert (filters == -1).all()
  expected, strengths = {}, {}
  for pair in PUBLISHED.split("|"):
    words = pair.split()
    first, second = ((OURS.get(n, n.lower()), int(p) / 10, int(m)) for n, p, m in (words[:3], words[3:]))
    for a, pa in ((first[0], first[1]), ("identity", 1 - first[1])):
      for b, pb in ((second[0], second[1]), ("identity", 1 - second[1])):
        expected[a, b] = expected.get((a, b), 0) + pa * pb / 25
    for name, _, strength in (first, second):
      strengths.setdefault(name, set()).add(strength)
  found, counts = np.unique(names, axis=0, return_counts=True)
  found = {tuple(map(str, pair)): count / len(names) for pair, count in zip(found, counts, strict=True)}
  assert set(found) == {pair for pair, probability in expected.items() if probability > 1e-9}
  for pair, share in found.items():
    assert abs(share - expected[pair]) < 0.005, pair
  largest = {"rotate": 30, "shear_y": 0.3, "translate_x": 150 / 331 * 64, "translate_y": 150 / 331 * 32}
  for name, most in largest.items():
    whole = int if name.startswith("translate") else float
    truth = {round(sign * float(whole(most * s / 9)), 4) for s in strengths[name] for sign in (1, -1)}
    assert {round(float(v), 4) for v in values[names == name]} == truth, name
    assert abs((values[names == name] > 0).mean() - 0.5) < 0.06
  for name in ("brightness", "color", "contrast", "sharpness"):
    truth = {round(1 + sign * s / 10, 4) for s in strengths[name] for sign in (1, -1)}
    assert {round(float(v), 4) for v in values[names == name]} == truth, name
  assert set(values[names == "posterize"]) == {8 - 3}  # 8 − round(7 / 9 · 4)
  assert {round(float(v), 2) for v in values[names == "solarize"]} == {
    round(255 * (1 - s / 9), 2) for s in strengths["solarize"]
  }


def test_draws_of_trivial(monkeypatch):
  keys = jax.random.split(jax.random.key(4), 30_000)
  names, values, filters = recorded(monkeypatch, policies.get("trivial"), keys)
  assert names.shape == (30_000, 1) and (filters == -1).all()
  found, counts = np.unique(names, return_counts=True)
  assert set(found) == set(policies.OPERATIONS) - {"invert", "solarize_add"}
  assert abs(counts / len(names) - 1 / 14).max() < 0.007
  for name, most in (("rotate", 135), ("shear_x", 0.99), ("translate_y", 32)):
    value = values[names == name]
    assert (value.min(), value.max()) == pytest.approx((-most, most)) and abs(value.mean()) < most / 10
    assert len(np.unique(abs(value))) == 31
  assert (values[names == "color"].min(), values[names == "color"].max()) == pytest.approx((0.01, 1.99))
  assert set(values[names == "posterize"]) == {2, 3, 4, 5, 6, 7, 8}
  assert set(values[names == "solarize"]) >= {0, 255, 8.5 * 7}


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m4-mstd0.7-p1", "cifar_autoaugment", "trivial"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_pillows(monkeypatch, name, channels):
  """A batch under jit and vmap, and Pillow doing the recorded operations on each image on its own."""
  images = sources.digits()["train"].inputs[:24].repeat(4, 1).repeat(4, 2)
  if channels == 3:
    images = np.stack([FLOWER[i : i + 32, 3 * i : 3 * i + 32] for i in range(40, 88, 2)])
  keys = jax.random.split(jax.random.key(5), len(images))
  policy = policies.get(name)
  run = jax.jit(jax.vmap(lambda key, x: policy(key, x.astype(jnp.float32), FILL_C[:channels])))
  ours = np.asarray(run(keys, images))
  names, values, cubic = recorded(monkeypatch, policy, keys)
  fill = 0 if channels == 1 else (0, 0, 0)
  if name.startswith("rand"):
    fill = FILL[0] if channels == 1 else FILL
  same = 0
  for i, image in enumerate(images):
    image = Image.fromarray(image[..., 0] if channels == 1 else image)
    for operation, value, filter_ in zip(names[i], values[i], cubic[i], strict=True):
      resample = {-1: NEAREST, 0: BILINEAR, 1: BICUBIC}[int(filter_)]
      image = by_pillow(operation, float(value), image, fill, resample)
    difference = np.abs(ours[i] - np.asarray(image, np.float32).reshape(ours[i].shape))
    same += difference.max() == 0
    # What one level at a few pixels becomes by equalisation.
    assert difference.max() <= 8 and (difference > 0).mean() < 0.01, (names[i], values[i], difference.max())
  assert same >= 0.85 * len(images), same
  assert len({image.tobytes() for image in ours}) >= 20


@pytest.mark.parametrize(
  "name,message",
  [
    ("randaugment", r"config.augment.policy: 'randaugment' does not exist; did you mean"),
    ("cifar_autoaugmnt", r"did you mean 'cifar_autoaugment'\?"),
    ("rand-m9-mst0.5", r"field 'mst' does not exist; did you mean 'mstd'"),
    ("rand-mstd", r"'mstd' needs a number after 'mstd'"),
    ("rand-m9-p1.5", "p of at most 1"),
    ("rand-n0", "a whole n of at least 1"),
    ("rand-inc2", "inc of 0 or 1"),
  ],
)
def test_unknown_policies(name, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    policies.get(name)
  assert "\n" not in str(caught.value)


def test_no_policy():
  assert policies.get("") is None
