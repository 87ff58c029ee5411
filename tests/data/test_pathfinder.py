"""Pathfinder: geometry by flood fill of Pillow's drawing of it, statistics of both labels, files of that layout."""

import itertools
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from lra_jax import errors
from lra_jax.data import pathfinder

COUNT = {32: 300, 128: 60}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
  return folder


@pytest.fixture(scope="module", params=[(32, 14), (32, 6), (128, 14)], ids=str)
def drawn(request):
  size, contour_length = request.param
  how = pathfinder.drawing(size, contour_length)
  scenes = pathfinder.draw_scenes(np.arange(COUNT[size]), 0, how)
  return how, scenes, pathfinder.render(scenes, how)[..., 0]


def distances(first, second):
  """(J, K) between lines given by their ends, (J, 2, 2) and (K, 2, 2), by 13 points on each."""
  points = [lines[:, :1] + np.linspace(0, 1, 13)[:, None] * (lines[:, 1:] - lines[:, :1]) for lines in (first, second)]
  gap = points[0][:, None, :, None] - points[1][None, :, None]
  return np.sqrt((gap**2).sum(-1)).min((2, 3))


def ends(how, scenes):
  return np.stack([scenes.tails, scenes.tails + how.paddle_length * scenes.directions], axis=2)  # (N, P, 2, 2)


def curves(how):
  """(P,) number of the curve of every dash."""
  short = np.repeat(np.arange(how.distractors), how.distractor_length) + 2
  return np.concatenate([np.repeat([0, 1], how.contour_length), short])


def test_dashes_keep_the_rules(drawn):
  how, scenes, _ = drawn
  lines, curve = ends(how, scenes), curves(how)
  np.testing.assert_allclose(np.hypot(*scenes.directions.T), 1, atol=1e-8)
  assert set(np.unique(scenes.margins)) == set(how.margins)
  starts = scenes.tails[:, [0, how.contour_length]]
  np.testing.assert_allclose(np.hypot(*(starts[:, 0] - starts[:, 1]).T), how.seed_distance, atol=1e-6)
  turns = []
  for row in range(40):
    there = scenes.drawn[row]
    assert there[: 2 * how.contour_length].all()
    assert lines[row, there].min() >= how.padding and lines[row, there].max() <= how.size - how.padding
    apart = distances(lines[row, there], lines[row, there])
    number = np.arange(len(curve))[there]
    neighbours = (curve[there][:, None] == curve[there]) & (np.abs(number[:, None] - number) <= 1)
    margin = scenes.margins[row]
    assert apart[~neighbours].min() >= 2 * margin + how.thickness - 1e-9
    for a in range(len(curve) - 1):
      if curve[a] == curve[a + 1] and scenes.drawn[row, a]:
        assert scenes.drawn[row, a + 1]  # a whole curve or none of it
        gap = np.hypot(*(lines[row, a + 1, 0] - lines[row, a, 1]))
        assert gap <= 2 * margin + 1e-6
        turns.append(np.degrees(np.arccos(np.clip(scenes.directions[row, a] @ scenes.directions[row, a + 1], -1, 1))))
  assert max(turns) <= 90 / how.continuity + 1 and np.mean(turns) > 5


def components(how, scenes, row, zoom=8):
  """Draws the dashes so thick that the gaps inside curves close, and labels what hangs together."""
  margin = scenes.margins[row]
  image = Image.new("L", (how.size * zoom, how.size * zoom))
  pen = ImageDraw.Draw(image)
  radius = (margin + how.thickness / 4) * zoom
  for (tail, head), there in zip(ends(how, scenes)[row] * zoom, scenes.drawn[row], strict=True):
    if there:
      pen.line([*tail, *head], fill=255, width=round(2 * radius))
      for x, y in (tail, head):
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
  return ndimage.label(np.asarray(image))


def test_flood_fill_finds_the_label(drawn):
  how, scenes, _ = drawn
  for row in range(60):
    parts, count = components(how, scenes, row)
    curve = curves(how)[scenes.drawn[row]]
    assert count == len(np.unique(curve))
    (x0, y0), (x1, y1) = np.floor(scenes.dots(how)[row] * 8).astype(int)
    assert parts[y0, x0] > 0 and parts[y1, x1] > 0
    assert (parts[y0, x0] == parts[y1, x1]) == scenes.labels[row]


