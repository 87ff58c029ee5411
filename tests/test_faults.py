"""What a long run meets: lost, stopped and hanging processes, full disks, damaged checkpoints, spikes, other data.

docs/reliability.md has the list.
"""

import gc
import os
import random
import re
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from data.machine import file_limit

from lra_jax import checkpoint, errors, metrics

# Of what fails, Orbax and TensorStore leave coroutines and futures behind that nobody asks for their errors.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HOST = {"best_step": 1, "best_accuracy": 0.25, "seconds": 1.5}


@pytest.fixture(scope="module", autouse=True)
def swept():
  """Such leftovers are found here, not in tests of another file."""
  yield
  gc.collect()


def state_of(step):
  draw = np.random.RandomState(step)
  return {"step": jnp.int32(step), "params": {"w": jnp.asarray(draw.randn(50, 60), jnp.float32), "b": jnp.ones(3)}}


def same(a, b):
  return checkpoint.sha256(a) == checkpoint.sha256(b)


@pytest.fixture
def checkpoints(tmp_path):
  """Checkpoints of one step."""
  opened = checkpoint.Checkpoints(tmp_path / "run", keep=2)
  assert opened.save(1, state_of(1), HOST) is None and opened.wait() is None
  yield opened
  opened.close()


def test_disk_full_during_a_checkpoint(checkpoints, tmp_path, capfd):
  folder = tmp_path / "run" / "checkpoints"
  with file_limit(5000):
    problem = checkpoints.save(2, state_of(2), HOST) or checkpoints.wait()
  assert problem == "no checkpoint at step 2: File too large" and checkpoints.steps() == [1]
  assert [path.name for path in folder.iterdir()] == ["1"]  # nothing half-written takes room
  assert checkpoints.save(3, state_of(3), HOST) is None and checkpoints.wait() is None
  assert checkpoints.steps() == [1, 3] and same(checkpoints.restore(3).state, state_of(3))
  assert capfd.readouterr().err == ""  # none of Orbax's tracebacks


def test_disk_full_is_said_by_the_next_save(checkpoints):
  with file_limit(5000):
    assert checkpoints.save(2, state_of(2), HOST) is None  # goes on in the background
    time.sleep(0.5)
  assert checkpoints.save(3, state_of(3), HOST) == "no checkpoint at step 2: File too large"
  assert checkpoints.wait() is None and checkpoints.steps() == [1, 3]


def test_checkpoint_folder_removed(checkpoints, tmp_path):
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  assert checkpoints.steps() == []
  for step in (2, 3, 4):
    assert checkpoints.save(step, state_of(step), HOST) is None and checkpoints.wait() is None
  assert checkpoints.steps() == [3, 4] and same(checkpoints.restore(4).state, state_of(4))


def test_checkpoint_folder_replaced_by_a_file(checkpoints, tmp_path, capfd):
  folder = tmp_path / "run" / "checkpoints"
  shutil.rmtree(folder)
  folder.write_text("in the way")
  assert checkpoints.save(2, state_of(2), HOST) == f"no checkpoint at step 2: File exists: {folder}"
  with pytest.raises(errors.UserError, match="cannot be made"):
    checkpoint.Checkpoints(tmp_path / "run")
  folder.unlink()
  assert checkpoints.save(3, state_of(3), HOST) is None and checkpoints.wait() is None
  assert checkpoints.steps() == [3] and capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_of_the_newest_checkpoint_is_noticed_or_harmless(checkpoints, tmp_path, damage):
  """At 20 random places each, of all files by size: the newest state is whole, or it is that of the one before."""
  host = {"best_step": 2, "best_accuracy": 0.75, "seconds": 2.5}
  assert checkpoints.save(2, state_of(2), host) is None and checkpoints.wait() is None
  files = [p for p in sorted((tmp_path / "run/checkpoints/2").rglob("*")) if p.is_file() and p.stat().st_size]
  sizes = [path.stat().st_size for path in files]
  draw, fell_back = random.Random(damage), 0
  for case in range(20):
    # Half of the places fall on the small files, which say what the large one means.
    path = draw.choices(files, sizes)[0] if case % 2 else draw.choice(files)
    workdir = tmp_path / f"case{case}"
    shutil.copytree(tmp_path / "run", workdir)
    target = workdir / path.relative_to(tmp_path / "run")
    content = bytearray(target.read_bytes())
    place = draw.randrange(len(content))
    if damage == "truncated":
      content = content[:place]
    else:
      content[place] ^= draw.randrange(1, 256)
    target.write_bytes(content)
    opened, said = checkpoint.Checkpoints(workdir, keep=2), []
    restored = opened.restore_newest(state_of(0), said.append)
    where = f"{target}, byte {place}"
    assert restored.step == (1 if said else 2) and len(said) <= 1, where
    assert same(restored.state, state_of(restored.step)), where
    assert restored.host == (HOST if said else host), where
    assert not said or re.match(r"checkpoint 2 is damaged \(.*\); moved to .*/damaged/2, ", said[0]), said
    fell_back += bool(said)
    opened.close()
    shutil.rmtree(workdir)
  assert fell_back >= 10


