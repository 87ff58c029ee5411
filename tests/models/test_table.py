"""README's table of models is what `python -m lra_jax.models` prints, and leaves no model and no config out."""

from commands import ROOT

from lra_jax import config, models
from lra_jax.models import __main__ as table


def test_readme_has_the_table(python):
  process = python("lra_jax.models")
  assert process.returncode == 0, process.stderr
  assert process.stdout.strip() in (ROOT / "README.md").read_text()


def test_every_model_and_every_config_is_in_the_table():
  names = [name for family in table.FAMILIES for name in family.inputs]
  assert sorted(names) == models.names()
  assert sorted(f"configs/{family.config}.py" for family in table.FAMILIES) == config.all_files()