def test_label_moves_the_second_dot_and_nothing_else(drawn):
  how, scenes, pictures = drawn
  flipped = scenes._replace(labels=1 - scenes.labels)
  other = pathfinder.render(flipped, how)[..., 0]
  np.testing.assert_array_equal(scenes.dots(how)[:, 0], flipped.dots(how)[:, 0])
  y, x = np.mgrid[: how.size, : how.size] + 0.5
  for row in range(len(pictures)):
    near = np.zeros((how.size, how.size), bool)
    for dots in (scenes.dots(how), flipped.dots(how)):
      near |= np.hypot(x - dots[row, 1, 0], y - dots[row, 1, 1]) < how.marker_radius + 0.5
    changed = pictures[row] != other[row]
    assert changed.any() and not changed[~near].any()


def test_pictures_are_pillows(drawn):
  """Drawn by Pillow at 16 times the size and averaged; here the edges are a formula."""
  how, scenes, pictures = drawn
  zoom = 16
  for row in range(8):
    truth = np.zeros((how.size, how.size))
    for part, contrast in ((slice(2 * how.contour_length), how.contrast), (slice(2 * how.contour_length, None), None)):
      image = Image.new("L", (how.size * zoom, how.size * zoom))
      pen = ImageDraw.Draw(image)
      for (tail, head), there in zip(ends(how, scenes)[row, part] * zoom - 0.5, scenes.drawn[row, part], strict=True):
        if there:
          pen.line([*tail, *head], fill=255, width=round(how.thickness * zoom))
      ink = np.asarray(image, float).reshape(how.size, zoom, how.size, zoom).mean((1, 3)) / 255
      truth = np.maximum(truth, np.minimum(ink * (contrast or how.distractor_contrast), 1))
    image = Image.new("L", (how.size * zoom, how.size * zoom))
    for x, y in scenes.dots(how)[row] * zoom - 0.5:
      radius = how.marker_radius * zoom
      ImageDraw.Draw(image).ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    truth = np.maximum(truth, np.asarray(image, float).reshape(how.size, zoom, how.size, zoom).mean((1, 3)) / 255)
    ours = pictures[row] / 255
    assert np.corrcoef(truth.ravel(), ours.ravel())[0, 1] > 0.985
    assert ours.sum() == pytest.approx(truth.sum(), rel=0.06)
    for x, y in np.floor(scenes.dots(how)[row]).astype(int):
      assert pictures[row, y, x] == 255


def test_both_labels_have_the_same_statistics():
  """Brightness, dashes, and where the dots are; what the distance of the dots tells is a few per cent over chance."""
  how = pathfinder.drawing(32)
  count = 3000
  scenes = pathfinder.draw_scenes(np.arange(count), 1, how)
  label = scenes.labels == 1
  assert label.sum() == count // 2 and (label[::2] != label[1::2]).all() and 0.4 < label[::2].mean() < 0.6
  pictures = pathfinder.render(scenes, how)[..., 0] / 255
  dots = scenes.dots(how)
  distance = np.hypot(*(dots[:, 0] - dots[:, 1]).T)
  statistics = {
    "mean": pictures.mean((1, 2)),
    "squares": (pictures**2).mean((1, 2)),
    "white": (pictures > 0.99).mean((1, 2)),
    "dashes": scenes.drawn.sum(1),
    "first": scenes.marked,
    **{f"dot {i} {axis}": dots[:, i, a] for i in (0, 1) for a, axis in enumerate("xy")},
    **{f"quarter {i} {j}": pictures[:, i : i + 16, j : j + 16].mean((1, 2)) for i in (0, 16) for j in (0, 16)},
  }
  for name, values in statistics.items():
    error = values.std() * np.sqrt(4 / count)
    assert abs(values[label].mean() - values[~label].mean()) < 4 * error, name
  grid = np.linspace(0, 45, 200)
  share = lambda values: np.searchsorted(np.sort(values), grid) / len(values)
  assert 0.5 + np.abs(share(distance[label]) - share(distance[~label])).max() / 2 < 0.57
  # A fit of a plane to all pixels, the simplest classifier, is at chance on new pictures.
  flat = np.concatenate([pictures.reshape(count, -1), np.ones((count, 1))], 1)
  half = count // 2
  plane = np.linalg.solve(flat[:half].T @ flat[:half] + 10 * np.eye(1025), flat[:half].T @ (2.0 * label[:half] - 1))
  assert ((flat[half:] @ plane > 0) == label[half:]).mean() < 0.56


