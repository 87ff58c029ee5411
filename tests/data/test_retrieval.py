"""Retrieval: files of the benchmark's layout, written here."""

import re

import machine
import numpy as np
import pytest

from lra_jax import errors
from lra_jax.data import retrieval, text

ROWS = [
  (b"0", b"a short text", "naïve – 論文".encode()),
  (b"1", b"x" * 50, rb"b'written as a literal\n'"),
  (b"1.0", b"\xff\xfe no UTF-8", b'a "quoted" text, and a comma'),
  (b"0.0", b"", b"the first one is empty"),
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
  return folder


def lines(rows, end=b"\n"):
  return b"".join(
    b"\t".join([label, b"P00-%d" % number, b"W01-1", first, second]) + end
    for number, (label, first, second) in enumerate(rows)
  )


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "retrieval"
  folder.mkdir()
  for name, rows in [("train", ROWS * 3), ("eval", ROWS), ("test", ROWS[1:])]:
    (folder / f"new_aan_pairs.{name}.tsv").write_bytes(lines(rows))
  return folder


@pytest.mark.parametrize("place", ["retrieval", "tsv_data", ""])
@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_pairs_are_read_as_bytes(folder, place, chunk, monkeypatch):
  monkeypatch.setattr(retrieval, "_CHUNK", chunk)
  data_dir = folder if not place else folder.parent
  if place == "tsv_data":
    folder.rename(folder.parent / place)
  splits = retrieval.load(str(data_dir), max_length=20)
  assert {name: len(split.labels) for name, split in splits.items()} == {"train": 12, "validation": 4, "test": 3}
  split = splits["validation"]
  assert split.inputs.shape == (4, 2, 20) and split.inputs.dtype == np.uint16
  assert split.labels.tolist() == [0, 1, 1, 0] and split.labels.dtype == np.int32
  assert split.lengths.dtype == np.int32
  for (_, *pair), ids, lengths in zip(ROWS, split.inputs, split.lengths, strict=True):
    for document, row, length in zip(pair, ids, lengths, strict=True):
      expected = list((document or b" ")[:20])
      assert (row[:length].astype(int) - 1).tolist() == expected and not row[length:].any()
  np.testing.assert_array_equal(splits["train"].inputs, np.tile(split.inputs, (3, 1, 1)))
  assert text.decode(split.inputs[0, 0]) == "a short text"


def test_ends_of_lines_of_windows_and_no_last_one(folder):
  path = folder / "new_aan_pairs.eval.tsv"
  plain = retrieval.read_tsv(path, 100)
  path.write_bytes(lines(ROWS, b"\r\n").removesuffix(b"\r\n"))
  for ours, truth in zip(retrieval.read_tsv(path, 100), plain, strict=True):
    np.testing.assert_array_equal(ours, truth)


def test_length_is_that_of_the_benchmark(folder):
  assert retrieval.load(str(folder))["test"].inputs.shape == (3, 2, 4000)


def test_missing_files_are_listed(folder, tmp_path, monkeypatch):
  (folder / "new_aan_pairs.eval.tsv").unlink()
  with pytest.raises(errors.UserError, match=rf"^{re.escape(str(folder))}: new_aan_pairs\.eval\.tsv missing; [^\n]*$"):
    retrieval.load(str(tmp_path))
  nothing = tmp_path / "nothing"
  message = (
    rf"^{re.escape(str(nothing))}/retrieval: new_aan_pairs\.train\.tsv, .*eval.*test\.tsv missing; [^\n]*data_dir"
  )
  with pytest.raises(errors.UserError, match=message):
    retrieval.load(str(nothing))
  monkeypatch.setenv("TFDS_DATA_DIR", str(nothing))
  with pytest.raises(errors.UserError, match=message):
    retrieval.load(None)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"1\tA\tB", r"3 columns, expected 5 \(label, id1, id2, text1, text2\)"),
    (b"1\tA\tB\tone\ttwo\tthree", "6 columns, expected 5"),
    (b"", "1 columns, expected 5"),
    (b"2\tA\tB\tone\ttwo", "label '2', expected 0 or 1"),
    (b"-1\tA\tB\tone\ttwo", "label '-1', expected 0 or 1"),
    (b"label\tid1\tid2\ttext1\ttext2", "label 'label', expected 0 or 1"),
    (b"\xff\tA\tB\tone\ttwo", "label '�', expected 0 or 1"),
  ],
)
def test_bad_lines_are_named(folder, line, message):
  path = folder / "new_aan_pairs.test.tsv"
  content = lines(ROWS).splitlines()
  path.write_bytes(b"\n".join([*content[:2], line, *content[2:]]))
  with pytest.raises(errors.UserError, match=f"^{re.escape(str(path))}:3: {message}[^\n]*$"):
    retrieval.load(str(folder))


def test_cut_off_and_empty_files_are_named(folder):
  path = folder / "new_aan_pairs.train.tsv"
  path.write_bytes(lines(ROWS)[:-30])  # inside the last line
  with pytest.raises(errors.UserError, match=r"train\.tsv:4: [0-9] columns, expected 5[^\n]*cut off"):
    retrieval.load(str(folder))
  path.write_bytes(b"")
  with pytest.raises(errors.UserError, match=r"train\.tsv: empty"):
    retrieval.load(str(folder))


def test_what_may_not_be_read_is_named():
  with machine.open_folder() as folder:
    for name in ("train", "eval", "test"):
      (folder / f"new_aan_pairs.{name}.tsv").write_bytes(lines(ROWS))
    path = folder / "new_aan_pairs.test.tsv"
    path.chmod(0)
    with machine.plain_user(), pytest.raises(errors.UserError) as refusal:
      retrieval.load(str(folder))
    assert str(refusal.value) == f"{path}: cannot be read (Permission denied); make it readable"
    folder.chmod(0)
    with machine.plain_user(), pytest.raises(errors.UserError, match=r"train\.tsv, [^\n]* missing; "):
      retrieval.load(str(folder))
