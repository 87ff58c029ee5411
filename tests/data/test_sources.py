"""CIFAR-100, MNIST, Fashion-MNIST and Tiny ImageNet from small archives of the published formats, without network."""

import functools
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import machine
import numpy as np
import pytest
from PIL import Image

from lra_jax import errors
from lra_jax.data import sources, tasks

pytestmark = pytest.mark.filterwarnings("ignore")  # TFDS's own
ROOT = pathlib.Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:9/"  # where nothing answers
NAMES = ("cifar100", "mnist", "fashion_mnist", "tiny_imagenet")
RANDOM = np.random.RandomState(0)


def integers(*shape, high=256):
  return RANDOM.randint(0, high, shape).astype(np.uint8)


def tar(members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as file:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


CIFAR100 = {"train": integers(30, 3074), "test": integers(12, 3074)}  # coarse label, fine label, three planes
for _records in CIFAR100.values():
  _records[:, 0] %= 20
  _records[:, 1] %= 100
CIFAR100_MEMBERS = {
  "coarse_label_names.txt": "".join(f"coarse{i}\n" for i in range(20)).encode(),
  "fine_label_names.txt": "".join(f"fine{i}\n" for i in range(100)).encode(),
  "train.bin": CIFAR100["train"].tobytes(),
  "test.bin": CIFAR100["test"].tobytes(),
}


def cifar100_files(**changes):
  members = {f"cifar-100-binary/{name}": content for name, content in (CIFAR100_MEMBERS | changes).items() if content}
  return {"cifar-100-binary.tar.gz": tar(members | {"../../escaped.txt": b"outside", "/tmp/escaped.txt": b"outside"})}


def idx(array):
  """The format of yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, the number of axes, their sizes, the values."""
  return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


MNIST = {
  name: {split: (integers(count, 28, 28), integers(count, high=10)) for split, count in (("train", 14), ("t10k", 6))}
  for name in ("mnist", "fashion_mnist")
}


def mnist_files(name, **changes):
  files = {}
  for split, arrays in MNIST[name].items():
    for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
      files[f"{split}-{kind}-ubyte.gz"] = gzip.compress(changes.get(f"{split}_{kind[:6]}", idx(array)))
  return files


def jpeg(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


WNIDS = [f"n{(7 * number) % 200:08d}" for number in range(200)]  # not in order
TINY = {}  # the members of the archive; every fourth picture is grey
for _number, _wnid in enumerate(sorted(WNIDS)):
  _pixels = np.kron(integers(8, 8, 3), np.ones((8, 8, 1), np.uint8))
  TINY[f"train/{_wnid}/images/{_wnid}_0.JPEG"] = jpeg(_pixels if _number % 4 else _pixels[..., 0])
  TINY[f"train/{_wnid}/{_wnid}_boxes.txt"] = f"{_wnid}_0.JPEG\t0\t0\t63\t63\n".encode()
TINY |= {f"val/images/val_{number}.JPEG": jpeg(integers(64, 64, 3)) for number in range(8)}
TINY["val/val_annotations.txt"] = "".join(
  f"val_{number}.JPEG\t{WNIDS[(31 * number) % 200]}\t0\t0\t9\t9\n" for number in range(8)
).encode()
TINY["wnids.txt"] = "\n".join(WNIDS).encode()
TINY["words.txt"] = "".join(f"{wnid}\tword of {wnid}, another\n" for wnid in sorted(WNIDS)).encode()
TINY["test/images/test_0.JPEG"] = jpeg(integers(64, 64, 3))


def tiny_files(**changes):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    for name, content in (TINY | changes).items():
      if content is not None:
        file.writestr(f"tiny-imagenet-200/{name}", content)
    file.writestr("tiny-imagenet-200/train/../../../escaped.txt", b"outside")
    file.writestr("../escaped.txt", b"outside")
  return {"tiny-imagenet-200.zip": buffer.getvalue()}


MAKE = {
  "cifar100": cifar100_files,
  "mnist": functools.partial(mnist_files, "mnist"),
  "fashion_mnist": functools.partial(mnist_files, "fashion_mnist"),
  "tiny_imagenet": tiny_files,
}
WHOLE = {name: make() for name, make in MAKE.items()}
VERSIONS = {"cifar100": "3.0.2", "mnist": "3.0.1", "fashion_mnist": "3.0.1", "tiny_imagenet": "1.0.0"}


def publish(patch, name, files, address=ADDRESS):
  """Lets the builders of a data set look for these files, of these sizes and checksums, at that address."""
  import tensorflow_datasets as tfds

  if name == "tiny_imagenet":
    (content,) = files.values()
    patch.setattr(sources, "_TINY_IMAGENET_URL", address + "tiny-imagenet-200.zip")
    patch.setattr(sources, "_TINY_IMAGENET_BYTES", len(content))
    patch.setattr(sources, "_TINY_IMAGENET_SHA256", hashlib.sha256(content).hexdigest())
    return
  original = getattr(
    tfds.image_classification, {"cifar100": "Cifar100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
  )
  patch.setattr(original, "url_infos", machine.url_infos(files, address))
  if name == "cifar100":
    published, url = original._cifar_info.fget, address + "cifar-100-binary.tar.gz"
    patch.setattr(original, "_cifar_info", property(lambda self: published(self)._replace(url=url)))
  else:
    patch.setattr(original, "URL", address)


def put(data_dir, files):
  manual = data_dir / "downloads" / "manual"
  manual.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (manual / name).write_bytes(content)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  monkeypatch.setenv("LRA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder in which all of them have been prepared from archives put there by hand; shared, so not to be changed."""
  folder = tmp_path_factory.mktemp("data")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LRA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in NAMES:  # MNIST and Fashion-MNIST have files of the same names
      publish(patch, name, WHOLE[name])
      put(folder, WHOLE[name])
      getattr(sources, name)(str(folder))
  assert "tensorflow" not in sys.modules
  assert not list(folder.parent.rglob("escaped*")) and not os.path.exists("/tmp/escaped.txt")
  return str(folder)


def pairs(split):
  return sorted((image.tobytes(), int(label)) for image, label in zip(split.inputs, split.labels, strict=True))


@pytest.mark.parametrize(("kind", "column"), [("fine", 1), ("coarse", 0)])
def test_cifar100(prepared, kind, column):
  splits = sources.cifar100(prepared, labels=kind)
  for name, records in CIFAR100.items():
    split = splits[name]
    assert split.inputs.dtype == np.uint8 and split.labels.dtype == np.int32 and split.lengths is None
    images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert split.inputs.shape == images.shape
    assert pairs(split) == sorted(zip(map(bytes, images), records[:, column].tolist(), strict=True))
  larger = sources.cifar100(prepared, labels=kind, size=48)["test"]
  assert larger.inputs.shape == (12, 48, 48, 3)
  np.testing.assert_array_equal(larger.labels, splits["test"].labels)
  with pytest.raises(ValueError, match="labels='both', expected 'fine' or 'coarse'"):
    sources.cifar100(prepared, labels="both")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(prepared, name):
  splits = getattr(sources, name)(prepared)
  for split, file in (("train", "train"), ("test", "t10k")):
    images, labels = MNIST[name][file]
    assert splits[split].inputs.shape == (*images.shape, 1) and splits[split].labels.dtype == np.int32
    assert pairs(splits[split]) == sorted(zip(map(bytes, images), labels.tolist(), strict=True))


def test_tiny_imagenet_is_the_same_from_tfds_and_from_its_own_layout(prepared, tmp_path):
  prefix = "tiny-imagenet-200/"
  with zipfile.ZipFile(io.BytesIO(WHOLE["tiny_imagenet"]["tiny-imagenet-200.zip"])) as file:
    file.extractall(tmp_path, [name for name in file.namelist() if name.startswith(prefix) and ".." not in name])
  layout, splits = sources.tiny_imagenet(str(tmp_path)), sources.tiny_imagenet(prepared)
  for name, count in (("train", 200), ("test", 8)):
    assert splits[name].inputs.shape == (count, 64, 64, 3)
    assert pairs(splits[name]) == pairs(layout[name])
  assert sources.tiny_imagenet_names(prepared) == sources.tiny_imagenet_names(str(tmp_path))
  grey = (splits["train"].inputs == splits["train"].inputs[..., :1]).all((1, 2, 3))
  assert grey.sum() == 50
  with Image.open(io.BytesIO(TINY["val/images/val_3.JPEG"])) as image:
    assert (np.asarray(image).tobytes(), 93) in pairs(splits["test"])  # 31 × 3, the place in wnids.txt
  assert sources.tiny_imagenet(prepared, size=16)["test"].inputs.shape == (8, 16, 16, 3)


@pytest.mark.parametrize("name", NAMES)
def test_downloaded_and_then_read_from_the_cache(name, tmp_path, monkeypatch):
  with machine.serve(WHOLE[name]) as address:
    publish(monkeypatch, name, WHOLE[name], address)
    first = getattr(sources, name)(str(tmp_path))
  monkeypatch.setattr(sources, "_read", None)
  again = getattr(sources, name)(str(tmp_path))
  for split in ("train", "test"):
    for ours, truth in zip(again[split], first[split], strict=True):
      np.testing.assert_array_equal(ours, truth)


def test_another_process_may_prepare_the_same_meanwhile(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  publish(monkeypatch, "mnist", WHOLE["mnist"])
  put(tmp_path, WHOLE["mnist"])
  prepare = tfds.core.GeneratorBasedBuilder._download_and_prepare
  others = []

  def prepare_late(self, *arguments, **keywords):
    if not others:
      others.append(None)
      others.append(sources.mnist(str(tmp_path)))
    return prepare(self, *arguments, **keywords)

  monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, "_download_and_prepare", prepare_late)
  ours = sources.mnist(str(tmp_path))
  np.testing.assert_array_equal(ours["train"].inputs, others[1]["train"].inputs)
  assert [path.name for path in (tmp_path / "mnist").iterdir()] == [VERSIONS["mnist"]]


def files_below(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def half(content):
  return content[: len(content) // 2]


def altered(content):
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [half, altered])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_archive_put_there_by_hand_is_named(name, damage, tmp_path, monkeypatch):
  publish(monkeypatch, name, WHOLE[name])
  bad = list(WHOLE[name])[-1]
  put(tmp_path, WHOLE[name] | {bad: damage(WHOLE[name][bad])})
  before = files_below(tmp_path)
  with pytest.raises(errors.UserError) as refusal:
    getattr(sources, name)(str(tmp_path))
  message = str(refusal.value)
  assert message.startswith(f"{tmp_path / 'downloads' / 'manual' / bad}: ") and "\n" not in message
  assert f"expected {len(WHOLE[name][bad]):,} and {hashlib.sha256(WHOLE[name][bad]).hexdigest()}" in message
  assert "remove it, and put http" in message
  assert files_below(tmp_path) == before and not (tmp_path / name).exists()


@pytest.mark.parametrize("damage", [half, altered])
def test_damaged_download_is_named_and_leaves_nothing(damage, tmp_path, monkeypatch):
  files = dict(WHOLE["cifar100"])
  with machine.serve(files) as address:
    publish(monkeypatch, "cifar100", files, address)
    files["cifar-100-binary.tar.gz"] = damage(files["cifar-100-binary.tar.gz"])
    with pytest.raises(errors.UserError, match=r"^cifar100 in [^\n]*: not prepared, and preparing it failed[^\n]*$"):
      sources.cifar100(str(tmp_path))
    assert not files_below(tmp_path) and not list(tmp_path.rglob("*.tmp.*"))
    files.update(WHOLE["cifar100"])
    assert len(sources.cifar100(str(tmp_path))["test"].labels) == 12


def test_without_network_the_line_says_what_to_do(tmp_path, monkeypatch):
  for name in NAMES:
    publish(monkeypatch, name, WHOLE[name])
    with pytest.raises(errors.UserError) as refusal:
      getattr(sources, name)(str(tmp_path / "missing"))
    message = str(refusal.value)
    assert message.startswith(f"{name} in {tmp_path / 'missing'}: not prepared") and "\n" not in message
    assert all(ADDRESS + file in message for file in WHOLE[name]) and "set TFDS_DATA_DIR or --config" in message
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "changes", "reason"),
  [
    ("cifar100", {"test.bin": None}, "KeyError"),
    ("cifar100", {"train.bin": CIFAR100_MEMBERS["train.bin"][:-9]}, "ValueError"),
    ("cifar100", {"fine_label_names.txt": b"\xff\xfe"}, "UnicodeDecodeError"),
    ("cifar100", {"test.bin": bytes([3, 100]) + bytes(3072)}, "Failed to encode example"),
    ("mnist", {"t10k_labels": idx(np.array([10] * 6, np.uint8))}, "Failed to encode example"),
    ("mnist", {"t10k_labels": idx(np.zeros(5, np.uint8))}, "ValueError"),
    ("mnist", {"train_images": idx(MNIST["mnist"]["train"][0])[:-9]}, "ValueError"),
    ("mnist", {"train_images": b"<html>404"}, "train-images-idx3-ubyte.gz is no IDX file"),
    ("mnist", {"train_images": b""}, "train-images-idx3-ubyte.gz is no IDX file"),
    ("tiny_imagenet", {"words.txt": None}, "KeyError"),
    ("tiny_imagenet", {"wnids.txt": b"\xff"}, "UnicodeDecodeError"),
    ("tiny_imagenet", {"val/val_annotations.txt": b"val_0.JPEG\tn99\n"}, "line 1: 'val_0.JPEG"),
    ("tiny_imagenet", {"val/val_annotations.txt": b"../../a\tn00000000\n"}, "line 1: '../../a"),
    ("tiny_imagenet", {"val/images/val_7.JPEG": None}, "KeyError"),
  ],
)
def test_archive_with_other_content_is_named_and_nothing_is_half_prepared(name, changes, reason, tmp_path, monkeypatch):
  files = MAKE[name](**changes)
  publish(monkeypatch, name, files)
  put(tmp_path, files)
  before = files_below(tmp_path)
  with pytest.raises(errors.UserError, match=rf"^[^\n]*{tmp_path}[^\n]*{reason}[^\n]*$"):
    getattr(sources, name)(str(tmp_path))
  assert files_below(tmp_path) == before


def test_picture_that_cannot_be_decoded_is_named(tmp_path, monkeypatch):
  files = tiny_files(**{"val/images/val_7.JPEG": b""})
  publish(monkeypatch, "tiny_imagenet", files)
  put(tmp_path, files)
  message = r"^tiny_imagenet in [^\n]*: split 'validation' cannot be read [^\n]*example \d: file of zero bytes[^\n]*$"
  with pytest.raises(errors.UserError, match=message):
    sources.tiny_imagenet(str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "tiny_imagenet"])
def test_records_cut_off_or_missing_are_named(name, tmp_path, monkeypatch):
  publish(monkeypatch, name, WHOLE[name])
  put(tmp_path, WHOLE[name])
  getattr(sources, name)(str(tmp_path))
  (file,) = tmp_path.glob(f"{name}/*/{name}-train.array_record*")
  message = rf"^{name} in [^\n]*: split 'train' cannot be read \([^\n]*remove the folder[^\n]*$"
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(errors.UserError, match=message):
    getattr(sources, name)(str(tmp_path))
  file.write_bytes(b"")
  with pytest.raises(errors.UserError, match=message):
    getattr(sources, name)(str(tmp_path))
  file.unlink()
  with pytest.raises(errors.UserError, match=message):
    getattr(sources, name)(str(tmp_path))


def test_full_disk_leaves_nothing_half_prepared(tmp_path, monkeypatch):
  """While the archive is downloaded, then while records are written."""
  files = WHOLE["tiny_imagenet"]
  for where in ("download", "records"):
    with machine.serve(files) as address:
      publish(monkeypatch, "tiny_imagenet", files, address)
      if where == "records":
        put(tmp_path, files)
      before = files_below(tmp_path)
      with machine.file_limit(100_000), pytest.raises(errors.UserError) as refusal:
        sources.tiny_imagenet(str(tmp_path))
      assert str(refusal.value).startswith(f"tiny_imagenet in {tmp_path}: not prepared, and preparing it failed (")
      assert "\n" not in str(refusal.value)
      assert files_below(tmp_path) == before and not list(tmp_path.rglob("*.tmp.*"))
  assert len(sources.tiny_imagenet(str(tmp_path))["train"].labels) == 200


def test_folder_without_rights_is_named(monkeypatch):
  publish(monkeypatch, "mnist", WHOLE["mnist"])
  with machine.open_folder() as folder:
    put(folder, WHOLE["mnist"])
    folder.chmod(0o555)
    with machine.plain_user(), pytest.raises(errors.UserError, match=r"^mnist in [^\n]*Permission denied[^\n]*$"):
      sources.mnist(str(folder))
    folder.chmod(0)
    for load in (sources.mnist, sources.tiny_imagenet, sources.imagenette):
      with machine.plain_user(), pytest.raises(errors.UserError, match=rf"^[^\n]*{folder}[^\n]*$"):
        load(str(folder))


def test_other_formats_and_missing_splits_are_named(prepared, tmp_path):
  folder = tmp_path / "mnist" / VERSIONS["mnist"]
  shutil.copytree(os.path.join(prepared, "mnist", VERSIONS["mnist"]), folder)
  info = folder / "dataset_info.json"
  whole = info.read_text()
  info.write_text(whole.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(errors.UserError, match=r"cannot be opened [^\n]*must be prepared as array_record[^\n]*$"):
    sources.mnist(str(tmp_path))
  info.write_text(whole[:-40])
  with pytest.raises(errors.UserError, match=rf"^[^\n]*{tmp_path}[^\n]*$"):
    sources.mnist(str(tmp_path))
  info.write_text(whole.replace('"name": "test"', '"name": "dev"'))
  with pytest.raises(errors.UserError, match=r"has no split 'test', only [^\n]*dev[^\n]*prepare it anew and whole$"):
    sources.mnist(str(tmp_path))


@pytest.mark.parametrize(
  ("load", "says"),
  [
    (sources.imagenette, "`tfds build imagenette/160px-v2 --data_dir="),
    (functools.partial(sources.imagenette, variant="full-size-v2"), "`tfds build imagenette/full-size-v2 --data_dir="),
    (sources.imagenet2012, "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org"),
  ],
)
def test_what_only_tensorflow_prepares_says_how(load, says, tmp_path):
  with pytest.raises(errors.UserError, match=rf"^imagenet[^\n]* in {tmp_path}: not prepared there; [^\n]*$") as refusal:
    load(str(tmp_path))
  assert says in str(refusal.value) and "pip install tensorflow" in str(refusal.value)
  assert "tensorflow" not in sys.modules and not list(tmp_path.iterdir())


def test_unknown_variant_of_imagenette():
  with pytest.raises(errors.UserError, match="variant of imagenette: '160px' does not exist; did you mean '160px-v2'"):
    sources.imagenette(variant="160px")


def test_imagenette_of_tfds_is_resized(tmp_path, monkeypatch):
  """Prepared by TFDS's own class, its generator replaced; pictures of several sizes, JPEG and one in CMYK."""
  import tensorflow_datasets as tfds

  builder = tfds.builder("imagenette/160px-v2", data_dir=tmp_path, file_format="array_record")
  pictures = {f"{number}.JPEG": integers(40 + number, 60, 3) // 8 + 30 * number for number in range(5)}

  def generate(self):
    for number, (name, pixels) in enumerate(pictures.items()):
      content = io.BytesIO(jpeg(pixels))
      if number == 4:
        content = io.BytesIO()
        Image.fromarray(pixels).convert("CMYK").save(content, "JPEG")
        content.seek(0)
      yield name, {"image": content, "label": "n03888257" if number else "n01440764"}

  monkeypatch.setattr(
    type(builder), "_split_generators", lambda self, manager: {"train": generate(self), "validation": generate(self)}
  )
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  splits = sources.imagenette(str(tmp_path), size=24)
  assert list(splits) == ["train", "test"] and splits["train"].inputs.shape == (5, 24, 24, 3)
  means = {round(float(split_mean)): label for split_mean, label in zip(
    splits["test"].inputs.mean((1, 2, 3)), splits["test"].labels, strict=True)}  # fmt: skip
  truth = {round(float(pixels.mean())): 9 if number else 0 for number, pixels in enumerate(pictures.values())}
  assert sorted(means.values()) == sorted(truth.values())
  for (ours, label), (theirs, expected) in zip(sorted(means.items()), sorted(truth.items()), strict=True):
    assert abs(ours - theirs) <= 2 and label == expected


REAL = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "data" / "tfds")


@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="CIFAR-100 is not on this machine")
def test_real_cifar100():
  """Every superclass holds five classes, as its web page says, and names are those of the task."""
  import tensorflow_datasets as tfds

  splits = sources.cifar100(str(REAL))
  builder = tfds.builder("cifar100", data_dir=REAL)
  for name in ("train", "test"):
    assert splits[name].inputs.shape == (builder.info.splits[name].num_examples, 32, 32, 3)
  raw = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})
  fine, coarse = np.array([(example["label"], example["coarse_label"]) for example in raw]).T
  np.testing.assert_array_equal(splits["test"].labels, fine)
  held = {label: set(fine[coarse == label]) for label in range(20)}
  assert [len(held[label]) for label in range(20)] == [5] * 20 and len(set.union(*held.values())) == 100
  names = tasks.get("cifar100").class_names
  aquatic = tasks.get("cifar100_coarse").class_names.index("aquatic_mammals")
  assert {names[label] for label in held[aquatic]} == {"beaver", "dolphin", "otter", "seal", "whale"}


def test_neither_tfds_nor_pillow_is_imported_before_it_is_needed():
  code = (
    "import sys, lra_jax.data.folders, lra_jax.data.tasks; "
    "print([m for m in ('tensorflow', 'tensorflow_datasets', 'torch', 'PIL', 'grain') if m in sys.modules])"
  )
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
