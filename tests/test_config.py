"""Config files, command lines, and the recorded dump of every config: a changed default shows as a diff.

After a change that is meant: `UPDATE_GOLDEN=1 pytest tests/test_config.py`, and read the diff.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
from commands import ROOT, options
from flax import nnx

from configs import common
from lra_jax import config as config_lib
from lra_jax import errors, models, optim, runs, sweep
from lra_jax.data import tasks

CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.stem not in ("common", "__init__"))
ARGUMENTS = {  # besides the default and digits
  "sequencer2d.py": ["cifar10,variant=s", "cifar10,variant=xs,recipe=imagenet", "tiny_imagenet", "imagenet2012"],
  "vanilla_sequencer.py": ["cifar10,variant=s_pe"],
  "convmixer.py": ["imagenette,recipe=patches"],
  "resnet.py": ["imagenette,recipe=patches"],
  "fnet.py": ["cifar10", "pathfinder"],
  "gmlp.py": ["imagenette"],
  "lipschitz_rnn.py": ["cifar10_permuted", "path_x"],
  "lra_transformer.py": ["listops", "text", "pathfinder", "path_x"],
  "lru.py": ["lra_image_real,variant=large", "path_x_real"],
  "mlp_mixer.py": ["cifar100,recipe=keras"],
  "nystromformer.py": ["cifar10,variant=tiny32", "retrieval"],
  "pit.py": ["tiny_imagenet"],
  "s5.py": ["cifar10_sequence", "text", "path_x_real"],
  "trellisnet.py": ["text"],
  "vit.py": ["cifar10,variant=ti16", "lra_image", "imagenet2012", "mnist"],
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


def test_every_task_of_every_config_fits_its_model(tmp_path):
  """Fields are the model's, recipes are the task's, and a short run of each has a schedule; nothing is built."""
  for name in CONFIGS:
    module = importlib.import_module(f"configs.{name[:-3]}")
    for task_name in getattr(module, "TASKS", common.IMAGE_TASKS):
      if task_name == common.FOLDER:
        task_name = f"folder:{tmp_path}"
        for folder in ("train/a", "train/b", "val/a", "val/b"):
          (tmp_path / folder).mkdir(parents=True, exist_ok=True)
      config = module.get_config(task_name)
      overridden = {field for field, value in config.model.to_dict().items() if value is not None}
      assert overridden - {"name", "init"} <= models.fields(config.model.name), (name, task_name)
      task = dataclasses.replace(tasks.get(task_name), names=None)  # names are the data's; these need not be there
      options = {"length": config.task.length, "image_size": config.task.image_size}
      assert {option for option, value in options.items() if value} <= set(task.options), (name, task_name)
      is_text, flip = task.image_shape is None, config.augment.flip
      assert not (flip and (is_text or "mnist" in task_name or "digits" in task_name)), (name, task_name)
      assert not (is_text and (config.train.mixup or config.train.cutmix or config.augment.crop_pad))
      assert config.train.batch_size % config.train.accumulate == 0
      optim.make_schedule(config.optim, config.train.steps or round(config.train.epochs * 100), 100.0)


def count(argument, name):
  config = config_lib.load(str(ROOT / "configs" / name), argument)
  size = config.task.image_size
  task = tasks.get("imagenette")
  task = dataclasses.replace(task, image_shape=(size, size, 3)) if size else task
  assert config.train.batch_size == 64 and config.train.epochs == 30 and config.task.validation_fraction == 0.3
  return models.count_params(nnx.eval_shape(lambda: runs.create_model(config, task)))


@pytest.mark.parametrize("task", ["imagenette", "imagenette_full"])
def test_three_ways_with_patches_are_of_one_size(task):
  """ConvMixer 256/12 with patch and kernel 7, a ViT of 6 layers and 8 heads, a narrowed ResNet-18, at 160 px."""
  counts = {name: count(f"{task},recipe=patches", name) for name in ("convmixer.py", "vit.py", "resnet.py")}
  assert all(800_000 <= n <= 1_600_000 for n in counts.values()), counts
  vit = config_lib.load(str(ROOT / "configs/vit.py"), f"{task},recipe=patches").model
  convmixer = config_lib.load(str(ROOT / "configs/convmixer.py"), f"{task},recipe=patches").model
  assert (vit.depth, vit.heads) == (6, 8)
  assert (convmixer.width, convmixer.depth, convmixer.kernel_size, convmixer.patch_size) == (256, 12, 7, 7)


def test_the_three_ways_are_one_sweep(tmp_path):
  files = ["configs/convmixer.py", "configs/vit.py", "configs/resnet.py"]
  for task in ("imagenette,recipe=patches", f"folder:{tmp_path},recipe=patches"):
    found = sweep.runs_of(files, task, ["0"])
    assert [argument for _, argument, _ in found] == [f"{file}:{task}" for file in files]
    for _, argument, _ in found:
      config = config_lib.load(str(ROOT / argument.partition(":")[0]), argument.partition(":")[2])
      assert config.task.name == task.partition(",")[0] and config.optim.schedule.name == "one_cycle"
      assert config.task.image_size == (160 if task.startswith("folder") else 0)


def test_recipes_are_for_pictures():
  with pytest.raises(errors.UserError, match="recipe = 'keras' is for pictures; task 'listops' has none"):
    config_lib.load(str(ROOT / "configs/fnet.py"), "listops,recipe=keras")
  with pytest.raises(errors.UserError, match="recipe = 'patch' does not exist here; did you mean 'patches'"):
    config_lib.load(str(ROOT / "configs/vit.py"), "imagenette,recipe=patch")
  with pytest.raises(errors.UserError, match="option 'recipe' does not exist here"):
    config_lib.load(str(ROOT / "configs/lru.py"), "imagenette,recipe=patches")


def test_a_variant_of_ones_own_is_the_presets():
  """Sizes of a task's default model are not laid over a variant that was asked for."""
  own, given = (
    config_lib.load(str(ROOT / "configs/fnet.py"), a).model for a in ("retrieval", "retrieval,variant=base")
  )
  assert (own.name, own.width) == ("fnet_small", 128) and (given.name, given.width) == ("fnet_base", None)


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