def test_what_the_host_keeps_is_sealed_as_well(checkpoints, tmp_path):
  path = next((tmp_path / "run/checkpoints/1/host").rglob("metadata"))
  path.write_text(path.read_text().replace("0.25", "0.35"))
  with pytest.raises(ValueError, match="checksum"):
    checkpoints.restore(1, state_of(0))


def test_metrics_survive_a_full_disk(tmp_path, capsys):
  expected = []
  writer = metrics.Writer(tmp_path, 0)
  for step in range(1, 101):
    values = {"train/loss": step / 7, "train/accuracy": 0.5}
    expected.append({"step": step, **values})
    if 20 < step <= 60:
      with file_limit(1000):
        writer.write(step, **values)
    else:
      writer.write(step, **values)
  writer.close()
  assert metrics.read(tmp_path) == expected  # nothing lost, and no half line in between
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2 and all("cannot be written (File too large); training goes on" in line for line in said)
  (events,) = tmp_path.glob("events.out.tfevents.*")
  assert scalars_of(events) == {(e["step"], name): np.float32(e[name]) for e in expected for name in values}


def test_metrics_that_never_find_room_end_with_a_line(tmp_path, capsys):
  with file_limit(100):
    writer = metrics.Writer(tmp_path, 0)
    for step in range(10):
      writer.write(step, **{"train/loss": 1.0})
    writer.close()
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 4 and f"{tmp_path}/metrics.jsonl: the last 210 bytes could not be written" in said, said
  again = metrics.Writer(tmp_path, 100)  # the half line at the end is dropped
  again.write(101, **{"train/loss": 2.0})
  again.close()
  assert [e["step"] for e in metrics.read(tmp_path)] == [0, 1, 2, 101]
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) in (1, 2)


def scalars_of(path):
  """(step, name) → value of a TFRecord file of events, by TensorBoard's own description of the format."""
  from tensorboardX.proto import event_pb2

  found, content, position = {}, path.read_bytes(), 0
  while position < len(content):  # length (8), its CRC (4), record, its CRC (4)
    length = int.from_bytes(content[position : position + 8], "little")
    event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
    found.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
    position += 16 + length
  return found


def test_nothing_stays_open(tmp_path):
  """Files and threads of a process before and after writing and reading in a workdir, from the second time on."""

  def once(name):
    writer, opened = metrics.Writer(tmp_path / name, 0), checkpoint.Checkpoints(tmp_path / name)
    for step in range(1, 4):
      writer.write(step, **{"train/loss": 1.0})
      assert opened.save(step, state_of(step), HOST) is None
    opened.wait()
    opened.restore_newest(state_of(0), print)
    writer.close()
    opened.close()
    return len(os.listdir("/proc/self/fd")), threading.active_count()

  for name in "abcd":
    (tmp_path / name).mkdir()
  once("a")
  assert once("b") == once("c") == once("d")
