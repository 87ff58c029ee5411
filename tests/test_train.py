"""Training as users run it: learning, resuming after kill -9 and SIGTERM, damage, divergence, meshes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command, events_of, options, result_of, wait_for_steps
from flax import nnx

from configs import sequencer2d
from kernels import dispatch
from kernels.lipschitz_rnn import lipschitz_rnn
from lra_jax import flops, runs, train

STEPS = ("--config.train.steps=24", "--config.eval.every_epochs=0.2", "--config.checkpoint.every_seconds=0.0")


# Two blocks of the digits preset: enough for stochastic depth to do something.
SMALL = ("--config.model.depths=(1,1)", "--config.train.batch_size=32", "--config.optim.schedule.warmup_epochs=0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of 24 steps that nobody interrupted: its workdir and what it printed."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  process = subprocess.run(command("lra_jax.main", "--workdir", workdir, *STEPS), **options(), timeout=300)
  assert process.returncode == 0, process.stderr
  return workdir, process.stdout


def test_a_run_leaves_and_says_what_readme_promises(finished):
  workdir, printed = finished
  result = result_of(workdir)
  assert result["model"] == "sequencer2d_digits" and result["task"] == "digits" and result["steps"] == 24
  for name in ("best_validation_accuracy", "best_step", "test_accuracy", "seconds", "images_per_second", "parameters",
               "compile_seconds", "peak_memory_bytes", "device", "params_sha256"):  # fmt: skip
    assert result[name], name
  for name in ("curves.png", "confusion.png", "mistakes.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG"), name
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment["packages"]["jax"] == jax.__version__ and environment["command"][0].endswith("lra_jax/main.py")
  assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 24
  for text in ("parameters", "GFLOP", "MiB peak memory", "step 24: validation accuracy", "cpu", "test accuracy"):
    assert text in printed, text
  table = (workdir / "parameters.txt").read_text()
  assert f"Total: {result['parameters']:,}" in table and "stages/0/0/lstm/w_ih" in table


def test_metrics_and_tensorboard_events_agree(finished):
  workdir, _ = finished
  events = events_of(workdir)
  assert [e["step"] for e in events if "train/loss" in e] == list(range(1, 25))
  assert [e["step"] for e in events if "validation/accuracy" in e] == [8, 16, 24]
  from tensorboardX.proto import event_pb2

  found = {}
  for file in workdir.glob("events.out.tfevents.*"):
    content, position = file.read_bytes(), 0
    while position < len(content):  # length (8), its CRC (4), record, its CRC (4)
      length = int.from_bytes(content[position : position + 8], "little")
      event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
      found.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
      position += 16 + length
  ours = {(e["step"], name): value for e in events for name, value in e.items() if name != "step"}
  assert found == pytest.approx(ours, rel=1e-6)


def test_best_checkpoint_is_kept_and_result_is_its_test_score(finished, python):
  workdir, _ = finished
  result = result_of(workdir)
  values = {
    e["step"]: (e["validation/accuracy"], -e["validation/loss"]) for e in events_of(workdir) if "validation/loss" in e
  }
  assert result["best_step"] == max(values, key=values.get)
  assert (workdir / "checkpoints" / str(result["best_step"])).is_dir() and (workdir / "checkpoints/24").is_dir()
  evaluation = json.loads(python("lra_jax.evaluate", "--workdir", workdir).stdout)
  assert evaluation["accuracy"] == pytest.approx(result["test_accuracy"]) and evaluation["examples"] == 364
  assert evaluation["step"] == result["best_step"]
  newest = json.loads(python("lra_jax.evaluate", "--workdir", workdir, "--step=newest", "--split=validation").stdout)
  assert newest["accuracy"] == pytest.approx(values[24][0]) and newest["examples"] == 141


def test_finished_run_repeats_its_result(finished, python):
  workdir, _ = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  process = python("lra_jax.main", "--workdir", workdir, *STEPS)
  assert process.returncode == 0 and "is finished; its result" in process.stdout
  assert json.loads(process.stdout[process.stdout.index("{") :]) == result_of(workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_another_config_is_refused_with_its_differences(finished, refused, tmp_path):
  workdir, _ = finished
  line = refused("lra_jax.main", "--workdir", workdir, *STEPS, "--config.optim.learning_rate=0.5", "--config.seed=7")
  assert "optim.learning_rate: 0.002 → 0.5" in line and "seed: 0 → 7" in line and "batch_size" not in line
  (tmp_path / "thesis.txt").write_text("precious")
  assert "thesis.txt" in refused("lra_jax.main", "--workdir", tmp_path)


def test_a_refused_start_does_not_keep_its_workdir(finished, refused, python, tmp_path):
  assert "batch_size=31" in refused("lra_jax.main", "--workdir", tmp_path, *STEPS, "--config.train.batch_size=31",
                                    "--config.train.accumulate=2")  # fmt: skip
  process = python("lra_jax.main", "--workdir", tmp_path, *STEPS)
  assert process.returncode == 0, process.stderr
  assert result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]
  assert json.loads((tmp_path / "config.json").read_text())["train"]["batch_size"] == 32
  assert "holds a run of another config" in refused("lra_jax.main", "--workdir", tmp_path, *STEPS, "--config.seed=7")
  (tmp_path / "metrics.jsonl").unlink()  # checkpoints alone are a run as well
  assert "holds a run of another config" in refused("lra_jax.main", "--workdir", tmp_path, *STEPS, "--config.seed=7")


def start(workdir, *arguments):
  return subprocess.Popen(command("lra_jax.main", "--workdir", workdir, *STEPS, *arguments), **options())


@pytest.mark.parametrize("step", [1, 9, 17])
def test_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(finished, tmp_path, step):
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for_steps(workdir, step, [process])
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  again = start(workdir)
  _, errors = again.communicate(timeout=240)
  assert again.returncode == 0, errors
  assert result_of(workdir)["params_sha256"] == result_of(finished[0])["params_sha256"]
  assert result_of(workdir)["test_accuracy"] == result_of(finished[0])["test_accuracy"]
  assert events_of(workdir) == events_of(finished[0])  # no step twice, none missing, the same numbers


def test_sigterm_saves_and_the_same_command_resumes(finished, tmp_path):
  workdir = tmp_path / "run"
  slow = "--config.checkpoint.every_seconds=1000.0"  # so that only the signal saves
  process = start(workdir, slow)
  wait_for_steps(workdir, 5, [process])
  process.terminate()
  printed, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  assert "stopped by SIGTERM at step" in printed and "The same command resumes" in printed
  assert not (workdir / "result.json").exists()
  again = start(workdir, slow)
  printed, errors = again.communicate(timeout=240)
  assert again.returncode == 0 and "resuming at step" in printed, errors
  assert result_of(workdir)["params_sha256"] == result_of(finished[0])["params_sha256"]


def largest_file(folder):
  return max((p for p in pathlib.Path(folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, python, tmp_path, damage):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  (workdir / "result.json").unlink()
  target = largest_file(workdir / "checkpoints/24")
  if damage == "flip":
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 0xFF
    target.write_bytes(content)
  else:
    os.truncate(target, target.stat().st_size // 2 if damage == "truncate" else 0)
  process = python("lra_jax.main", "--workdir", workdir, *STEPS)
  assert process.returncode == 0, process.stderr
  assert "checkpoint 24 is damaged" in process.stdout and "resuming at step 2" in process.stdout
  assert (workdir / "damaged/24").is_dir()
  assert result_of(workdir)["params_sha256"] == result_of(finished[0])["params_sha256"]


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(refused, python, tmp_path):
  workdir = tmp_path / "run"
  explode = ("--config.optim.name=sgd", "--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0.0",
             "--config.optim.schedule.warmup_epochs=0.3", "--config.optim.schedule.warmup_rate=0.0",
             "--config.optim.ema_decay=0.0")  # fmt: skip
  line = refused("lra_jax.main", "--workdir", workdir, *STEPS, *explode)
  step = int(line.split("diverged at step ")[1].split(":")[0])
  kept = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert step > 1 and kept == step - 1 and f"{workdir}/checkpoints/{kept}" in line
  weights = runs.load(workdir, "newest").model
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(weights))))


def small_config(**fields):
  config = sequencer2d.get_config("digits")
  config.update_from_flattened_dict(
    {"model.depths": (1,), "model.patch_sizes": (2,), "model.embed_dims": (16,), "model.hidden_sizes": (4,)}
    | {"train.batch_size": 32, "train.steps": 20, "optim.schedule.warmup_epochs": 0.0, "eval.every_epochs": 1.0}
    | {"train.cutmix": 0.0, "augment.crop_pad": 0, "train.label_smoothing": 0.0, "optim.learning_rate": 0.02}
    | {name.replace("__", "."): value for name, value in fields.items()}
  )
  return config


def losses(config, workdir):
  train.train_and_evaluate(config, workdir)
  return np.array([e["train/loss"] for e in events_of(workdir) if "train/loss" in e])


def test_learns_in_20_steps(tmp_path):
  config = small_config(
    optim__ema_decay=0.0,
    model__patch_sizes=(4,),
    model__embed_dims=(64,),
    model__hidden_sizes=(16,),
    train__batch_size=128,
  )
  loss = losses(config, tmp_path / "run")
  assert abs(loss[0] - np.log(10)) < 1e-4  # the zero head: every class as likely as any other
  assert loss[-3:].mean() < 0.3 * loss[0]
  assert result_of(tmp_path / "run")["test_accuracy"] > 0.8


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
  whole = losses(small_config(), tmp_path / "whole")
  parts = losses(small_config(train__accumulate=4), tmp_path / "parts")
  np.testing.assert_allclose(parts, whole, rtol=2e-4)


def test_many_steps_a_call_are_the_same_steps(tmp_path):
  one = losses(small_config(train__cutmix=1.0, model__drop_path=0.5), tmp_path / "one")
  many = losses(small_config(train__cutmix=1.0, model__drop_path=0.5, train__steps_per_call=5), tmp_path / "many")
  np.testing.assert_allclose(many, one.reshape(4, 5).mean(1), rtol=1e-4)


def test_early_stopping_and_plateau(tmp_path):
  config = small_config(
    train__steps=400, eval__early_stop_patience=3, optim__schedule__name="plateau", optim__schedule__patience=1,
    eval__every_epochs=0.05, optim__learning_rate=1e-9, optim__schedule__factor=0.5, optim__weight_decay=0.0,
  )  # fmt: skip
  train.train_and_evaluate(config, tmp_path / "run")
  evaluations = [e for e in events_of(tmp_path / "run") if "validation/loss" in e]
  assert result_of(tmp_path / "run")["steps"] < 60 and len(evaluations) >= 4
  rates = [e["train/learning_rate"] for e in events_of(tmp_path / "run") if "train/loss" in e]
  assert rates[-1] <= 0.5e-9 * 1.001 and rates[0] == pytest.approx(1e-9)


def test_every_knob_at_once(tmp_path):
  config = small_config(
    train__mixup=0.8, train__cutmix=1.0, train__label_smoothing=0.1, augment__crop_pad=1, augment__flip=True,
    augment__crop_scale=(0.5, 1.0), augment__erase_probability=0.5, optim__ema_decay=0.9, model__remat=True,
    model__dtype="bfloat16", model__init="he", model__drop_path=0.2, train__accumulate=2, optim__name="lion",
    optim__learning_rate=1e-3, optim__schedule__name="one_cycle", train__steps_per_call=10,
  )  # fmt: skip
  loss = losses(config, tmp_path / "run")
  assert np.isfinite(loss).all() and loss[-1] < loss[0]


def test_4_devices_give_the_losses_of_one(python, tmp_path):
  """Forced CPU devices in processes of their own, with augmentation, mixing and stochastic depth on."""
  found = []
  for devices in (1, 4):
    workdir = tmp_path / str(devices)
    process = python(
      "lra_jax.main", "--config=configs/sequencer2d.py:digits", "--workdir", workdir, *STEPS, *SMALL,
      "--config.model.drop_path=0.3", env={"JAX_NUM_CPU_DEVICES": str(devices)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert ("4 × cpu" in process.stdout) == (devices == 4)
    found.append([[e.get("train/loss", 0), e.get("validation/loss", 0)] for e in events_of(workdir)])
  np.testing.assert_allclose(found[1], found[0], rtol=2e-5)


def test_devices_that_do_not_divide_the_batch_are_refused(refused, tmp_path):
  line = refused("lra_jax.main", "--workdir", tmp_path / "a", "--config.train.batch_size=36",
                 env={"JAX_NUM_CPU_DEVICES": "8"})  # fmt: skip
  assert "batch_size=36 must be a multiple of 8 devices × accumulate=1" in line
  line = refused("lra_jax.main", "--workdir", tmp_path / "b", "--config.parallel.data=3")
  assert "config.parallel.data=3, fsdp=1: there are 1 devices" in line


def test_plan_rounds_to_whole_calls():
  config = small_config(train__steps=0, train__epochs=3.0)
  plan = train.Plan.make(config, examples=1000, devices=1, platform="gpu")
  assert plan.steps_per_epoch == 31.25 and plan.eval_every == plan.steps_per_call == 31 and plan.steps == 124
  plan = train.Plan.make(config, examples=100_000, devices=1, platform="gpu")
  assert plan.steps_per_call <= 100 and plan.eval_every % plan.steps_per_call == 0 == plan.steps % plan.steps_per_call
  plan = train.Plan.make(config, examples=1000, devices=1, platform="cpu")
  assert plan.steps_per_call == 1 and plan.steps == 94 and plan.eval_every == 31


def test_flops_count_loops_as_often_as_they_run():
  def f(x, w):
    h, _ = jax.lax.scan(lambda h, _: (h @ w, None), x, length=7)
    return jax.lax.conv(h.reshape(1, 1, 4, 5), jnp.ones((3, 1, 2, 2)), (1, 1), "VALID")

  jaxpr = jax.jit(f).trace(jnp.ones((4, 5)), jnp.ones((5, 5))).jaxpr
  assert flops.count(jaxpr) == 7 * 2 * 4 * 5 * 5 + 2 * 3 * 3 * 4 * 4


def test_flops_of_a_kernel_are_those_of_the_form_without_it():
  z, a = jax.ShapeDtypeStruct((2, 5, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)

  def traced(implementation):
    run = lambda z, a, w: lipschitz_rnn(z, a, w, epsilon=0.1, implementation=implementation).sum()
    make = lambda: jax.jit(jax.grad(run))
    with dispatch.recording() as choices:
      return make, (z, a, a), make().trace(z, a, a), choices

  with dispatch.interpreting():
    kernel = traced("mosaic")
  without = traced(None)
  assert flops.count(kernel[2].jaxpr) != flops.count_call(*kernel) == flops.count(without[2].jaxpr)
  assert flops.count_call(*without) == flops.count(without[2].jaxpr)
