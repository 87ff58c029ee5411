"""What a long run meets: lost, stopped and hanging processes, full disks, damaged checkpoints, spikes, other data.

docs/reliability.md has the list.
"""

import ast
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
from commands import ROOT, command, options, places, result_of, wait_for_steps
from data.machine import file_limit
from flax import nnx
from test_scaling import SAVING, finish, start

from lra_jax import checkpoint, errors, metrics, runs, train
from lra_jax import step as step_lib
from lra_jax.data import resident, tasks

pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.usefixtures("swept"),
]

HOST = {"best_step": 1, "best_accuracy": 0.25, "seconds": 1.5}


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
    assert checkpoints.save(3, state_of(3), HOST) == "no checkpoint at step 2: File too large"
    assert checkpoints.wait() == "no checkpoint at step 3: File too large"
  assert checkpoints.wait() is None and checkpoints.steps() == [1]


def test_a_disk_with_too_little_room_is_not_tried(checkpoints, monkeypatch):
  real = os.statvfs(".")
  monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 1, *real[5:])))
  free = real.f_frsize / 2**20
  line = rf"no checkpoint at step 2: 0 MiB needed, {free:,.0f} MiB free: /\S+/checkpoints"
  assert re.fullmatch(line, checkpoints.save(2, state_of(2), HOST)) and checkpoints.wait() is None


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


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_checkpoints_vanish_ends_well_or_with_one_line(tmp_path, replaced):
  workdir = tmp_path / "run"
  process = test_train.start(workdir)
  wait_for_steps(workdir, 4, [process])
  (workdir / "checkpoints").rename(tmp_path / "elsewhere")
  if replaced:
    (workdir / "checkpoints").write_text("in the way")
  printed, error = process.communicate(timeout=240)
  if not replaced and process.returncode == 0:  # the best checkpoint came later
    assert result_of(workdir)["steps"] == 24
    return
  assert process.returncode == 2
  assert error.splitlines()[-1].startswith("error: the best checkpoint, ")
  assert printed.count(f"File exists: {workdir}/checkpoints; training goes on") >= 15 * replaced


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_of_the_newest_checkpoint_is_noticed_or_harmless(checkpoints, tmp_path, damage):
  """At 20 random places each: the newest state is whole, or it is that of the one before."""
  host = {"best_step": 2, "best_accuracy": 0.75, "seconds": 2.5}
  assert checkpoints.save(2, state_of(2), host) is None and checkpoints.wait() is None
  files = [p for p in sorted((tmp_path / "run/checkpoints/2").rglob("*")) if p.is_file() and p.stat().st_size]
  largest = max(files, key=lambda path: path.stat().st_size)
  draw, fell_back = random.Random(damage), 0
  for case in range(20):
    # Half of the places are in the array, of which every byte counts; the small files say what the large one means.
    path = largest if case % 2 else draw.choice(files)
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
    return len(os.listdir("/proc/self/fd"))

  (tmp_path / "0").mkdir()
  once("0")
  files, threads = [], []
  while len(files) < 3 or (threads[-1] and len(files) < 12):  # pools of threads grow as they need, but to an end
    before = set(threading.enumerate())  # of which one of an earlier test may end
    (tmp_path / str(len(files) + 1)).mkdir()
    files.append(once(str(len(files) + 1)))
    threads.append(len(set(threading.enumerate()) - before))
  assert len(set(files)) == 1 and threads[-1] == 0, (files, threads)


