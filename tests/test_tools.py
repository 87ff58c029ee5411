"""evaluate, predict, import hygiene, packaging."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv

import numpy as np
import pytest
from commands import ROOT, command, options, result_of
from PIL import Image

from lra_jax import runs
from lra_jax.data import augment, sources, tasks

SMALL = ("--config.model.depths=(1,)", "--config.model.patch_sizes=(4,)", "--config.model.embed_dims=(64,)",
         "--config.model.hidden_sizes=(16,)", "--config.train.batch_size=128", "--config.optim.learning_rate=0.02",
         "--config.optim.schedule.warmup_epochs=0.1", "--config.train.cutmix=0.0",
         "--config.optim.ema_decay=0.0")  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A model that knows its digits."""
  folder = tmp_path_factory.mktemp("tools") / "run"
  config = "--config=configs/sequencer2d.py:digits"
  process = subprocess.run(
    command("lra_jax.main", config, "--workdir", folder, *SMALL, "--config.train.steps=120"), **options(), timeout=300
  )
  assert process.returncode == 0, process.stderr
  assert result_of(folder)["test_accuracy"] > 0.9
  return folder


def test_predict_reads_real_digits(workdir, python, tmp_path):
  images, labels, _ = sources.digits()["test"]
  paths = []
  for i in range(20):
    picture = Image.fromarray(images[i, ..., 0])
    if i % 2:  # larger, wide, and in colour, as people have them
      picture = picture.resize((64, 64), Image.Resampling.BICUBIC)
      picture = Image.fromarray(np.pad(np.asarray(picture), ((0, 0), (48, 48)), constant_values=200)).convert("RGB")
    paths.append(tmp_path / f"{i}.png")
    picture.save(paths[-1])
  process = python("lra_jax.predict", "--workdir", workdir, "--top=2", *paths)
  assert process.returncode == 0, process.stderr
  lines = process.stdout.strip().splitlines()
  assert [line.split(": ")[0] for line in lines] == [str(p) for p in paths]
  top = [line.split(": ")[1].split(", ") for line in lines]
  assert all(len(t) == 2 and float(t[0].split()[1][:-1]) >= float(t[1].split()[1][:-1]) for t in top)
  assert sum(int(t[0].split()[0]) == label for t, label in zip(top, labels, strict=False)) >= 17


def test_a_run_trained_with_gpu_kernels_is_read_without_a_gpu(workdir, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  config = json.loads((folder / "config.json").read_text())
  config["model"]["implementation"] = "mosaic"
  (folder / "config.json").write_text(json.dumps(config))
  images = augment.prepare(sources.digits()["test"].inputs[:8], tasks.get("digits"))
  logits, expected = (runs.load(path).model(images) for path in (folder, workdir))
  np.testing.assert_array_equal(logits, expected)


def test_tools_refuse_what_is_not_there(workdir, refused, tmp_path):
  assert "holds no run (no config.json)" in refused("lra_jax.evaluate", "--workdir", tmp_path)
  assert "did you mean 'validation'" in refused("lra_jax.evaluate", "--workdir", workdir, "--split=valid")
  assert "checkpoints are there of steps" in refused("lra_jax.evaluate", "--workdir", workdir, "--step=3")
  assert "--workdir is missing" in refused("lra_jax.evaluate")
  assert "no files given" in refused("lra_jax.predict", "--workdir", workdir)
  assert "nothing.png: cannot be read" in refused("lra_jax.predict", "--workdir", workdir, tmp_path / "nothing.png")


def test_missing_cifar10_says_where_it_looked_and_what_to_do(refused, tmp_path):
  line = refused("lra_jax.main", "--config=configs/sequencer2d.py", "--workdir", tmp_path / "run",
                 env={"TFDS_DATA_DIR": str(tmp_path / "data"), "https_proxy": "http://127.0.0.1:9"})  # fmt: skip
  assert f"cifar10 in {tmp_path}/data" in line and "TFDS_DATA_DIR" in line and "configs/sequencer2d.py:digits" in line


def test_importing_touches_nothing_large_and_no_device():
  code = (
    "import sys, kernels.cases, lra_jax.models, lra_jax.train, lra_jax.interop, lra_jax.data.tasks\n"
    "import jax._src.xla_bridge as bridge\n"
    "large = 'tensorflow', 'torch', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'kernels.mosaic'\n"
    "print([m for m in large if m in sys.modules], "
    "bridge.backends_are_initialized())"
  )
  process = subprocess.run([sys.executable, "-c", code], **options())
  assert process.stdout.strip() == "[] False", process.stdout + process.stderr


def test_training_imports_neither_tensorflow_nor_torch(tmp_path):
  code = (
    "import sys\nfrom lra_jax import errors, main\n"
    f"sys.argv = ['main', '--config=configs/sequencer2d.py:digits', '--workdir={tmp_path}/run', *{list(SMALL)!r}, "
    "'--config.train.steps=2']\n"
    "main.main()\nprint([m for m in ('tensorflow', 'torch') if m in sys.modules])"
  )
  process = subprocess.run([sys.executable, "-c", code], **options())
  assert process.stdout.strip().endswith("[]"), process.stdout[-500:] + process.stderr


def test_wheel_runs_where_the_checkout_is_not(tmp_path):
  """Built, installed into an empty environment, and run for 10 steps from an empty folder.

  In CI the dependencies are installed with it, from the index; elsewhere the environment borrows those of the tests.
  """
  clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  source = tmp_path / "source"  # building leaves files behind
  shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info"))
  build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
  subprocess.run(build, check=True, env=clean)
  (wheel,) = tmp_path.glob("lra_jax-*.whl")
  home = tmp_path / "home"
  venv.create(home, with_pip=False, symlinks=True)
  (site,) = home.glob("lib/python3*/site-packages")
  install = [sys.executable, "-m", "pip", "--python", home, "install", "--quiet"]
  if os.environ.get("CI"):
    subprocess.run([*install, wheel], check=True, env=clean)
  else:
    subprocess.run([*install, "--no-deps", wheel], check=True, env=clean)
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
  python = home / "bin/python"
  empty = tmp_path / "empty"
  empty.mkdir()
  keywords = options(cwd=empty) | {"env": {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(home)}}
  where = subprocess.run([python, "-c", "import lra_jax, kernels, configs; print(lra_jax.__file__)"], **keywords)
  assert pathlib.Path(where.stdout.strip()).is_relative_to(site), where.stdout + where.stderr
  process = subprocess.run(
    [python, "-m", "lra_jax.main", "--config", "configs/sequencer2d.py:digits", *SMALL, "--config.train.steps=10"],
    **keywords,
  )
  assert process.returncode == 0, process.stderr
  (result,) = empty.glob("runs/sequencer2d_digits-digits-*/result.json")
  assert json.loads(result.read_text())["steps"] == 10
