"""Several runs, one table and one picture; the same command goes on where it was."""

import json

from lra_jax import sweep

FEW_STEPS = [f"--override={o}" for o in ("train.steps=6", "eval.every_epochs=0.1", "optim.schedule.warmup_epochs=0.0")]


def test_runs_are_named_by_config_task_options_and_seed():
  runs = sweep.runs_of(["configs/vit.py:digits,variant=ti16", "configs/lru.py"], "digits", ["0", "7"])
  assert runs == [
    ("vit-digits-variant_ti16-0", "configs/vit.py:digits,variant=ti16", "0"),
    ("vit-digits-variant_ti16-7", "configs/vit.py:digits,variant=ti16", "7"),
    ("lru-digits-0", "configs/lru.py:digits", "0"),
    ("lru-digits-7", "configs/lru.py:digits", "7"),
  ]
  assert len(sweep.runs_of([], "digits", ["0"])) == 15
  ((name, _, _),) = sweep.runs_of(["configs/vit.py"], "folder:/data/birds/,recipe=patches", ["0"])
  assert name == "vit-folder_birds-recipe_patches-0"


def test_table_has_mean_and_deviation_over_seeds():
  run = dict(
    model="m", task="t", parameters=1234, best_validation_accuracy=0.5, total_seconds=2.0, images_per_second=10
  )
  text = sweep.table({"c": [run | {"test_accuracy": a} for a in (0.5, 0.6)]})
  assert text.splitlines()[-1] == "| m | t | 1,234 | 55.00 ± 7.07 | 2 | 50.00 | 2 | 10 |"


def test_a_sweep_runs_compares_and_goes_on(python, refused, tmp_path):
  command = ("--out", tmp_path, "configs/gmlp.py:digits", "configs/lipschitz_rnn.py:digits", *FEW_STEPS)
  process = python("lra_jax.sweep", *command)
  assert process.returncode == 0, process.stdout + process.stderr
  rows = (tmp_path / "table.md").read_text().splitlines()
  assert len(rows) == 4 and rows[2].startswith("| gmlp_digits | digits |") and "| 1 |" in rows[3]
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
  results = sorted(tmp_path.glob("*/result.json"))
  assert len(results) == 2 and json.loads(results[0].read_text())["steps"] == 6
  again = python("lra_jax.sweep", *command)
  assert again.returncode == 0 and again.stdout.count("is finished; its result") == 2
  broken = python("lra_jax.sweep", "--out", tmp_path, "configs/vit.py:digits", "--override=model.heads=5")
  assert broken.returncode == 2 and "heads=5 does not divide the width 64" in broken.stderr
  assert "error: 1 runs did not finish: vit-digits-0; the same command goes on with them" in broken.stderr


def test_mistakes_of_a_sweep(refused, tmp_path):
  assert "did you mean 'configs/vit.py'" in refused("lra_jax.sweep", "--out", tmp_path, "configs/vitt.py")
  assert "did you mean 'lra_image'" in refused("lra_jax.sweep", "--out", tmp_path, "configs/vit.py:lra_imag")
  assert "'one' is no number" in refused("lra_jax.sweep", "--out", tmp_path, "configs/vit.py", "--seeds=one")
  assert "--out is missing" in refused("lra_jax.sweep", "configs/vit.py")