@pytest.mark.parametrize("size", [32, 128])
def test_an_example_is_a_function_of_seed_and_index(size, monkeypatch):
  whole = pathfinder.generate(12, size, seed=3)
  assert whole.inputs.shape == (12, size, size, 1) and whole.inputs.dtype == np.uint8 and whole.lengths is None
  assert whole.labels.dtype == np.int32
  monkeypatch.setattr(pathfinder, "_BLOCK", 7)  # trials at once, too
  pieces = [pathfinder.generate(4, size, 3, first) for first in (0, 4, 8)]
  np.testing.assert_array_equal(np.concatenate([piece.inputs for piece in pieces]), whole.inputs)
  np.testing.assert_array_equal(np.concatenate([piece.labels for piece in pieces]), whole.labels)
  other = pathfinder.generate(12, size, seed=4)
  assert not {image.tobytes() for image in whole.inputs} & {image.tobytes() for image in other.inputs}
  assert len({image.tobytes() for image in whole.inputs}) == 12
  # Recorded: a change here silently changes the data set.
  scenes = pathfinder.draw_scenes(np.arange(4), 0, pathfinder.drawing(size))
  assert [scenes.drawn.sum().item(), *scenes.labels.tolist()] == RECORDED[size][0]
  np.testing.assert_allclose(scenes.tails[3, 13], RECORDED[size][1], atol=1e-4)


RECORDED = {
  32: ([168, 0, 1, 1, 0], [24.7316, 25.9816]),
  128: ([228, 0, 1, 1, 0], [93.0510, 71.3175]),
}


def test_difficulty_is_that_of_the_benchmark():
  for length, distractors in ((6, (10, 2)), (9, (6, 3)), (14, (5, 4))):
    how = pathfinder.drawing(32, length)
    assert (how.distractors, how.distractor_length) == distractors
  assert pathfinder.drawing(128).distractors == 8
  with pytest.raises(errors.UserError, match=r"^pathfinder: size 64 and contour_length 14; expected 32 or 128"):
    pathfinder.generate(1, 64, 0)
  with pytest.raises(errors.UserError, match=r"contour_length 10; expected .* 6"):
    pathfinder.load(None, contour_length=10)


def test_load_generates_the_same_in_one_process_and_in_several(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(pathfinder, "SIZES", {"train": 50, "validation": 6, "test": 4})
  one = pathfinder.load(str(tmp_path))
  assert f"no published pictures in {tmp_path}/pathfinder32; 60 are being generated" in capsys.readouterr().err
  assert {name: len(split.labels) for name, split in one.items()} == pathfinder.SIZES
  assert len({image.tobytes() for split in one.values() for image in split.inputs}) == 60
  monkeypatch.setattr(pathfinder, "_PART", 25)
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
  monkeypatch.setenv("LRA_JAX_CACHE", str(tmp_path / "another"))
  several = pathfinder.load(str(tmp_path))
  for name in one:
    np.testing.assert_array_equal(one[name].inputs, several[name].inputs)
    np.testing.assert_array_equal(one[name].labels, several[name].labels)


@pytest.fixture(scope="module")
def hundred():
  return pathfinder.generate(100, 32, seed=9)


@pytest.fixture
def tree(hundred, tmp_path):
  """100 pictures in the published layout: files 0, 2 and 10, in whose names' order 10 would come before 2."""
  split = hundred
  folder = tmp_path / "pathfinder32" / "curv_contour_length_14"
  (folder / "metadata").mkdir(parents=True)
  index = 0
  for number, count in ((0, 40), (2, 40), (10, 20)):
    (folder / "imgs" / str(number)).mkdir(parents=True)
    lines = []
    for sample in range(count):
      Image.fromarray(split.inputs[index, :, :, 0]).save(folder / f"imgs/{number}/sample_{sample}.png")
      lines.append(f"imgs/{number} sample_{sample}.png {sample} {split.labels[index]} 1.0 14 4 2 0.5 1 1\n")
      index += 1
    (folder / f"metadata/{number}.npy").write_text("".join(lines))
  return folder, split


def test_published_pictures_are_read(tree, tmp_path):
  folder, split = tree
  ours = pathfinder.read_tree(folder, 32)
  np.testing.assert_array_equal(ours.inputs, split.inputs)
  np.testing.assert_array_equal(ours.labels, split.labels)
  splits = pathfinder.load(str(tmp_path))
  assert {name: len(part.labels) for name, part in splits.items()} == {"train": 80, "validation": 10, "test": 10}
  key = lambda part: [(image.tobytes(), label) for image, label in zip(part.inputs, part.labels, strict=True)]
  assert sorted(itertools.chain(*map(key, splits.values()))) == sorted(key(split))
  again = pathfinder.load(str(tmp_path), seed=5, max_corrupt=1)  # not from the cache
  assert [key(part) for part in again.values()] == [key(part) for part in splits.values()]


def zero_bytes(path):
  path.write_bytes(b"")


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-60])


