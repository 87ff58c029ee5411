"""The cache of decoded data: what was stored comes back, or is made anew; never a half, and never an error."""

import json
import multiprocessing
import os
import pathlib
import shutil

import machine
import numpy as np
import pytest

from lra_jax.data import cache
from lra_jax.data.sources import Split


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv("LRA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "source"
  path.write_bytes(b"one")
  return path


def make(count=7, seed=0):
  """Splits of every kind: images, tokens, pairs with lengths, none at all."""
  random = np.random.RandomState(seed)
  integers = lambda *shape, high=256, dtype=np.uint8: random.randint(0, high, shape).astype(dtype)
  return {
    "train": Split(integers(count, 5, 4, 3), integers(count, high=10, dtype=np.int32)),
    "validation": Split(
      integers(count, 2, 6, high=257, dtype=np.uint16),
      integers(count, high=2, dtype=np.int32),
      integers(count, 2, high=7, dtype=np.int32),
    ),
    "test": Split(np.zeros((0, 5, 4, 3), np.uint8), np.zeros(0, np.int32)),
  }


def assert_same(ours, truth):
  assert list(ours) == list(truth)
  for name, split in truth.items():
    for array, expected in zip(ours[name], split, strict=True):
      if expected is None:
        assert array is None
      else:
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def fail():
  raise AssertionError("the entry was not found")


def entry(source):
  return cache.entry("data", "v1", str(source.parent), [source])


def names(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_second_load_maps_what_the_first_has_made(source):
  truth = make()
  first = cache.load(entry(source), lambda: truth)
  assert first is truth
  second = cache.load(entry(source), fail)
  assert_same(second, truth)
  assert isinstance(second["train"].inputs.base, np.memmap) and not second["train"].inputs.flags.writeable


def test_what_is_stored_is_plain_npy(source):
  truth = make()
  cache.write(entry(source), truth)
  np.testing.assert_array_equal(np.load(entry(source) / "validation.lengths.npy"), truth["validation"].lengths)
  views = {"train": Split(truth["train"].inputs[::2, ::-1], truth["train"].labels[::2])}  # not contiguous
  cache.write(cache.entry("views", "", "", ()), views)
  assert_same(cache.load(cache.entry("views", "", "", ()), fail), views)


@pytest.mark.parametrize("change", ["content", "time", "removed", "another"])
def test_changed_files_are_another_entry_and_take_the_place_of_the_old_one(source, folder, change):
  old = entry(source)
  cache.load(old, make)
  files = [source]
  if change == "content":
    source.write_bytes(b"other")
  elif change == "time":
    os.utime(source, ns=(0, 1))
  elif change == "removed":
    source.unlink()
  else:
    files.append(source.parent)
  new = cache.entry("data", "v1", str(source.parent), files)
  truth = make(seed=1)
  assert_same(cache.load(new, lambda: truth), truth)
  assert_same(cache.load(new, fail), truth)
  assert not old.exists() and len(list(folder.glob("*/*"))) == 1


def test_names_variants_and_sources_do_not_share_an_entry(source):
  arguments = [
    ("data", "v1", "a"),
    ("data", "v2", "a"),
    ("data2", "v1", "a"),
    ("data", "v1", "b"),
    ("da/ta", "v1", "a"),
    ("da:ta", "v1", "a"),
    ("data", "", "v1a"),
    ("x" * 100 + "1", "v1", "a"),
    ("x" * 100 + "2", "v1", "a"),
  ]
  entries = {cache.entry(*names, [source]) for names in arguments}
  assert len({path.parent for path in entries}) == len(arguments)
  assert all(path.parent.parent == cache.root() for path in entries)  # no name leads out of the folder


def test_folder_is_that_of_the_environment(monkeypatch):
  monkeypatch.setenv("HOME", "/home/x")
  monkeypatch.setenv("LRA_JAX_CACHE", "~/a")
  assert cache.root() == pathlib.Path("/home/x/a")
  monkeypatch.setenv("LRA_JAX_CACHE", "")
  monkeypatch.setenv("XDG_CACHE_HOME", "/b")
  assert cache.root() == pathlib.Path("/b/lra_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache.root() == pathlib.Path("/home/x/.cache/lra_jax")


def cut(path):
  os.truncate(path, path.stat().st_size - 1)


def zeros(path):
  path.write_bytes(bytes(path.stat().st_size))


def text(path):
  path.write_text("[]")


@pytest.mark.parametrize(
  ("file", "damage"),
  [
    ("contents.json", cut),
    ("contents.json", zeros),
    ("contents.json", text),
    ("contents.json", pathlib.Path.unlink),
    ("train.inputs.npy", cut),
    ("train.inputs.npy", zeros),
    ("train.inputs.npy", pathlib.Path.unlink),
    ("test.labels.npy", zeros),
    ("train.labels.npy", lambda path: path.write_bytes(path.read_bytes().replace(b"}", b"("))),
    ("validation.lengths.npy", lambda path: shutil.copy(path.with_name("validation.labels.npy"), path)),
  ],
)
def test_damaged_entry_is_made_anew_after_one_line(source, folder, capsys, file, damage):
  truth = make()
  cache.write(entry(source), truth)
  damage(entry(source) / file)
  assert_same(cache.load(entry(source), lambda: truth), truth)
  printed = capsys.readouterr().err
  assert printed.startswith(f"warning: {entry(source)}: damaged (") and printed.count("\n") == 1
  assert_same(cache.load(entry(source), fail), truth)
  assert list(folder.glob("*/*")) == [entry(source)]


def test_file_in_the_place_of_an_entry_is_replaced(source, folder):
  entry(source).parent.mkdir(parents=True)
  entry(source).write_text("a file")
  truth = make()
  cache.load(entry(source), lambda: truth)
  assert_same(cache.load(entry(source), fail), truth)
  assert list(folder.glob("*/*")) == [entry(source)]


def test_header_that_promises_more_than_the_file_has_is_damage(source, capsys):
  cache.write(entry(source), make())
  path = entry(source) / "train.labels.npy"
  path.write_bytes(path.read_bytes().replace(b"(7,)", b"(8,)"))
  assert cache.read(entry(source)) is None
  assert capsys.readouterr().err.count("\n") == 1


def test_full_disk_costs_one_line_and_leaves_nothing(source, folder, capsys):
  truth = {"train": Split(np.zeros((1000, 8, 8, 3), np.uint8), np.zeros(1000, np.int32))}
  with machine.file_limit(100_000):
    assert cache.load(entry(source), lambda: truth) is truth
  printed = capsys.readouterr().err
  assert printed.startswith(f"warning: {entry(source)}: decoded data cannot be cached (") and printed.count("\n") == 1
  assert "set LRA_JAX_CACHE to a folder that can be written" in printed
  assert names(folder) == [entry(source).parent.name]
  cache.load(entry(source), lambda: truth)  # there is room again
  assert_same(cache.load(entry(source), fail), truth)


def test_full_disk_leaves_an_older_entry_in_its_place(source):
  truth = make()
  old = entry(source)
  cache.write(old, truth)
  large = {"train": Split(np.zeros((1000, 8, 8, 3), np.uint8), np.zeros(1000, np.int32))}
  source.write_bytes(b"changed")
  with machine.file_limit(100_000):
    cache.load(entry(source), lambda: large)
  assert_same(cache.read(old), truth)
  assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_read_only_folder_costs_one_line(monkeypatch, capsys, inside):
  truth = make()
  with machine.open_folder() as folder:
    folder.chmod(0o555)
    monkeypatch.setenv("LRA_JAX_CACHE", str(folder / inside))
    where = cache.entry("data", "v1", "", ())
    with machine.plain_user():
      assert cache.load(where, lambda: truth) is truth
    assert not list(folder.iterdir())
  printed = capsys.readouterr().err
  assert printed.startswith(f"warning: {where}: decoded data cannot be cached ([Errno 13]") and printed.count("\n") == 1


@pytest.mark.parametrize("place", ["a file", "a\0b"])
def test_impossible_folder_costs_one_line(tmp_path, monkeypatch, capsys, place):
  (tmp_path / "a file").write_text("")
  where, truth = tmp_path / place / "kind" / "entry", make()
  assert cache.load(where, lambda: truth) is truth
  assert capsys.readouterr().err.count("\n") == 1
  assert names(tmp_path) == ["a file"]


def test_entry_in_a_read_only_folder_is_read(monkeypatch):
  truth = make()
  with machine.open_folder() as folder:
    monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
    where = cache.entry("data", "v1", "", ())
    cache.write(where, truth)
    for path in (folder, where.parent, where):
      path.chmod(0o555)
    with machine.plain_user():
      assert_same(cache.load(where, fail), truth)


def test_error_of_what_makes_the_data_passes_and_leaves_nothing(source, folder):
  with pytest.raises(ZeroDivisionError):
    cache.load(entry(source), lambda: 1 / 0)
  assert not folder.exists()


def test_what_killed_processes_left_is_removed_after_a_day(source, folder):
  kind = entry(source).parent
  for name, age in (("new", 0), ("old", 2 * 24 * 60 * 60)):
    (kind / f".writing-{name}").mkdir(parents=True)
    os.utime(kind / f".writing-{name}", times=(0, os.stat(kind).st_mtime - age))
  cache.write(entry(source), make())
  assert sorted(path.name for path in kind.iterdir()) == [".writing-new", entry(source).name]


def _write_often(where, times, barrier):
  barrier.wait()
  for _ in range(times):
    cache.write(where, make(count=500))


def test_processes_that_write_the_same_entry_leave_one_whole_one(source, folder, capfd):
  """Also while another reads: it finds nothing or all of it."""
  where, truth = entry(source), make(count=500)
  context = multiprocessing.get_context("forkserver")
  barrier = context.Barrier(3)
  processes = [context.Process(target=_write_often, args=(where, 40, barrier)) for _ in range(2)]
  for process in processes:
    process.start()
  barrier.wait()
  found = 0
  while any(process.is_alive() for process in processes):
    splits = cache.read(where)
    if splits is not None:
      found += 1
      assert_same(splits, truth)
  for process in processes:
    process.join()
    assert process.exitcode == 0
  assert found and not capfd.readouterr().err
  assert_same(cache.load(where, fail), truth)
  assert list(where.parent.iterdir()) == [where]
  contents = json.loads((where / "contents.json").read_text())
  assert {f"{split}.{field}.npy" for split in contents for field in contents[split]} | {"contents.json"} == set(
    os.listdir(where)
  )
