"""One run on many devices and processes: the same losses and counts, checkpoints that go from one to the other."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import events_of, options, result_of, start_run, wait_for_steps

from lra_jax import errors, processes

RUN = (
  "--config=configs/mlp_mixer.py:digits", "--config.model.depth=1", "--config.model.width=128",
  "--config.model.drop_path=0.2", "--config.train.batch_size=32", "--config.train.steps=50",
  "--config.eval.every_epochs=0.25", "--config.optim.schedule.warmup_epochs=0.1",
)  # fmt: skip
SAVING = "--config.checkpoint.every_seconds=0.0"  # at every step; processes wait for each other each time


def start(workdir, count=1, devices=1, *arguments):
  """Starts the processes of a run; (Popen of each)."""
  return start_run(count, *RUN, "--workdir", workdir, *arguments, devices=devices)


def finish(running, timeout=300):
  outputs = [process.communicate(timeout=timeout) for process in running]
  for process, (_, error) in zip(running, outputs, strict=True):
    assert process.returncode == 0, error
  return outputs


def losses_of(workdir):
  events = events_of(workdir)
  train = [e["train/loss"] for e in events if "train/loss" in e]
  return np.array(train + [e["validation/loss"] for e in events if "validation/loss" in e])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one device, which keeps its best steps."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  finish(start(workdir))
  return workdir


@pytest.mark.parametrize(
  ("count", "devices", "fsdp"), [(1, 2, 1), (1, 4, 2), (1, 8, 1), (1, 8, 8), (2, 2, 2), (4, 1, 1)]
)
def test_losses_are_those_of_one_device(alone, tmp_path, count, devices, fsdp):
  (printed, _), *others = finish(start(tmp_path / "run", count, devices, f"--config.parallel.fsdp={fsdp}"))
  assert f"{count * devices} × cpu" in printed and ("processes" in printed) == (count > 1)
  for out, _ in others:  # process 0 speaks for all; Gloo itself says who is connected
    assert all(line.startswith("[Gloo]") for line in out.splitlines()), out
  np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(alone), rtol=5e-5)
  ours, theirs = result_of(tmp_path / "run"), result_of(alone)
  assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=1 / 364)
  assert round(ours["test_accuracy"] * 364, 3).is_integer()  # every test example counted, no remainder dropped


def test_a_checkpoint_goes_to_other_devices(alone, tmp_path):
  """Killed on 8 devices, gone on with 2 processes, killed, ended on one device."""
  workdir = tmp_path / "run"
  for step, running in (
    (10, lambda: start(workdir, 1, 8, SAVING, "--config.parallel.fsdp=4")),
    (25, lambda: start(workdir, 2, 2, SAVING)),
  ):
    running = running()
    wait_for_steps(workdir, step, running)
    for process in running:
      process.send_signal(signal.SIGKILL)
      process.communicate()
  ((printed, _),) = finish(start(workdir, 1, 1, SAVING))
  assert "resuming at step" in printed and "1 ×" not in printed
  np.testing.assert_allclose(losses_of(workdir), losses_of(alone), rtol=5e-5)


IN_PARTS = """
import jax, numpy as np
from lra_jax import parallel
from lra_jax.data import batches, feed, resident
from lra_jax.data.sources import Split
mesh = parallel.make_mesh(4, 2)
random = np.random.RandomState(0)
for shape, dtype in (((4, 3, 1), np.uint8), ((6,), np.uint16)):
  inputs = random.randint(0, np.iinfo(dtype).max, (101, *shape)).astype(dtype)
  split = Split(inputs, np.arange(101, dtype=np.int32), None)
  data = resident.put(split, mesh, in_parts=True)
  assert max(shard.data.shape[0] for shard in data.inputs.addressable_shards) == 13
  take = jax.jit(lambda data, indices: batches.take(data, indices, mesh))
  seen = []
  for step in range(0, 101, 1):
    indices = resident.train_indices(101, 16, step, 1, seed=3)[0]
    examples = take(data, indices)
    assert examples.inputs.sharding.spec[0] == ("data", "fsdp"), examples.inputs.sharding
    np.testing.assert_array_equal(examples.inputs, inputs[indices])
    np.testing.assert_array_equal(examples.labels, indices)
    seen.extend(np.asarray(examples.labels).tolist())
  assert (np.bincount(seen) == 16).all()  # 16 epochs of 101, in 101 batches of 16
