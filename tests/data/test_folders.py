"""Folders of pictures and Tiny ImageNet's original layout: what is read, and what is refused in one line."""

import io
import os
import pathlib
import shutil

import machine
import numpy as np
import pytest
from PIL import Image

from lra_jax import errors
from lra_jax.data import folders, sources

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
  return folder


def save(path, level, size=(6, 4), mode="RGB"):
  """A picture all of one grey level, which tells where it came from."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", size, level).convert(mode).save(path)


@pytest.fixture
def pets(tmp_path):
  """Two classes, of which one sorts differently in capitals, in train and val."""
  root = tmp_path / "pets"
  save(root / "train" / "cat" / "b.png", 10)
  save(root / "train" / "cat" / "a.JPG", 20, (8, 8))
  save(root / "train" / "cat" / "c.webp", 30, (4, 9))
  save(root / "train" / "Dog" / "1.jpeg", 40, (5, 5), "L")
  save(root / "val" / "cat" / "z.png", 50)
  save(root / "val" / "Dog" / "z.PNG", 60, mode="RGBA")
  for other in ("train/README", "train/cat/notes.txt", "train/cat/._a.jpg", "train/.DS_Store", "val/cat/.hidden.png"):
    (root / other).write_bytes(b"not a picture")
  (root / "train" / ".thumbnails").mkdir()
  (root / "train" / "cat" / "more.png").mkdir()
  return root


def assert_levels(split, levels):
  """Every picture is of its one level, but for what JPEG and WebP lose."""
  np.testing.assert_allclose(
    split.inputs, np.broadcast_to(np.reshape(levels, (-1, 1, 1, 1)), split.inputs.shape), atol=2
  )


def test_folder_is_read_by_class_then_name(pets):
  splits = folders.folder(pets, 4)
  assert list(splits) == ["train", "test"] and folders.class_names(pets) == ("Dog", "cat")
  assert splits["train"].inputs.shape == (4, 4, 4, 3) and splits["train"].inputs.dtype == np.uint8
  assert_levels(splits["train"], [40, 20, 10, 30])
  assert splits["train"].labels.tolist() == [0, 1, 1, 1] and splits["train"].labels.dtype == np.int32
  assert_levels(splits["test"], [60, 50])
  assert splits["test"].labels.tolist() == [0, 1]
  grey = folders.folder(pets, 4, channels=1)
  assert grey["train"].inputs.shape == (4, 4, 4, 1)
  assert_levels(grey["train"], [40, 20, 10, 30])


def test_test_folder_makes_val_the_validation(pets):
  save(pets / "test" / "cat" / "t.png", 70)
  save(pets / "test" / "Dog" / "t.png", 80)
  splits = folders.folder(pets, 4)
  assert {name: split.inputs[:, 0, 0, 0].tolist() for name, split in splits.items() if name != "train"} == {
    "validation": [60, 50],
    "test": [80, 70],
  }
  shutil.rmtree(pets / "val")
  assert list(folders.folder(pets, 4)) == ["train", "test"]


def test_second_load_decodes_nothing_until_a_file_changes(pets, monkeypatch):
  first = folders.folder(pets, 4)
  decode = folders.decode
  monkeypatch.setattr(folders, "decode", None)
  for ours, truth in zip(folders.folder(pets, 4)["train"], first["train"], strict=True):
    np.testing.assert_array_equal(ours, truth)
  monkeypatch.setattr(folders, "decode", decode)
  save(pets / "train" / "cat" / "b.png", 11)
  os.utime(pets / "train" / "cat" / "b.png", ns=(0, 1))
  assert_levels(folders.folder(pets, 4)["train"], [40, 20, 11, 30])
  save(pets / "train" / "cat" / "bb.png", 99)
  assert_levels(folders.folder(pets, 4)["train"], [40, 20, 11, 99, 30])
  (pets / "train" / "cat" / "bb.png").unlink()
  (pets / "train" / "Dog").rename(pets / "train" / "zebra")
  (pets / "val" / "Dog").rename(pets / "val" / "zebra")
  assert folders.folder(pets, 4)["train"].labels.tolist() == [0, 0, 0, 1]
  assert folders.folder(pets, 5)["train"].inputs.shape == (4, 5, 5, 3)


def empty_class(root):
  (root / "train" / "Dog" / "1.jpeg").unlink()
  return r"train/Dog: class folder without pictures \(\.jpeg, \.jpg, \.png, \.webp\)"


def class_missing_in_val(root):
  shutil.rmtree(root / "val" / "Dog")
  return r"train/Dog: class of train that val lacks \(1 such\)[^\n]*add [^\n]*val/Dog or remove"


def class_missing_in_train(root):
  save(root / "val" / "mouse" / "a.png", 0)
  return r"val/mouse: class of val that train lacks \(1 such\)[^\n]*add [^\n]*train/mouse or remove"


def no_train(root):
  (root / "train").rename(root / "training")
  return "train: does not exist; expected a folder with one folder for each class"


def no_val(root):
  (root / "val").rename(root / "validation")
  return "val: does not exist; expected a folder with one folder for each class"


def no_folder(root):
  shutil.rmtree(root)
  return "pets: does not exist; expected a folder with train/<class>"


def a_file(root):
  shutil.rmtree(root)
  root.write_text("")
  return "pets: is a file; expected a folder"


def pictures_without_classes(root):
  for name in ("cat", "Dog"):
    shutil.rmtree(root / "train" / name)
  save(root / "train" / "a.png", 0)
  return "train: no class folders; expected train/<class>"


def other_layout(root):
  (root / "wnids.txt").write_text("")
  return "pets: this is the layout of Tiny ImageNet [^\n]*take the task tiny_imagenet"


def zero_bytes(root):
  (root / "train" / "cat" / "b.png").write_bytes(b"")
  return "1 of 6 pictures cannot be read, more than max_corrupt=0; the first: [^\n]*train/cat/b.png: file of zero bytes"


def cut_off(root):
  path = root / "val" / "cat" / "z.png"
  os.truncate(path, path.stat().st_size // 2)
  return "1 of 6 pictures cannot be read, [^\n]*val/cat/z.png: cannot be decoded"


def no_picture(root):
  (root / "val" / "cat" / "z.png").write_text("<html>")
  return "1 of 6 pictures cannot be read, [^\n]*val/cat/z.png: cannot be decoded"


def lost_link(root):
  (root / "val" / "cat" / "link.png").symlink_to(root / "nowhere.png")
  return "1 of 7 pictures cannot be read, [^\n]*link.png: cannot be read .No such file"


@pytest.mark.parametrize(
  "damage",
  [
    empty_class,
    class_missing_in_val,
    class_missing_in_train,
    no_train,
    no_val,
    no_folder,
    a_file,
    pictures_without_classes,
    other_layout,
    zero_bytes,
    cut_off,
    no_picture,
    lost_link,
  ],
)
def test_bad_folders_are_refused_in_one_line(pets, empty_cache, damage):
  message = damage(pets)
  with pytest.raises(errors.UserError, match=rf"^[^\n]*{message}[^\n]*$"):
    folders.folder(pets, 4)
  assert not list(empty_cache.rglob("*"))


def test_folder_that_may_not_be_read_is_named():
  with machine.open_folder() as root:
    for split in ("train", "val"):
      save(root / split / "cat" / "a.png", 0)
    for path in (root / "train" / "cat", root / "train", root):
      path.chmod(0)
      with machine.plain_user(), pytest.raises(errors.UserError) as refusal:
        folders.folder(root, 4)
      assert str(refusal.value).startswith(f"{path}: cannot be read (Permission denied); ")
      assert "\n" not in str(refusal.value)


def test_pictures_that_cannot_be_read_are_named_counted_and_left_out(pets, empty_cache, capsys):
  zero_bytes(pets)
  no_picture(pets)
  for _ in range(2):  # each start names them: what leaves some out is not cached
    splits = folders.folder(pets, 4, max_corrupt=2)
    assert_levels(splits["train"], [40, 20, 30])
    assert splits["train"].labels.tolist() == [0, 1, 1]
    assert_levels(splits["test"], [60])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
      str(pets / "train/cat/b.png"),
      str(pets / "val/cat/z.png"),
      str(pets),
    ]
    assert all(line.startswith("warning: ") for line in lines) and lines[0].endswith("; skipped")
    assert not list(empty_cache.rglob("*"))
  with pytest.raises(errors.UserError, match=r"^2 of 6 pictures cannot be read, more than max_corrupt=1; the first: "):
    folders.folder(pets, 4, max_corrupt=1)
  (pets / "val" / "Dog" / "z.PNG").write_bytes(b"")
  with pytest.raises(errors.UserError, match=r"val/Dog: no picture of split 'test' can be read$"):
    folders.folder(pets, 4, max_corrupt=9)


def test_order_is_kept_by_threads(tmp_path, monkeypatch):
  monkeypatch.setattr(folders, "_CHUNK", 2)
  files = []
  for number in range(21):
    save(tmp_path / f"{number}.png", number)
    files.append((str(tmp_path / f"{number}.png"), number))
  (tmp_path / "9.png").write_bytes(b"")
  split, failed = folders.decode(files, 3)
  rest = [number for number in range(21) if number != 9]
  assert split.labels.tolist() == split.inputs[:, 1, 1, 2].tolist() == rest
  assert [str(error).split(":")[0] for error in failed] == [str(tmp_path / "9.png")]


def test_command_ends_with_one_line(pets, refused, tmp_path):
  zero_bytes(pets)
  line = refused("lra_jax.data.show", f"folder:{pets}", "--out", tmp_path / "sheet.png")
  assert f"{pets}/train/cat/b.png: file of zero bytes" in line and not (tmp_path / "sheet.png").exists()


def jpeg(level, mode="RGB", size=64):
  buffer = io.BytesIO()
  Image.new("L", (size, size), level).convert(mode).save(buffer, "JPEG", quality=95)
  return buffer.getvalue()


WNIDS = ("n02", "n01", "n03")  # the labels are in this order


@pytest.fixture
def tiny(tmp_path):
  """Three classes, one picture in four grey, with files as the archive has them."""
  root = tmp_path / "tiny-imagenet-200"
  root.mkdir()
  (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
  (root / "words.txt").write_text(
    "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbell toad\nn03\tcrane\nn04\tcrane\n"
  )
  for label, wnid in enumerate(WNIDS):
    images = root / "train" / wnid / "images"
    images.mkdir(parents=True)
    for number in range(4):
      (images / f"{wnid}_{number}.JPEG").write_bytes(jpeg(50 * label + number, "L" if number == 1 else "RGB"))
    (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
  images = root / "val" / "images"
  images.mkdir(parents=True)
  lines = []
  for number, wnid in enumerate(["n03", "n01", "n02", "n01"]):
    (images / f"val_{number}.JPEG").write_bytes(jpeg(200 + number))
    lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
  (root / "val" / "val_annotations.txt").write_text("".join(lines))
  (root / "test" / "images").mkdir(parents=True)
  (root / "test" / "images" / "test_0.JPEG").write_bytes(jpeg(255))
  return root


@pytest.mark.parametrize("above", [False, True])
def test_original_layout_of_tiny_imagenet(tiny, above, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tiny.parent if above else tiny))
  splits = sources.tiny_imagenet()
  assert sources.tiny_imagenet_names() == ("bell toad", "goldfish", "crane")
  assert {name: split.inputs.shape for name, split in splits.items()} == {
    "train": (12, 64, 64, 3),
    "test": (4, 64, 64, 3),
  }
  assert_levels(splits["train"], [50 * label + number for label in range(3) for number in range(4)])
  assert splits["train"].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
  assert_levels(splits["test"], [202, 201, 203, 200])  # by class, then by name
  assert splits["test"].labels.tolist() == [0, 1, 1, 2]
  assert sources.tiny_imagenet(size=8)["test"].inputs.shape == (4, 8, 8, 3)


@pytest.mark.parametrize(
  ("file", "content", "message"),
  [
    ("wnids.txt", b"", "tiny-imagenet-200: wnids.txt names no class; unpack it anew"),
    ("wnids.txt", b"n01\nn01\n", "tiny-imagenet-200: wnids.txt names a class twice"),
    ("wnids.txt", b"n01\n../../etc\n", "tiny-imagenet-200: wnids.txt names '../../etc', expected ids such as"),
    ("wnids.txt", b"\xff\xfe\x00", "wnids.txt: cannot be read .UnicodeDecodeError"),
    ("wnids.txt", b"n01\nn04\n", "train/n04/images: does not exist"),
    ("words.txt", b"n01\tgoldfish\n", "words.txt has no line for n02 of wnids.txt"),
    ("words.txt", b"n01\t\xe9\n", "words.txt: cannot be read .UnicodeDecodeError"),
    ("words.txt", None, "words.txt: cannot be read .FileNotFoundError"),
    ("val/val_annotations.txt", None, "val_annotations.txt: cannot be read .FileNotFoundError"),
    ("val/val_annotations.txt", b"\xff", "val_annotations.txt: cannot be read .UnicodeDecodeError"),
    ("val/val_annotations.txt", b"val_0.JPEG\tn99\n", "val_annotations.txt, line 1: 'val_0.JPEG.*expected a file name"),
    ("val/val_annotations.txt", b"val_0.JPEG n01\n", "val_annotations.txt, line 1: 'val_0.JPEG n01', expected a file"),
    ("val/val_annotations.txt", b"../../a.JPEG\tn01\n", "line 1: '../../a.JPEG.*expected a file name"),
    ("val/val_annotations.txt", b"val_0.JPEG\tn01\n", r"val_1.JPEG: is not named in [^\n]*\(3 such\); unpack"),
    ("val/images/val_2.JPEG", None, r"val_2.JPEG: is named in [^\n]*annotations.txt and missing \(1 such\); unpack"),
    ("train/n02/images/n02_3.JPEG", b"", "1 of 16 pictures cannot be read, [^\n]*n02_3.JPEG: file of zero bytes"),
  ],
)
def test_damaged_layout_is_refused_in_one_line(tiny, empty_cache, file, content, message):
  if content is None:
    (tiny / file).unlink()
  else:
    (tiny / file).write_bytes(content)
  with pytest.raises(errors.UserError, match=rf"^[^\n]*{message}[^\n]*$"):
    folders.tiny_imagenet(tiny)
  assert not list(empty_cache.rglob("*"))


def test_layout_in_part_is_refused_in_one_line(tiny):
  for folder, message in (
    ("train/n03/images", "does not exist; expected a folder with its pictures, of a class of wnids.txt"),
    ("val/images", "does not exist; expected a folder with the pictures of val_annotations.txt"),
  ):
    shutil.move(tiny / folder, tiny / "away")
    with pytest.raises(errors.UserError, match=rf"^{tiny / folder}: {message}$"):
      folders.tiny_imagenet(tiny)
    shutil.move(tiny / "away", tiny / folder)
  for path in (tiny / "train" / "n03" / "images").iterdir():
    path.unlink()
  with pytest.raises(
    errors.UserError, match=r"train/n03/images: no pictures of a class of wnids.txt; unpack tiny-imagenet-200.zip anew$"
  ):
    folders.tiny_imagenet(tiny)


@pytest.mark.skipif(not (SHARED / "imagenette-160").is_dir(), reason="Imagenette is not on this machine")
def test_real_imagenette_in_a_folder():
  splits = folders.folder(SHARED / "imagenette-160", 160)
  assert {name: split.inputs.shape for name, split in splits.items()} == {
    "train": (1000, 160, 160, 3),
    "test": (400, 160, 160, 3),
  }
  assert np.bincount(splits["train"].labels).tolist() == [100] * 10
  names = folders.class_names(SHARED / "imagenette-160")
  assert names[0] == "n01440764" and names[9] == "n03888257" and list(names) == sorted(names)
  listing = folders.list_files(SHARED / "imagenette-160").files["test"]
  for index in (0, 111, 399):
    path, label = listing[index]
    with Image.open(path) as image:
      np.testing.assert_array_equal(splits["test"].inputs[index], np.asarray(image.convert("RGB")))
    assert pathlib.Path(path).parent.name == names[label] and splits["test"].labels[index] == label


@pytest.mark.skipif(not (SHARED / "tiny-imagenet-200").is_dir(), reason="Tiny ImageNet is not on this machine")
def test_real_tiny_imagenet():
  splits = sources.tiny_imagenet(str(SHARED))
  assert splits["train"].inputs.shape == (2000, 64, 64, 3) and splits["test"].inputs.shape == (500, 64, 64, 3)
  assert np.bincount(splits["train"].labels).tolist() == [200] * 10
  assert np.bincount(splits["test"].labels).tolist() == [50] * 10
  names = sources.tiny_imagenet_names(str(SHARED))
  wnids = (SHARED / "tiny-imagenet-200" / "wnids.txt").read_text().split()
  assert len(names) == len(wnids) == 10
  assert names[wnids.index("n02124075")] == "Egyptian cat"
  grey = (splits["train"].inputs[..., :1] == splits["train"].inputs).all((1, 2, 3))
  assert 0 < grey.sum() < 100  # a few are greyscale JPEG files
