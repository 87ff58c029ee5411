"""Pathfinder and Path-X of the Long Range Arena (Tay et al. 2021, sections 2.2.5 and 2.2.6): are two dots joined?

The pictures are those of Linsley et al. 2018 ("Learning long-range spatial dependencies with horizontal gated recurrent
units") and Kim et al. 2020 ("Disentangling neural mechanisms for perceptual grouping"): two long dashed curves start
beside each other and wander over the picture without touching; shorter curves distract. A dot marks the start of one
long curve, a second dot the end of the same one (label 1) or of the other one (label 0).

`load` reads the published pictures where they are, else makes the data set with `generate`, our own program after that
description with the benchmark's parameters. Its pictures are like the published ones, not the same: an accuracy on the
one set is none on the other.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import re
import sys
from typing import NamedTuple

import numpy as np

from lra_jax import errors
from lra_jax.data import cache, listops, sources
from lra_jax.data.sources import Split

CLASS_NAMES = ("apart", "joined")
SIZES = {"train": 160_000, "validation": 20_000, "test": 20_000}  # 80, 10 and 10 % of 200,000
_SHARES = (0.8, 0.9)  # of published pictures, where validation and test begin
_FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """What pictures are drawn with; lengths in px.

  Attributes:
    size: H = W.
    paddle_length, thickness: of one dash.
    margins: one is drawn for each picture; the gap between dashes of a curve is twice it, and dashes of different
      curves, or not next to each other in one, are at least that far apart.
    seed_distance: between the starts of the two long curves; these lie twice as far from the picture's edge.
    marker_radius: of the dots.
    contour_length: dashes of a long curve; 6 is the benchmark's easy set, 9 its intermediate, 14 its hard one.
    distractors, distractor_length: how many short curves, those that find no room left out, and dashes of each.
    continuity: c; a curve turns by the angle Δ with density cos²(cΔ), |cΔ| < π / 2: higher is straighter.
    padding: the edge that stays empty.
    contrast, distractor_contrast: brightness of long and of short curves; a dash thinner than 1 px is dimmer by its
      thickness.
  """

  size: int
  paddle_length: int
  thickness: float
  margins: tuple[int, ...]
  seed_distance: int
  marker_radius: float
  contour_length: int
  distractors: int
  distractor_length: int
  continuity: float
  padding: int
  contrast: float
  distractor_contrast: float


def drawing(size: int, contour_length: int = 14) -> Drawing:
  """The benchmark's parameters, from lra_benchmarks/data/pathfinder.py, of Pathfinder (32 px) or Path-X (128 px).

  Of 32 px those draw the long curves with 2 · 0.75 of full brightness, the short ones with 2.

  Raises:
    UserError: the benchmark has no such pictures.
  """
  if size not in (32, 128) or contour_length not in _FOLDERS:
    raise errors.UserError(
      f"pathfinder: size {size} and contour_length {contour_length}; expected 32 or 128, and 6 (easy), 9 or 14 (hard)"
    )
  distractor_length = contour_length // 3
  shared = dict(size=size, contour_length=contour_length, distractor_length=distractor_length, padding=1)
  if size == 32:
    return Drawing(
      **shared,
      paddle_length=2,
      thickness=0.5,
      margins=(1,),
      seed_distance=7,
      marker_radius=1.5,
      distractors=20 // distractor_length,
      continuity=1.0,
      contrast=1.5,
      distractor_contrast=2.0,
    )
  return Drawing(
    **shared,
    paddle_length=5,
    thickness=1.5,
    margins=(2, 3),
    seed_distance=20,
    marker_radius=3,
    distractors=35 // distractor_length,
    continuity=1.8,
    contrast=0.9,
    distractor_contrast=0.9,
  )


class Scenes(NamedTuple):
  """What N pictures show, before it is drawn; a point is (x, y) in px, (0, 0) the corner at the upper left.

  Dashes 0 … K − 1 of a picture are the first long curve's from its start to its end, K … 2K − 1 the second's, those
  after it the short curves', one after another.

  Attributes:
    tails, directions: (N, P, 2) float64, where a dash starts, and the unit vector along it.
    drawn: (N, P) bool; False for dashes of short curves that found no room.
    margins: (N,) int, as drawn from `Drawing.margins`.
    marked: (N,) int, 0 or 1: the long curve whose start has a dot.
    labels: (N,) int32; 1 where the other dot is at the end of the same curve.
  """

  tails: np.ndarray
  directions: np.ndarray
  drawn: np.ndarray
  margins: np.ndarray
  marked: np.ndarray
  labels: np.ndarray

  def dots(self, how: Drawing) -> np.ndarray:
    """(N, 2, 2): the start and the end that are marked."""
    rows = np.arange(len(self.marked))
    ended = np.where(self.labels == 1, self.marked, 1 - self.marked)
    last = (ended + 1) * how.contour_length - 1
    starts = self.tails[rows, self.marked * how.contour_length]
    ends = self.tails[rows, last] + how.paddle_length * self.directions[rows, last]
    return np.stack([starts, ends], axis=1)


def load(
  data_dir: str | None = None, size: int = 32, contour_length: int = 14, seed: int = 0, max_corrupt: int = 0
) -> dict[str, Split]:
  """Pathfinder: the published pictures in `data_dir`, or generated ones where it has none.

  Published pictures are put into an order by lot, always the same, and cut into 80, 10 and 10 %: the benchmark's own
  order is that of hashes of its paths in TensorFlow Datasets. Generating takes some minutes on one core, of 128 px a
  quarter of an hour; all cores are used. Both are kept in the cache, published ones where none may be bad, until their
  metadata files change.

  Args:
    data_dir: folder that may contain pathfinder32 and pathfinder128, each with the folders `curv_baseline`,
      `curv_contour_length_9` and `curv_contour_length_14`; None or "" as of `sources.data_folder`.
    size: 32 (Pathfinder) or 128 (Path-X).
    contour_length: 6 (easy), 9 or, as in the benchmark, 14 (hard).
    seed: of the generator; not used for published pictures.
    max_corrupt: as of `read_tree`.

  Returns:
    "train", "validation" and "test": inputs (N, size, size, 1) uint8, labels (N,); complete or generated, 160,000,
    20,000 and 20,000.

  Raises:
    UserError: as of `drawing` and `read_tree`, or a folder of that size without pictures of that difficulty.
  """
  drawing(size, contour_length)
  folder = sources.data_folder(data_dir) / f"pathfinder{size}"
  name, level = f"pathfinder{size}", _FOLDERS[contour_length]
  if not os.path.exists(folder):
    say = f"pathfinder{size}: no published pictures in {folder}; {sum(SIZES.values()):,} are being generated"

    def build():
      print(say, file=sys.stderr, flush=True)
      whole = _generate_all(size, contour_length, seed)
      edges = np.cumsum([0, *SIZES.values()])
      return {split: whole.take(slice(*edges[i : i + 2])) for i, split in enumerate(SIZES)}

    return cache.load(
      cache.entry(name, f"{level}-seed{seed}-{'-'.join(map(str, SIZES.values()))}", "generated", ()), build
    )

  def read():
    whole = read_tree(folder / level, size, max_corrupt)
    order = np.random.RandomState(0).permutation(len(whole.labels))
    parts = np.split(order, [int(share * len(order)) for share in _SHARES])
    return {split: whole.take(rows) for split, rows in zip(SIZES, parts, strict=True)}

  files = sorted((folder / level).glob("metadata/*.npy"))
  return read() if max_corrupt else cache.load(cache.entry(name, level, str(folder.resolve()), files), read)


def _generate_all(size, contour_length, seed):
  count, workers = sum(SIZES.values()), len(os.sched_getaffinity(0))
  if workers == 1 or count <= _PART:
    return generate(count, size, seed, 0, contour_length)
  starts = range(0, count, _PART)
  # Not forked: threads of the accelerator's runtime may already be there.
  with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
    parts = [pool.submit(generate, min(_PART, count - start), size, seed, start, contour_length) for start in starts]
    inputs, labels = np.empty((count, size, size, 1), np.uint8), np.empty(count, np.int32)
    for start, part in zip(starts, parts, strict=True):
      inputs[start : start + _PART], labels[start : start + _PART], _ = part.result()
  return Split(inputs, labels)


def read_tree(folder: str | pathlib.Path, size: int, max_corrupt: int = 0) -> Split:
  """Reads pictures as drewlinsley/pathfinder writes and the Long Range Arena publishes them.

  metadata/<number>.npy are, whatever their name says, lines of text: folder ("imgs/<number>"), file
  ("sample_<number>.png"), number, label, and seven parameters of the drawing, with blanks between them. The pictures
  are 8-bit grey PNG files. They come in the order of the numbers of the files, then of the lines.

  Args:
    folder: has metadata and imgs.
    size: H = W that the pictures must have.
    max_corrupt: how many pictures may be missing, empty or not readable; they are named on standard error and left out.
      The published easy set of 32 px has one, imgs/0/sample_172.png.

  Returns:
    inputs (N, size, size, 1) uint8, labels (N,).

  Raises:
    UserError: no metadata, a line that is not of that form, more bad pictures than `max_corrupt`.
  """
  folder = pathlib.Path(folder)
  files = [path for path in folder.glob("metadata/*.npy") if path.stem.isdecimal()]
  if not files:
    raise errors.UserError(
      f"{folder}: no metadata/<number>.npy; expected the folders metadata and imgs of lra_release.gz there, or no "
      f"folder {folder.parent.name} at all, and pictures are generated"
    )
  samples = [sample for path in sorted(files, key=lambda path: int(path.stem)) for sample in _read_metadata(path)]
  inputs = np.zeros((len(samples), size, size, 1), np.uint8)
  good, bad = np.ones(len(samples), bool), 0
  for index, (name, _) in enumerate(samples):
    try:
      inputs[index, :, :, 0] = _read_png(folder / name, size)
    except Exception as error:  # Pillow raises many types
      bad += 1
      if bad > max_corrupt:
        raise errors.UserError(
          f"{folder / name}: not an 8-bit grey PNG of {size} × {size} px ({errors.first_line(error)}); unpack "
          f"lra_release.gz again, or allow more than max_corrupt={max_corrupt} bad pictures to be left out"
        ) from error
      good[index] = False
      cache.warn(f"{folder / name} left out ({errors.first_line(error)})")
  if not good.any():
    raise errors.UserError(f"{folder}: its metadata name no readable picture; unpack lra_release.gz again")
  labels = np.array([label for _, label in samples], np.int32)
  return Split(inputs, labels) if good.all() else Split(inputs[good], labels[good])


_LINE = re.compile(r"(imgs/[0-9]+) ([\w.-]+\.png) [0-9]+ ([01])( .*)?")


def _read_metadata(path):
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"{path}: not lines of text ({errors.first_line(error)}), as which lra_release.gz has them; unpack it again"
    ) from error
  for number, line in enumerate(lines, 1):
    match = _LINE.fullmatch(line)
    if not match:
      raise errors.UserError(
        f"{path}:{number}: {line[:60]!r}, expected a line such as 'imgs/0 sample_0.png 0 1 …', its fourth entry, the "
        "label, 0 or 1; unpack lra_release.gz again"
      )
    yield f"{match[1]}/{match[2]}", int(match[3])


def _read_png(path, size):
  from PIL import Image

  with Image.open(path) as image:
    if image.format != "PNG" or image.mode != "L" or image.size != (size, size):
      raise ValueError(f"it is {image.format} {image.mode} of {image.size[0]} × {image.size[1]} px")
    return np.asarray(image)


def generate(count: int, size: int, seed: int, first: int = 0, contour_length: int = 14) -> Split:
  """Draws pictures with the benchmark's parameters; of examples 2k and 2k + 1 one has each label.

  Example i depends on `seed` and i alone: ranges can be made in several processes.

  Args:
    count: N.
    size: 32 or 128.
    seed: which data set.
    first: index of the first example.
    contour_length: 6, 9 or 14.

  Returns:
    inputs (N, size, size, 1) uint8, labels (N,).

  Raises:
    UserError: as of `drawing`.
  """
  how = drawing(size, contour_length)
  inputs = np.zeros((count, size, size, 1), np.uint8)
  labels = np.zeros(count, np.int32)
  for start in range(0, count, _BLOCK):
    rows = slice(start, min(start + _BLOCK, count))
    scenes = draw_scenes(np.arange(first + start, first + rows.stop), seed, how)
    inputs[rows], labels[rows] = render(scenes, how), scenes.labels
  return Split(inputs, labels)


def draw_scenes(indices: np.ndarray, seed: int, how: Drawing) -> Scenes:
  """Draws what pictures show. The label decides about the second dot, and about nothing else.

  Both long curves get their first dash; then the first grows, then the second. Where the first finds no room, or the
  second none in five trials, both are drawn anew. The short curves have five trials each.

  Args:
    indices: (N,) of the examples.
    seed: which data set.
    how: parameters.
  """
  count, long = len(indices), how.contour_length
  key = np.array([seed % 2**64], np.uint64)
  keys = listops.child_bits(listops.mix(key), indices)
  margin_draw, marked_draw = _uniform(keys, 2).T
  margins = np.array(how.margins)[(margin_draw * len(how.margins)).astype(int)]
  marked = (marked_draw < 0.5).astype(np.int64)
  first_of_pair = listops.child_bits(~key, indices // 2) & np.uint64(1)
  labels = ((first_of_pair.astype(np.int64) + indices) % 2).astype(np.int32)

  paddles = 2 * long + how.distractors * how.distractor_length
  # Dashes that are not there are where they cannot be in the way.
  whole = _Path(np.full((count, paddles, 2), -1e3), np.zeros((count, paddles), int))
  pending, trial = np.arange(count), 0
  while len(pending):
    # Each trial has its own random numbers, so that it does not matter how many are made at once.
    trials = max(1, _BLOCK // len(pending))
    numbers = np.tile(np.arange(trial, trial + trials), len(pending))
    trial_keys = listops.child_bits(np.repeat(_child(keys, 0)[pending], trials), numbers)
    found, path = _two_curves(trial_keys, np.repeat(margins[pending], trials), how)
    owner, best = np.unique(found // trials, return_index=True)
    whole.put(pending[owner], slice(2 * long), path.at(best))
    pending, trial = np.delete(pending, owner), trial + trials
  for number in range(how.distractors):
    part = slice(2 * long + number * how.distractor_length, 2 * long + (number + 1) * how.distractor_length)
    pending = np.arange(count)
    for trial in range(_TRIALS):
      trial_keys = _child(keys[pending], 1 + number * _TRIALS + trial)
      found, path = _short_curve(trial_keys, margins[pending], whole.at(pending), how)
      whole.put(pending[found], part, path)
      pending = np.delete(pending, found)
  return Scenes(whole.tails, whole.directions, whole.tails[..., 0] > -1e3, margins, marked, labels)


def render(scenes: Scenes, how: Drawing) -> np.ndarray:
  """Draws (N, size, size, 1) uint8 pictures: white dots and dashes on black, edges soft over one px.

  A px is as bright as the brightest thing there. How much of a px a dash covers is taken as the product of two shares:
  of the dash's direction, where its ends are cut straight, and across it, where one thinner than a px covers no more
  than its thickness.
  """
  count, paddles = scenes.drawn.shape
  contrast = np.full(paddles, how.contrast)
  contrast[2 * how.contour_length :] = how.distractor_contrast
  picture = np.zeros((count, how.size, how.size))
  half, width = how.paddle_length / 2, how.thickness
  dash = lambda along, across: (
    np.clip(half + 0.5 - np.abs(along), 0, 1) * np.clip((width + 1) / 2 - np.abs(across), 0, min(width, 1))
  )
  row, paddle = np.nonzero(scenes.drawn)
  directions = scenes.directions[row, paddle]
  middles = scenes.tails[row, paddle] + half * directions
  _draw(picture, row, middles, directions, np.hypot(half + 0.5, (width + 1) / 2), dash, contrast[paddle])
  dots = scenes.dots(how).reshape(-1, 2)
  disc = lambda along, across: np.clip(how.marker_radius + 0.5 - np.hypot(along, across), 0, 1)
  _draw(picture, np.repeat(np.arange(count), 2), dots, np.eye(2)[[0] * len(dots)], how.marker_radius + 0.5, disc, 1.0)
  return np.round(np.minimum(picture, 1) * 255).astype(np.uint8)[..., None]


def _draw(picture, row, middles, directions, reach, cover, contrast):
  """Raises px of picture[row] to cover(px along, px across) × contrast, for Q things that end `reach` px away."""
  size = picture.shape[1]
  span = np.arange(-int(np.ceil(reach)), int(np.ceil(reach)) + 1)
  columns = (np.floor(middles[:, 0]).astype(int)[:, None] + span)[:, None, :]
  lines = (np.floor(middles[:, 1]).astype(int)[:, None] + span)[:, :, None]
  x, y = columns + 0.5 - middles[:, 0, None, None], lines + 0.5 - middles[:, 1, None, None]
  cos, sin = directions[:, 0, None, None], directions[:, 1, None, None]
  value = cover(x * cos + y * sin, y * cos - x * sin) * np.reshape(contrast, (-1, 1, 1))
  inside = (columns >= 0) & (columns < size) & (lines >= 0) & (lines < size) & (value > 0)
  flat = (row[:, None, None] * size + lines) * size + columns
  np.maximum.at(picture.reshape(-1), flat[inside], value[inside])


def _squared_distance(x, y, tails, directions, length):
  """Of points (…) from lines (… 2), whose axes are filled up with 1 at the end."""
  axes = (...,) + (None,) * (np.broadcast(x, y).ndim + 1 - tails.ndim)
  x, y = x - tails[..., 0][axes], y - tails[..., 1][axes]
  across, down = directions[..., 0][axes], directions[..., 1][axes]
  along = np.clip(x * across + y * down, 0, length)
  return (x - along * across) ** 2 + (y - along * down) ** 2


_BLOCK = 1024  # pictures, or trials, at once
_PART = 5000  # pictures made by a process at once
_TRIALS = 5
_CANDIDATES = 10  # directions, or places, looked at for one dash

# Angles are whole degrees, and directions and weights come from rounded tables: one ulp of another processor's sine
# would send a curve another way.
_DEGREES = np.radians(np.arange(360))
_DIRECTIONS = np.round(np.stack([np.cos(_DEGREES), np.sin(_DEGREES)], axis=1), 9)


def _uniform(keys, count):
  """(R, count) numbers in [0, 1) of keys (R,) uint64."""
  return (listops.child_bits(keys[:, None], np.arange(count)) >> np.uint64(11)) * 2.0**-53


def _child(keys, number):
  """Keys for another purpose; their numbers start behind all that `_uniform` draws."""
  return listops.child_bits(keys, np.full(1, 1000 + number))


class _Path(NamedTuple):
  """Dashes of R curves: tails (R, J, 2) and angles (R, J) in degrees."""

  tails: np.ndarray
  angles: np.ndarray

  @property
  def directions(self):
    return _DIRECTIONS[self.angles]

  def at(self, rows):
    return _Path(self.tails[rows], self.angles[rows])

  def dashes(self, part):
    return _Path(self.tails[:, part], self.angles[:, part])

  def then(self, other):
    return _Path(np.concatenate([self.tails, other.tails], 1), np.concatenate([self.angles, other.angles], 1))

  def put(self, rows, part, other):
    self.tails[rows, part], self.angles[rows, part] = other


def _two_curves(keys, margins, how):
  """A trial at the long curves for each of R keys: which succeeded, and paths of all their dashes."""
  draws = _uniform(keys, 3 + 2 * _CANDIDATES)
  edge = 2 * how.seed_distance
  first = _Path(edge + draws[:, None, :2] * (how.size - 2 * edge), (draws[:, 2:3] * 360).astype(int))
  around, angles = np.split((draws[:, 3:] * 360).astype(int), 2, axis=1)
  second = _Path(first.tails + how.seed_distance * _DIRECTIONS[around], angles)
  found, second = _first_free(second, first, margins, how)
  kept, first = _grow(_child(keys, 0)[found], margins[found], first.at(found), second, how)
  found, second = found[kept], second.at(kept)
  again = np.repeat(np.arange(len(found)), _TRIALS)
  trial_keys = listops.child_bits(np.repeat(_child(keys, 1)[found], _TRIALS), np.tile(np.arange(_TRIALS), len(found)))
  kept, path = _grow(trial_keys, margins[found][again], second.at(again), first.at(again), how)
  owner, best = np.unique(again[kept], return_index=True)
  return found[owner], first.at(owner).then(path.at(best))


def _short_curve(keys, margins, others, how):
  """A trial at a short curve for each of R keys: which succeeded, and their paths."""
  draws = _uniform(keys, 3 * _CANDIDATES).reshape(len(keys), _CANDIDATES, 3)
  start = _Path(draws[..., :2] * how.size, (draws[..., 2] * 360).astype(int))
  found, start = _first_free(start, others, margins, how)
  kept, path = _grow(_child(keys, 0)[found], margins[found], start, others.at(found), how, how.distractor_length)
  return found[kept], path


def _first_free(candidates, others, margins, how):
  """The rows that have a free one among K candidates, and the first free one of each: a path of one dash."""
  free = _free(candidates.tails, candidates.angles, others, margins, how)
  found = np.flatnonzero(free.any(1))
  return found, _Path(*(array[found, free[found].argmax(1)][:, None] for array in candidates))


def _grow(keys, margins, path, others, how, length=None):
  """Lengthens R curves of one dash to `length`, or the long curves' length, away from the others (R, J).

  Returns:
    The indices of those that found room to the end, and their paths.
  """
  rows = np.arange(len(keys))
  widest = 90 / how.continuity
  for number in range((length or how.contour_length) - 1):
    margin = margins[rows][:, None]
    draws = _uniform(_child(keys[rows], number), 2)
    share = (np.arange(_CANDIDATES) + draws[:, :1]) / _CANDIDATES
    turns = np.floor((2 * share - 1) * widest).astype(int)
    angles = (path.angles[:, -1:] + turns) % 360
    # The curve bends in the middle of the gap, `margin` after the one dash and before the other.
    bend = path.tails[:, -1] + (how.paddle_length + margin) * path.directions[:, -1]
    tails = bend[:, None] + margin[..., None] * _DIRECTIONS[angles]
    near = path.dashes(slice(-1)).then(others.at(rows))  # of its own curve all but the last one, its neighbour
    weights = _turn_weights(how.continuity)[np.abs(turns)] * _free(tails, angles, near, margins[rows], how)
    total = np.cumsum(weights, axis=1)
    success = total[:, -1] > 0
    chosen = (total[success] <= draws[success, 1:] * total[success, -1:]).sum(1)
    rows, path = (
      rows[success],
      path.at(success).then(_Path(tails[success, chosen][:, None], angles[success, chosen][:, None])),
    )
  return rows, path


@functools.cache
def _turn_weights(continuity):
  """Of turns by 0, 1, … degrees, in millionths."""
  return np.round(1e6 * np.cos(np.minimum(np.radians(np.arange(181)) * continuity, np.pi / 2)) ** 2).astype(np.int64)


def _free(tails, angles, others, margins, how):
  """Whether dashes (R, K) lie in the picture and away from the others (R, J): (R, K) bool."""
  edge = how.padding + how.thickness / 2
  along = np.linspace(0, how.paddle_length, 3)[:, None]  # the distance is taken at three points
  points = tails[:, :, None] + along * _DIRECTIONS[angles][:, :, None]  # (R, K, 3, 2)
  free = ((points >= edge) & (points <= how.size - edge)).all((2, 3))
  # Between two of them, a quarter of the length away, the distance may be smaller by as much as this squared adds.
  radius = (2 * margins + how.thickness) ** 2 + (how.paddle_length / 4) ** 2
  row, candidate = np.nonzero(free)
  points, directions, length = points[row, candidate], others.directions, how.paddle_length
  # Most are far away, as the distance of the middles tells.
  middles = others.tails + length / 2 * directions
  apart = (points[:, 1, 0, None] - middles[row, :, 0]) ** 2 + (points[:, 1, 1, None] - middles[row, :, 1]) ** 2
  dash, other = np.nonzero(apart < ((np.sqrt(radius) + length) ** 2)[row][:, None])
  x, y, near = points[dash, :, 0], points[dash, :, 1], (row[dash], other)
  touches = (_squared_distance(x, y, others.tails[near], directions[near], length) <= radius[row[dash]][:, None]).any(1)
  free[row[dash[touches]], candidate[dash[touches]]] = False
  return free
