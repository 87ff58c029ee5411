"""Config files, command lines, and the recorded dump of every config: a changed default shows as a diff.

After a change that is meant: `UPDATE_GOLDEN=1 pytest tests/test_config.py`, and read the diff.
"""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT, options

from configs import common
from lra_jax import config as config_lib
from lra_jax import errors, models
from lra_jax.data import tasks

CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.stem not in ("common", "__init__"))
ARGUMENTS = {  # besides the default and digits
  "sequencer2d.py": ["cifar10,variant=s"],
  "vanilla_sequencer.py": ["cifar10,variant=s_pe"],
  "fnet.py": ["cifar10"],
  "lipschitz_rnn.py": ["cifar10_permuted"],
  "lru.py": ["lra_image_real,variant=large"],
  "nystromformer.py": ["cifar10,variant=tiny32"],
  "s5.py": ["cifar10_sequence"],
  "vit.py": ["cifar10,variant=ti16", "lra_image"],
}
CASES = [(name, argument) for name in CONFIGS for argument in ["", "digits", *ARGUMENTS.get(name, [])]]


@pytest.mark.parametrize("name,argument", CASES)
def test_config_is_as_recorded(name, argument):
  text = config_lib.to_json(config_lib.load(str(ROOT / "configs" / name), argument))
  golden = (
    ROOT / "tests/golden" / f"{name[:-3]}{'.' if argument else ''}{argument.replace(',', '.').replace('=', '-')}.json"
  )
  if os.environ.get("UPDATE_GOLDEN"):
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(text)
  assert config_lib.differences(golden.read_text(), text) == []


@pytest.mark.parametrize("name,argument", CASES)
def test_config_names_what_exists(name, argument):
  config = config_lib.load(str(ROOT / "configs" / name), argument)
  assert config.model.name in models.names() and config.task.name in tasks.REGISTRY
  assert config_lib.to_json(config_lib.from_json(config_lib.to_json(config))) == config_lib.to_json(config)


def test_every_field_has_a_reason_beside_it():
  """Lines of configs/common.py that set a field say what it is."""
  _, _, fields = (ROOT / "configs/common.py").read_text().partition("def base(")
  for line in fields.splitlines():
    if line.startswith("  c.") and "ConfigDict()" not in line and not line.endswith("= task"):
      name = line.split("=")[0].strip()
      assert "#" in line or name in PLAIN, line


PLAIN = {f"c.{n}" for n in ("model.name", "train.epochs", "train.label_smoothing", "optim.b1", "optim.b2", "optim.eps",
                            "eval.every_epochs", "optim.schedule.warmup_rate", "eval.batch_size")}  # fmt: skip


def test_configs_import_ml_collections_alone():
  code = (
    "import sys, pkgutil, importlib, configs\n"
    "for found in pkgutil.iter_modules(configs.__path__):\n"
    "  module = importlib.import_module('configs.' + found.name)\n"
    "  if found.name != 'common': module.get_config()\n"
    "print({m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'numpy', 'tensorflow', 'lra_jax', 'kernels'})"
  )
  process = subprocess.run([sys.executable, "-c", code], **options())
  assert process.stdout.strip() == "set()", process.stdout + process.stderr


def test_options_after_the_colon():
  assert common.parse("", ("a", "b"), variant=("s", "m")) == ("a", {"variant": ""})
  assert common.parse("b,variant=m", ("a", "b"), variant=("s", "m")) == ("b", {"variant": "m"})
  assert common.parse("variant=m", ("a", "b"), variant=("s", "m")) == ("a", {"variant": "m"})


@pytest.mark.parametrize(
  "arguments,expected",
  [
    (["--config=configs/sequencer2d.py:digit"], "task 'digit' does not exist here; did you mean 'digits'?"),
    (
      ["--config=configs/sequencer2d.py:cifar10,variant=small"],
      "variant = 'small' does not exist here; did you mean 'small",
    ),
    (
      ["--config=configs/sequencer2d.py:digits,varient=s"],
      "option 'varient' does not exist here; did you mean 'variant'?",
    ),
    (["--config=configs/sequencer2d.py:digits,s"], "options are written name=value"),
    (["--config=configs/sequencer.py"], "did you mean 'configs/sequencer2d.py'"),
    (["--config=configs/sequencer2d.py:digits", "--config.optim.lerning_rate=1"], "did you mean optim.learning_rate"),
    (["--config=configs/sequencer2d.py:digits", "--config.learning_rate=1"], "did you mean optim.learning_rate"),
    (
      ["--config=configs/sequencer2d.py:digits", "--config.optim=1"],
      "--config.optim is a group; set one of its fields",
    ),
    (["--config=configs/sequencer2d.py:digits", "--config.optim.learning_rate=fast"], "config.optim.learning_rate"),
    (["--config=configs/sequencer2d.py:digits", "--config.train.batch_size=1.5"], "config.train.batch_size"),
    (["--config=configs/sequencer2d.py:digits", "--wrkdir=x"], "wrkdir"),
    (["--config=configs/sequencer2d.py:digits", "x"], "argument 'x' is not understood"),
    (["--config=configs/sequencer2d.py:digits", "--config.model.name=sequencer2d_z"], "did you mean 'sequencer2d_"),
    (["--config=configs/sequencer2d.py:digits", "--config.task.name=cifar"], "did you mean 'cifar10'"),
    (["--config=configs/sequencer2d.py:digits", "--config.optim.schedule.name=cosin"], "did you mean 'cosine'"),
    (["--workdir=x"], "error: --config=configs"),
  ],
)
def test_mistakes_are_refused_with_near_misses(arguments, expected, tmp_path):
  if arguments == ["--workdir=x"]:
    process = subprocess.run([sys.executable, "-m", "lra_jax.main", "--workdir", tmp_path / "run"], **options())
    assert process.returncode == 2 and "error: --config is missing; try" in process.stderr
    return
  process = subprocess.run(
    [sys.executable, "-m", "lra_jax.main", *arguments, "--workdir", tmp_path / "run"], **options()
  )
  assert process.returncode == 2, process.stdout
  (line,) = process.stderr.strip().splitlines()[-1:]
  assert line.startswith("error: ") and expected in line and "Traceback" not in process.stderr, process.stderr


def test_overrides_reach_the_run(python, tmp_path):
  process = python("lra_jax.config", "configs/sequencer2d.py:digits", "--config.optim.learning_rate=0.5",
                   "--config.augment.flip", "--config.augment.crop_scale=(0.5,1.0)",
                   "--noconfig.optim.nesterov")  # fmt: skip
  config = json.loads(process.stdout)
  assert config["optim"]["learning_rate"] == 0.5 and config["augment"]["flip"] is True
  assert config["augment"]["crop_scale"] == [0.5, 1.0] and config["optim"]["nesterov"] is False


def test_data_folder_is_not_part_of_a_runs_identity():
  one, two = (json.dumps({"task": {"data_dir": folder, "name": "x"}}) for folder in ("/a", "/b"))
  assert config_lib.differences(one, two) == []
  assert config_lib.differences(one, '{"task": {"name": "y"}}') == ["task.name: 'x' → 'y'"]


def test_unknown_names_the_near_ones_first():
  assert errors.unknown("model", "vit_ti61", ["vit_ti16", "lru"]).startswith(
    "model 'vit_ti61' does not exist; did you mean 'vit_ti16'?"
  )