@pytest.mark.timeout(1200)
def test_two_processes_lose_nothing(tmp_path, monkeypatch):
  """SIGTERM to one, SIGSTOP of one, kill -9 of the first, a damaged checkpoint: all is as if nothing had been.

  Each time the same command goes on. The seed says at which step and how long after it.
  """
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # 12 starts: small programs count
  short = "--config.train.steps=20", SAVING
  finish(start(tmp_path / "whole", 2, 1, *short))
  workdir, draw = tmp_path / "run", random.Random(6)
  for round_, (number, victim) in enumerate([(signal.SIGTERM, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 0)]):
    running = start(workdir, 2, 1, *short)
    goal = 5 * round_ + draw.randrange(2, 6)
    wait_for_steps(workdir, goal, running)
    time.sleep(draw.random() / 10)
    running[victim].send_signal(number)
    sent = time.monotonic()
    if number == signal.SIGTERM:
      (printed, _), (others, _) = finish(running, timeout=120)
      (step,) = re.findall(r"stopped by a signal to another process at step (\d+) of 20; saved", printed)
      assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == int(step)
      assert "stopped" not in others
      continue
    _, error = running[1 - victim].communicate(timeout=60)
    seconds = time.monotonic() - sent
    running[victim].kill()
    running[victim].communicate(timeout=60)  # nothing that outlives it holds its streams
    assert seconds < 30 and running[1 - victim].returncode == 1
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert line == (
      f"error: process {victim} of 2 is lost (silent for 20 s); process {1 - victim} ends too. The same command "
      "resumes from the newest checkpoint"
    )
  newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  largest = max((workdir / f"checkpoints/{newest}").rglob("*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  running = start(workdir, 2, 1, *short)
  said = "".join(process.communicate(timeout=120)[1] for process in running)
  assert all(process.returncode in (1, 2) for process in running), said
  assert f"error: checkpoint {newest} is damaged" in said and "goes on from the one before" in said
  assert (workdir / f"damaged/{newest}").is_dir() and "Traceback" not in said

  finish(start(workdir, 2, 1, *short))
  assert result_of(workdir)["params_sha256"] == result_of(tmp_path / "whole")["params_sha256"]
  assert metrics.read(workdir) == metrics.read(tmp_path / "whole")  # no step twice, none missing


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone can limit another process")
@pytest.mark.parametrize(("victim", "room"), [(0, 0), (1, 0), (1, 2 * checkpoint._PROBE)])
def test_disk_full_on_one_host_alone(tmp_path, victim, room):
  """Each process writes its half of the parameters; one may not write for a while, then there is room again.

  With some room it is writing in the background that fails.
  """
  workdir = tmp_path / "run"
  arguments = (
    "--config.parallel.fsdp=2",
    "--config.checkpoint.every_seconds=2.0",
    "--config.eval.every_epochs=99",
    "--config.train.steps=600",
  )
  running = start(workdir, 2, 1, *arguments)
  unlimited = resource.prlimit(running[victim].pid, resource.RLIMIT_FSIZE)
  wait_for_steps(workdir, 5, running)
  while not list(workdir.glob("checkpoints/[0-9]*")) or list(workdir.glob("checkpoints/*tmp*")):
    time.sleep(0.01)
  resource.prlimit(running[victim].pid, resource.RLIMIT_FSIZE, (room, unlimited[1]))
  time.sleep(5)
  resource.prlimit(running[victim].pid, resource.RLIMIT_FSIZE, unlimited)
  (printed, error), (others, other_error) = finish(running, timeout=120)
  lines = [line for line in (printed + error).splitlines() if "no checkpoint at step" in line]
  expected = rf"no checkpoint at step \d+: process {victim} on \S+: File too large"
  assert len(lines) >= 1 and all(re.search(expected, line) for line in lines), lines
  assert "no checkpoint" not in others + other_error and "Traceback" not in error + other_error
  assert [event["step"] for event in metrics.read(workdir) if "train/loss" in event] == list(range(1, 601))
  assert (workdir / "checkpoints/600").is_dir() and not list(workdir.glob("checkpoints/*tmp*"))
  (workdir / "result.json").unlink()
  finish(start(workdir, 2, 1, *arguments))  # what is there can be read


OWNER = """
import pathlib, sys, time
from lra_jax import runs
lock = runs.Lock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("taken", flush=True)
time.sleep(300)
"""


def test_one_run_in_a_workdir(tmp_path, refused):
  owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], **options())
  assert owner.stdout.readline() == "taken\n"
  before = (tmp_path / "lock").read_text()
  line = refused("lra_jax.main", "--workdir", tmp_path)
  assert f"--workdir {tmp_path} is in use by process {owner.pid} on " in line
  assert [path.name for path in tmp_path.iterdir()] == ["lock"] and (tmp_path / "lock").read_text() == before
  owner.kill()
  owner.communicate()
  with runs.Lock(tmp_path) as lock:
    lock.acquire()  # its file is still there, and means nothing
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_host_whose_data_differ(tmp_path):
  """Of 20 expressions of the test split one has another value in the files that process 1 reads."""
  running = []
  for i, place in enumerate(places(2)):
    folder = tmp_path / f"data{i}/listops"
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
      lines = [f"[MAX {n % 10} {n % 7} ]\t{max(n % 10, n % 7)}" for n in range(20)]
      if i == 1 and split == "test":
        lines[7] = "[MAX 7 1 ]\t7"
      (folder / f"basic_{split}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    flags = ("--config=configs/s5.py:listops", "--workdir", tmp_path / "run", f"--config.task.data_dir={folder.parent}")
    running.append(subprocess.Popen(command("lra_jax.main", *flags), **options(env=place)))
  (_, first), (_, other) = [process.communicate(timeout=120) for process in running]
  assert [process.returncode for process in running] == [1, 2]
  assert re.search(
    r"^error: data of process 1 on \S+ differ from those of process 0 \(\w{12} and \w{12}\); give both the same "
    r"files\n\Z",
    other,
    re.M,
  )
  (line,) = (line for line in first.splitlines() if line.startswith("error: "))
  assert line.startswith("error: process 1 of 2 ended with an error; process 0 ends too.")
  assert "Traceback" not in first + other


MEETING = """
import time
from lra_jax import errors, processes
def main():
  with processes.started():
    print("met", flush=True)
    time.sleep(300)
errors.exit_on_user_error(main)
"""


def test_a_port_at_which_an_earlier_start_listens_is_refused():
  command, both = [sys.executable, "-c", MEETING], places(2)
  running = [subprocess.Popen(command, **options(env=place)) for place in both]
  assert [process.stdout.readline() for process in running] == ["met\n"] * 2
  for process in running:
    process.kill()
    process.communicate()
  again = subprocess.run(command, **options(env=both[0]), timeout=60)
  assert again.returncode == 2
  where = re.escape(both[0]["LRA_JAX_COORDINATOR"])
  assert re.fullmatch(rf"error: {where}: process 0 cannot listen .*in use.*take another port\n", again.stderr)


def test_a_process_that_hangs_shows_its_stacks_and_ends():
  code = "import time; from lra_jax import processes; processes.Watchdog(1.0).alive(); time.sleep(300)"
  process = subprocess.run([sys.executable, "-c", code], **options(), timeout=60)
  assert process.returncode == 1
  assert process.stderr.startswith("Timeout (0:00:01)!") and "most recent call first" in process.stderr


def test_a_skipped_step_changes_nothing_but_its_number():
  task, found = tasks.get("digits"), []
  for above in (1e-9, 1e9):
    config = test_train.small_config(optim__skip_limit=3, optim__skip_above=above, optim__ema_decay=0.9)
    mesh = step_lib.parallel.make_mesh()
    graphdef, state, optimizer = step_lib.init_state(config, task, lambda step: 1e-2, mesh)
    before = jax.device_get(state)
    split = tasks.load(task, **runs.data_settings(config))["train"]
    call = step_lib.make_train_call(config, task, graphdef, optimizer, lambda step: 1e-2, 1, mesh)
    state, values = call(state, resident.put(split, mesh), np.arange(32, dtype=np.int32)[None])
    after = jax.device_get(state)
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    found.append((bool(values["skipped"][0]), same(before, after)))
  assert found == [(True, True), (False, False)]


def test_the_count_of_skipped_steps_outlives_a_start(tmp_path):
  config = test_train.small_config(optim__skip_limit=5, optim__skip_above=1e-9, checkpoint__every_seconds=0.0)
  for start_ in range(2):
    with pytest.raises(
      errors.UserError, match=r"6 steps in a row were skipped, to step 6, more than config\.optim\.skip_"
    ):
      train.train_and_evaluate(config, tmp_path / "run")
    newest = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert newest == 5, start_


def test_an_example_that_is_not_a_number(tmp_path, monkeypatch):
  """Poisoned data end the run at the step that reads them, or are skipped, once an epoch, and the rest is learnt."""
  config = test_train.small_config(eval__every_epochs=0.25)
  split = tasks.load(tasks.get("digits"), **runs.data_settings(config))["train"]
  chosen = resident.train_indices(len(split.labels), 32, 0, 20, config.seed)
  batch, victim = 7, chosen[7, 3]
  assert (chosen == victim).sum() == 1
  real = step_lib.batches.training

  def poisoned(config, task, examples, *rest):
    (x_BHWC, options), targets_BS = real(config, task, examples, *rest)
    bad = (examples.inputs == split.inputs[victim][None]).all((1, 2, 3))
    return (jnp.where(bad[:, None, None, None], jnp.nan, x_BHWC), options), targets_BS

  monkeypatch.setattr(step_lib.batches, "training", poisoned)
  with pytest.raises(errors.UserError, match=rf"training diverged at step {batch + 1}: loss nan"):
    train.train_and_evaluate(config, tmp_path / "ends")
  config.optim.skip_limit = 1
  result = train.train_and_evaluate(config, tmp_path / "skips")
  skipped = {e["step"]: e["train/skipped"] for e in metrics.read(tmp_path / "skips") if "train/skipped" in e}
  assert result["steps"] == 20 and [step for step, count in skipped.items() if count] == [batch + 1]
  assert np.isfinite(result["test_loss"])


def modules():
  for folder in ("lra_jax", "kernels", "configs"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      yield path.relative_to(ROOT), ast.parse(path.read_text())


def test_nothing_that_is_read_can_execute():
  """No unpickling in the package, and a single place that runs a file: the config, which is Python."""
  runs_files = []
  for path, tree in modules():
    for node in ast.walk(tree):
      names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
      assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} & set(names), path
      if not isinstance(node, ast.Call):
        continue
      called = ast.unparse(node.func)
      assert called not in ("eval", "exec", "yaml.load", "torch.load", "np.fromfile", "os.system"), (path, called)
      if called == "np.load":
        assert any(k.arg == "allow_pickle" and k.value.value is False for k in node.keywords), path
      if called.endswith("exec_module"):
        runs_files.append(str(path))
      assert not any(k.arg == "shell" for k in node.keywords), path
  assert runs_files == ["lra_jax/config.py"]


def test_no_decision_depends_on_the_clock_of_the_wall():
  """It may jump. Durations are of the monotonic clocks; time.time is for what people read, and for old downloads."""
  found = {
    str(path) for path, tree in modules() for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.datetime.now")
  }  # fmt: skip
  assert found <= {"lra_jax/metrics.py", "lra_jax/data/cache.py"}


class Bomb:
  def __reduce__(self):
    return os.mkdir, ("exploded",)


def test_a_pickle_in_the_place_of_a_file_is_refused(tmp_path, monkeypatch, checkpoints):
  import pickle

  from lra_jax import interop, models

  monkeypatch.chdir(tmp_path)
  bomb = pickle.dumps(Bomb())
  weights, config = tmp_path / "weights.safetensors", tmp_path / "evil"
  weights.write_bytes(bomb)
  model = nnx.eval_shape(lambda: models.create("vit_digits", input_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0)))
  with pytest.raises(errors.UserError, match="cannot be read as safetensors"):
    interop.load_torch(model, weights)
  config.mkdir()
  (config / "config.json").write_bytes(bomb)
  with pytest.raises((errors.UserError, ValueError)):
    runs.load(config)
  for path in (tmp_path / "run/checkpoints/1").rglob("*"):
    if path.is_file():
      path.write_bytes(bomb)
  with pytest.raises(errors.UserError, match="all checkpoints"):
    checkpoints.restore_newest(state_of(0), print)
  assert not (tmp_path / "exploded").exists()
