"""What people type and files that are broken: a result or one clear line, never another error, and no hang.

10,750 cases by Hypothesis, from texts and bytes that are nearly right; the same ones at every run.
"""

import io
import json
import shutil
import string

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from PIL import Image

from lra_jax import checkpoint, config, errors, runs
from lra_jax.data import listops, pictures, retrieval, text

# Of what fails, Orbax and TensorStore leave coroutines behind; ml_collections loads config files by an old function.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
  pytest.mark.usefixtures("swept"),
]


def cases(count):
  """Each may take 20 s at most, which only a hang does."""
  return settings(
    max_examples=count,
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
  )


def refused(function, *arguments):
  """The result, or None where a `UserError` of one line was raised."""
  try:
    return function(*arguments)
  except errors.UserError as error:
    assert str(error) and "\n" not in str(error), repr(str(error))
    return None


def damaged(whole):
  """Bytes that are whole but for some that are changed, cut off, put in or repeated."""

  def apply(content, changes):
    content = bytearray(content)
    for kind, place, value in changes:
      place = int(place * len(content))
      if kind == "change" and content:
        content[place] = value
      elif kind == "cut":
        del content[place:]
      elif kind == "insert":
        content[place:place] = bytes([value]) * (1 + value % 7)
      elif kind == "repeat":
        content += content[place : place + 10 * value]
    return bytes(content)

  change = st.tuples(
    st.sampled_from(["change", "cut", "insert", "repeat"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
  )
  return st.builds(apply, whole, st.lists(change, min_size=1, max_size=6))


FIELDS = sorted(config.flatten(config.load("configs/vit.py", "digits").to_dict()))
VALUE = st.one_of(
  st.text(max_size=12),
  st.integers().map(str),
  st.floats().map(str),
  st.sampled_from(["", "()", "(1,2)", "[1]", "{}", "None", "True", "nan", "-1", "1e999", "'", "(", "a.b", "0x1", "１"]),
)
OPTIONS = ("data_dir", "image_size", "length", "max_corrupt", "variant", "recipe", "quirks", "seed")
NAME = st.one_of(st.sampled_from(FIELDS), st.text(string.ascii_lowercase + "._", max_size=20))
ARGUMENT = st.one_of(
  st.builds("--config.{}={}".format, NAME, VALUE),
  st.builds("--noconfig.{}".format, NAME),
  st.builds("--{}={}".format, st.text(string.ascii_letters, max_size=8), VALUE),
  st.text(max_size=10),
)
TASK = st.one_of(
  st.sampled_from(["digits", "cifar10", "listops", "text", "path_x", "folder:/nowhere", "none", ""]),
  st.text(max_size=10),
)
OPTION = st.builds("{}={}".format, st.one_of(st.sampled_from(OPTIONS), st.text(max_size=6)), VALUE)
FILE = st.one_of(st.sampled_from(["configs/vit.py", "configs/lru.py", "configs/none.py"]), st.text(max_size=12))


@cases(3000)
@given(FILE, TASK, st.lists(OPTION, max_size=2), st.lists(ARGUMENT, max_size=3))
def test_command_lines(file, task, options, arguments):
  fresh, define = flags.FlagValues(), config_flags.DEFINE_config_file
  with pytest.MonkeyPatch.context() as patch:  # flags are defined once in a process
    patch.setattr(flags, "FLAGS", fresh)
    patch.setattr(config_flags, "DEFINE_config_file", lambda *a, **k: define(*a, **k, flag_values=fresh))
    argv = ["main", f"--config={file}:{','.join([task, *options])}", *arguments]
    found = refused(config.parse_command_line, argv)
  assert found is None or json.loads(config.to_json(found))["task"]["name"]


def pictures_of_every_format():
  pixels = np.random.RandomState(0).randint(0, 256, (17, 23, 4), np.uint8)
  for mode, format_ in (
    ("RGB", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("L", "PNG"),
    ("RGB", "WEBP"),
  ):
    image = Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    file = io.BytesIO()
    image.save(file, format_)
    yield file.getvalue()


@cases(3000)
@given(st.one_of(damaged(st.sampled_from(list(pictures_of_every_format()))), st.binary(max_size=60)))
def test_pictures(content):
  found = refused(pictures.decode, content, "picture")
  assert found is None or (found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with two checkpoints."""
  folder = tmp_path_factory.mktemp("saved")
  opened = checkpoint.Checkpoints(folder, keep=2)
  for step in (1, 2):
    assert opened.save(step, state_of(step), {"best_step": step}) is None
  assert opened.wait() is None
  opened.close()
  return folder


def state_of(step):
  return {"w": jnp.arange(60.0).reshape(6, 10) * step, "step": jnp.int32(step)}


@cases(150)
@given(st.data())
def test_checkpoints(saved, tmp_path, data):
  """Files of the newest one damaged, emptied, removed or new ones beside them: it is read whole, or the one before."""
  workdir = tmp_path / "run"
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.copytree(saved, workdir)
  files = sorted(path for path in (workdir / "checkpoints/2").rglob("*") if path.is_file())
  for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
    kind = data.draw(st.sampled_from(["damage", "remove", "rename", "folder"]))
    if kind == "damage":
      path.write_bytes(data.draw(damaged(st.just(path.read_bytes()))))
    elif kind == "rename":
      path.rename(path.with_name(data.draw(st.text(string.ascii_letters, min_size=1, max_size=8))))
    else:
      path.unlink()
      if kind == "folder":
        path.mkdir()
  opened, said = checkpoint.Checkpoints(workdir, keep=2), []
  restored = opened.restore_newest(state_of(0), said.append)
  opened.close()
  assert restored.step == (1 if said else 2) and all("\n" not in line for line in said)
  assert restored.host == {"best_step": restored.step}
  assert checkpoint.sha256(restored.state) == checkpoint.sha256(state_of(restored.step))


CONFIG = config.to_json(config.load("configs/vit.py", "digits")).encode()


@cases(600)
@given(st.one_of(damaged(st.just(CONFIG)), st.binary(max_size=30)))
def test_configs_of_runs(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  found = refused(runs.read_config, tmp_path)
  assert found is None or isinstance(found, ml_collections.ConfigDict)


TOKEN = st.sampled_from(["[MIN", "[MAX", "[MED", "[SM", "]", "(", ")", *"0123456789", "[", "10", ""])
EXPRESSION = st.one_of(
  st.recursive(
    st.sampled_from("0123456789"),
    lambda inner: st.builds(
      lambda name, values: f"[{name} {' '.join(values)} ]",
      st.sampled_from(["MIN", "MAX", "MED", "SM"]),
      st.lists(inner, min_size=1, max_size=4),
    ),
  ),
  st.lists(TOKEN, max_size=12).map(" ".join),
  st.text(max_size=20),
)


@cases(2000)
@given(EXPRESSION)
def test_expressions(source):
  def encode():
    try:
      return listops.encode([source.encode(errors="surrogatepass")], 100)
    except ValueError as error:  # its text goes on after "it"; callers make their line of it
      assert str(error) and "\n" not in str(error)
      return None

  found = encode()
  if found is not None:
    tokens, lengths = found
    assert 0 <= listops.evaluate(tokens[0]) <= 9 and (tokens[0] != 0).sum() == lengths[0]
    assert listops.decode(tokens[0]).split() == [t for t in source.split() if t not in "()"]


@cases(1000)
@given(st.lists(st.integers(0, 255), max_size=12), st.integers(1, 20))
def test_texts(values, length):
  tokens, lengths = text.encode([bytes(values)], length)
  assert tokens.shape == (1, length) and lengths[0] == min(max(len(values), 1), length)  # an empty text is a blank
  assert (tokens[0] != 0).sum() == lengths[0]
  text.decode(tokens[0])


LINE = st.builds("\t".join, st.tuples(st.sampled_from(["0", "1", "1.0", "2", ""]), *[st.text(max_size=6)] * 4))
LINES = st.lists(st.one_of(LINE, st.text(max_size=12)), max_size=4).map(lambda lines: "\n".join(lines).encode())


@cases(1000)
@given(st.one_of(LINES, damaged(st.just(b"1.0\t7\t8\tone text\tanother\n0\t1\t2\ta\tb\n"))))
def test_files_of_pairs(tmp_path, content):
  (tmp_path / "pairs.tsv").write_bytes(content)
  found = refused(retrieval.read_tsv, tmp_path / "pairs.tsv", 8)
  assert found is None or (set(found.labels.tolist()) <= {0, 1} and found.inputs.shape[1:] == (2, 8))