def with_alpha(path):
  Image.open(path).convert("LA").save(path)


def in_colour(path):
  Image.open(path).convert("RGB").save(path)


def in_16_bit(path):
  Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(path)


def too_large(path):
  Image.open(path).resize((64, 64)).save(path)


def a_jpeg(path):
  Image.open(path).save(path, format="jpeg")


@pytest.mark.parametrize(
  ("damage", "why"),
  [
    (os.remove, "FileNotFoundError"),
    (zero_bytes, "UnidentifiedImageError"),
    (cut_off, "OSError|SyntaxError"),
    (with_alpha, "it is PNG LA of 32 × 32"),
    (in_colour, "it is PNG RGB"),
    (in_16_bit, "it is PNG I;16"),
    (too_large, "it is PNG L of 64 × 64"),
    (a_jpeg, "it is JPEG"),
  ],
)
def test_bad_pictures_are_named_or_left_out(tree, tmp_path, capsys, damage, why):
  folder, split = tree
  path = folder / "imgs/2/sample_7.png"
  damage(path)
  message = rf"^{re.escape(str(path))}: not an 8-bit grey PNG of 32 × 32 px \([^\n]*({why})[^\n]*max_corrupt=0[^\n]*$"
  with pytest.raises(errors.UserError, match=message):
    pathfinder.load(str(tmp_path))
  ours = pathfinder.read_tree(folder, 32, max_corrupt=1)
  np.testing.assert_array_equal(ours.inputs, np.delete(split.inputs, 47, axis=0))
  np.testing.assert_array_equal(ours.labels, np.delete(split.labels, 47))
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"warning: {path} left out (")


@pytest.mark.parametrize(
  "line",
  [
    "imgs/0 sample_1.png 1 2 1.0 14",
    "imgs/0 sample_1.png 1",
    "",
    "imgs/0 sample_1.jpg 1 1 1.0",
    "imgs/0 ../../secret.png 1 1 1.0",
    "/etc sample_1.png 1 1 1.0",
  ],
)
def test_bad_metadata_are_named(tree, tmp_path, line):
  path = tree[0] / "metadata/0.npy"
  lines = path.read_text().splitlines()
  lines[4] = line
  path.write_text("\n".join(lines))
  with pytest.raises(errors.UserError, match=f"^{re.escape(str(path))}:5: '[^\n]*the label, 0 or 1[^\n]*$"):
    pathfinder.load(str(tmp_path))


def test_other_bad_trees_are_named(tree, tmp_path):
  folder, _ = tree
  np.save(folder / "metadata/0.npy", np.array([["imgs/0", "\xff"]]))  # what its name promises
  with pytest.raises(errors.UserError, match=r"metadata/0\.npy: not lines of text \(UnicodeDecodeError[^\n]*$"):
    pathfinder.load(str(tmp_path))
  with pytest.raises(errors.UserError, match=r"curv_baseline: no metadata/<number>\.npy; expected [^\n]*pathfinder32"):
    pathfinder.load(str(tmp_path), contour_length=6)
  for path in folder.glob("metadata/*"):
    path.write_text("")
  with pytest.raises(errors.UserError, match="name no readable picture"):
    pathfinder.load(str(tmp_path))
  shutil.rmtree(folder / "metadata")
  with pytest.raises(errors.UserError, match=r"curv_contour_length_14: no metadata"):
    pathfinder.load(str(tmp_path))


def test_second_start_reads_the_cache(tree, tmp_path, monkeypatch):
  folder, _ = tree
  first = pathfinder.load(str(tmp_path))
  monkeypatch.setattr(pathfinder, "read_tree", None)
  for name, split in pathfinder.load(str(tmp_path)).items():
    np.testing.assert_array_equal(split.inputs, first[name].inputs)
    np.testing.assert_array_equal(split.labels, first[name].labels)
  (folder / "metadata/0.npy").write_text("")  # another source
  with pytest.raises(TypeError, match="NoneType"):
    pathfinder.load(str(tmp_path))
