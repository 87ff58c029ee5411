"""IMDb reviews: an archive of the published layout over HTTP, prepared without TensorFlow, and the real data."""

import io
import os
import pathlib
import sys
import tarfile

import machine
import numpy as np
import pytest

from lra_jax import errors
from lra_jax.data import text

ROOT = pathlib.Path(__file__).parents[2]
REVIEWS = {
  "train": {
    "pos": [b"Good.", b" trailing blank \n", "Très bien – 映画".encode()],
    "neg": [b"Bad", b"\xff\x00\xfe"],
  },
  "test": {"pos": [b"x" * 5000], "neg": [b"no", b"<br />y"]},
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
  return folder


def test_bytes_are_tokens():
  texts = ["é!".encode(), b"", bytes(range(256)), b"abcdef" * 100]
  ids, lengths = text.encode(texts, 300)
  assert ids.shape == (4, 300) and ids.dtype == np.uint16 and lengths.dtype == np.int32
  assert lengths.tolist() == [3, 1, 256, 300]
  assert ids[0, :4].tolist() == [0xC3 + 1, 0xA9 + 1, 0x21 + 1, 0]
  assert ids[1, :2].tolist() == [33, 0]
  np.testing.assert_array_equal(ids[2, :256], np.arange(1, 257))
  np.testing.assert_array_equal(ids > 0, np.arange(300) < lengths[:, None])
  assert ids.max() < text.VOCAB_SIZE
  assert text.decode(ids[0]) == "é!" and text.decode(ids[3]) == "abcdef" * 50
  assert text.decode(text.encode(["é".encode()], 1)[0][0]) == "�"


@pytest.fixture(scope="module")
def archive():
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as tar:

    def add(name, content=None, kind=tarfile.REGTYPE, link=""):
      info = tarfile.TarInfo(name)
      info.type, info.linkname, info.size = kind, link, len(content or b"")
      tar.addfile(info, io.BytesIO(content) if content is not None else None)

    add("aclImdb", kind=tarfile.DIRTYPE)
    add("aclImdb/README", b"about")
    for split, classes in REVIEWS.items():
      for name, reviews in classes.items():
        add(f"aclImdb/{split}/{name}", kind=tarfile.DIRTYPE)
        for number, review in enumerate(reviews):
          add(f"aclImdb/{split}/{name}/{number}_{9 if name == 'pos' else 2}.txt", review)
    add("aclImdb/train/unsup/0_0.txt", b"Who knows")
    add("aclImdb/train/urls_pos.txt", b"http://")
    # None of these may become a file or an example.
    add("../escaped.txt", b"outside")
    add("aclImdb/train/pos/../../../../escaped.txt", b"outside")
    add("/tmp/aclImdb/train/pos/0_9.txt", b"absolute")
    add("aclImdb/train/pos/7_9.txt", kind=tarfile.SYMTYPE, link="/etc/passwd")
  return buffer.getvalue()


@pytest.fixture
def server(archive, monkeypatch):
  """Serves the archive on localhost and points TFDS's size and checksum there; yields what it serves, to be changed."""
  import tensorflow_datasets as tfds

  files = {"aclImdb_v1.tar.gz": archive}
  with machine.serve(files) as address:
    monkeypatch.setattr(tfds.builder_cls("imdb_reviews"), "url_infos", machine.url_infos(files, address))
    yield files


def contents(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.filterwarnings("ignore")  # TFDS's own
def test_archive_is_downloaded_prepared_and_read_without_tensorflow(server, tmp_path):
  folder = tmp_path / "a" / "b" / "data"
  splits = text.load(str(folder), max_length=1000, validation="test")
  assert "tensorflow" not in sys.modules
  for name, classes in REVIEWS.items():
    split = splits[name]
    assert split.inputs.shape[1] == 1000 and split.labels.dtype == np.int32
    found = sorted(
      (bytes((row[:length] - 1).astype(np.uint8)), label)
      for row, length, label in zip(split.inputs, split.lengths, split.labels, strict=True)
    )
    truth = [(review.strip()[:1000], int(label == "pos")) for label in classes for review in classes[label]]
    assert found == sorted(truth)
  assert splits["validation"] is splits["test"]
  assert contents(tmp_path / "a")[:2] == ["b", "b/data"] and not list(tmp_path.rglob("escaped*"))
  again = text.load(str(folder), max_length=1000)
  assert list(again) == ["train", "test"]
  np.testing.assert_array_equal(again["train"].inputs, splits["train"].inputs)


@pytest.mark.filterwarnings("ignore")
def test_order_is_that_of_tfds_own_builder(server, tmp_path, monkeypatch):
  """TFDS shuffles by a hash of the key; its own generator, fed without its extractor, gives the same order."""
  import tensorflow_datasets as tfds

  ours = text.load(str(tmp_path / "ours"))["train"]
  original = tfds.builder_cls("imdb_reviews")

  def members(manager, path):
    with tarfile.open(path) as tar:
      for member in tar:
        if member.isfile() and ".." not in member.name:
          yield member.name, tar.extractfile(member)

  module = sys.modules[original.__module__]
  monkeypatch.setattr(module, "_DOWNLOAD_URL", next(iter(original.url_infos)))
  monkeypatch.setattr(tfds.download.DownloadManager, "iter_archive", members)
  builder = original(data_dir=tmp_path / "theirs", file_format="array_record")
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  theirs = list(builder.as_data_source("train"))
  assert [example["label"] for example in theirs] == ours.labels.tolist()
  assert [example["text"].decode("latin-1") for example in theirs] == [
    bytes((row[row > 0] - 1).astype(np.uint8)).decode("latin-1") for row in ours.inputs
  ]


def broken_checksum(content):
  return bytes([content[0]]) + bytes([content[1] ^ 1]) + content[2:]


def half(content):
  return content[: len(content) // 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", [broken_checksum, half])
def test_damaged_download_is_named_and_leaves_nothing(server, tmp_path, damage):
  (name,) = server
  server[name] = damage(server[name])
  with pytest.raises(errors.UserError, match=r"^imdb_reviews in [^\n]*: not prepared, and preparing it failed[^\n]*$"):
    text.load(str(tmp_path))
  assert not (tmp_path / "imdb_reviews" / "plain_text" / "1.0.0").exists()
  left = [path for path in tmp_path.rglob("*") if path.is_file()]  # TFDS's note which configuration is the default
  assert [path.name for path in left] == ["metadata.json"] and not list(tmp_path.rglob("*.tmp.*")), left


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", [broken_checksum, half])
def test_archive_put_there_by_hand_is_checked_and_used(server, tmp_path, damage):
  (name,) = server
  manual = tmp_path / "downloads" / "manual"
  manual.mkdir(parents=True)
  whole = server.pop(name)  # nothing to download
  (manual / name).write_bytes(damage(whole))
  with pytest.raises(errors.UserError, match=rf"^{manual / name}: [^\n]*SHA-256 [^\n]*remove it, and put http[^\n]*$"):
    text.load(str(tmp_path))
  assert contents(tmp_path) == ["downloads", "downloads/manual", f"downloads/manual/{name}"]
  (manual / name).write_bytes(whole)
  assert len(text.load(str(tmp_path))["test"].labels) == 3


@pytest.mark.filterwarnings("ignore")
def test_another_format_is_named(server, tmp_path):
  text.load(str(tmp_path))
  (info,) = tmp_path.glob("imdb_reviews/plain_text/1.0.0/dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(errors.UserError, match=r"cannot be opened [^\n]*it must be prepared as array_record[^\n]*$"):
    text.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_without_network_the_line_says_what_to_do(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds

  infos = machine.url_infos({"aclImdb_v1.tar.gz": b""}, "http://127.0.0.1:9/")
  monkeypatch.setattr(tfds.builder_cls("imdb_reviews"), "url_infos", infos)
  with pytest.raises(errors.UserError, match=r"preparing it failed \(URLError[^\n]*set TFDS_DATA_DIR or --config"):
    text.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_truncated_records_are_named(server, tmp_path):
  text.load(str(tmp_path))
  (file,) = tmp_path.glob("imdb_reviews/plain_text/1.0.0/*-test.array_record*")
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(errors.UserError, match=r"split 'test' cannot be read[^\n]*remove the folder[^\n]*$"):
    text.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_label_that_is_no_class_is_named(tmp_path):
  builder = text._builder(tmp_path)
  examples = lambda label: iter([("a", {"text": b"a", "label": label})])
  builder._split_generators = lambda manager: {"train": examples("pos"), "test": examples(-1)}
  builder.download_and_prepare()
  with pytest.raises(errors.UserError, match=r"split 'test' has the label -1, expected 0 or 1; remove the folder"):
    text.load(str(tmp_path))


def test_unknown_validation_is_named():
  with pytest.raises(errors.UserError, match="validation='dev' of text: expected None, to carve it, or 'test'"):
    text.load(validation="dev")


REAL = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared" / "data" / "tfds")


@pytest.mark.skipif(not (REAL / "imdb_reviews").is_dir(), reason="IMDb reviews are not on this machine")
@pytest.mark.filterwarnings("ignore")
def test_real_reviews():
  """Balanced classes, lengths as TFDS gives the texts, and words that tell the classes apart."""
  import tensorflow_datasets as tfds

  splits = text.load(str(REAL), max_length=1000)
  assert "tensorflow" not in sys.modules
  for name in ("train", "test"):
    split = splits[name]
    raw = list(tfds.builder("imdb_reviews", data_dir=REAL).as_data_source(name))
    assert [min(len(example["text"]), 1000) for example in raw] == split.lengths.tolist()
    assert [example["label"] for example in raw] == split.labels.tolist()
    assert text.decode(split.inputs[5]) == raw[5]["text"][:1000].decode(errors="replace")
    counts = np.bincount(split.labels)
    assert counts[0] == counts[1]
    awful = np.array(["awful" in text.decode(row) for row in split.inputs])
    assert split.labels[awful].mean() < 0.3