print("good")
"""


def test_data_in_parts_give_the_examples_asked_for_once_an_epoch():
  process = subprocess.run([sys.executable, "-c", IN_PARTS], **options(env={"JAX_NUM_CPU_DEVICES": "8"}))
  assert process.stdout == "good\n", process.stderr


SHARDED = """
import jax
from configs import vit
from lra_jax import parallel, step
from lra_jax.data import tasks
config = vit.get_config("digits")
config.optim.ema_decay = 0.99
mesh = parallel.make_mesh(2, 4)
_, state, _ = step.init_state(config, tasks.get("digits"), lambda step: 1e-3, mesh)
_, whole, _ = step.init_state(config, tasks.get("digits"), lambda step: 1e-3)
split = 0
for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(whole), strict=True):
  part = max(shard.data.size for shard in leaf.addressable_shards)
  name = jax.tree_util.keystr(path)
  if leaf.size >= parallel.SMALL:
    assert part * 4 == leaf.size, name
    split += 1
  else:
    assert part == leaf.size, name
  assert abs(jax.device_get(leaf) - jax.device_get(other)).max() <= 1e-6, name
assert split >= 4 * 8, split  # parameters, both moments and the average, of two matrices a block and more
print("good")
"""


def test_state_is_split_by_rule_and_starts_from_the_same_numbers():
  process = subprocess.run([sys.executable, "-c", SHARDED], **options(env={"JAX_NUM_CPU_DEVICES": "8"}))
  assert process.stdout == "good\n", process.stderr


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, None),
    ({"LRA_JAX_PROCESSES": "1"}, None),
    (dict(LRA_JAX_PROCESSES="4", LRA_JAX_PROCESS="3", LRA_JAX_COORDINATOR="a:1"), (3, 4, "a:1")),
    (dict(LRA_JAX_PROCESSES="2", JOB_COMPLETION_INDEX="1", LRA_JAX_COORDINATOR="x-workers-0-0.x:9876"),
     (1, 2, "x-workers-0-0.x:9876")),
    (dict(SLURM_NTASKS="16", SLURM_PROCID="9", SLURM_STEP_NODELIST="gpu[004-005]", SLURM_JOB_ID="123456"),
     (9, 16, "gpu004:10332")),
    (dict(SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_STEP_NODELIST="n1,n2", SLURM_JOB_ID="7", SLURM_STEP_ID="1",
          SLURM_RESTART_COUNT="2"), (0, 2, "n1:10116")),
    (dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_STEP_NODELIST="gpu1", SLURM_JOB_ID="1"), None),
    (dict(SLURM_NTASKS="8"), None),  # in sbatch's script, not in a step of srun
  ],
)  # fmt: skip
def test_a_process_finds_its_place(environment, expected):
  assert processes.find_place(environment) == expected


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    (dict(LRA_JAX_PROCESSES="two"), "invalid literal"),
    (dict(LRA_JAX_PROCESSES="2", LRA_JAX_PROCESS="2", LRA_JAX_COORDINATOR="a:1"), "process 2 of 2"),
    (dict(LRA_JAX_PROCESSES="2", LRA_JAX_PROCESS="1"), "coordinator ''"),
    (dict(SLURM_NTASKS="8", SLURM_STEP_NODELIST="gpu1"), "SLURM_PROCID"),
  ],
)
def test_a_place_that_cannot_be_is_refused(environment, expected):
  with pytest.raises(errors.UserError, match=r"launch/README\.md") as refusal:
    processes.find_place(environment)
  assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("gpu1", "gpu1"),
    ("gpu1,gpu2", "gpu1"),
    ("gpu[004-006,9],other", "gpu004"),
    ("r[1,3]n2,x", "r1n2"),
    ("a-b-7", "a-b-7"),
  ],
)
def test_first_node_of_slurms_list(nodes, first):
  assert processes.first_node(nodes) == first


def test_mesh_refuses_what_cannot_be(refused, tmp_path):
  line = refused("lra_jax.main", *RUN, "--workdir", tmp_path / "a", "--config.parallel.fsdp=3",
                 env={"JAX_NUM_CPU_DEVICES": "8"})  # fmt: skip
  assert "fsdp=3: 8 devices cannot be cut into groups of 3" in line
  assert jax.process_count() == 1 and os.environ.get("LRA_JAX_PROCESSES") is None
