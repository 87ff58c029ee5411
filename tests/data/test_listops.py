"""ListOps: the generator against a second, plain one; the checker against hand-worked values; files of that layout."""

import random
import re
import statistics

import machine
import numpy as np
import pytest

from lra_jax import errors
from lra_jax.data import listops


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("LRA_JAX_CACHE", str(folder))
  return folder


def ids(text):
  return np.array([listops.TOKENS.index(token) for token in text.split()], np.uint8)


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("7", 7),
    ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),  # the example of the paper, section 2.2.1
    ("[MED 1 2 ]", 1),  # 1.5 rounded down
    ("[MED 0 3 4 9 ]", 3),
    ("[MED 9 0 5 ]", 5),
    ("[SM 9 9 9 ]", 7),
    ("[SM [SM 5 5 ] [MAX 0 8 ] [MIN 3 4 ] ]", 1),
    ("[MIN [MAX 1 2 ] [MAX 3 4 ] ]", 2),
  ],
)
def test_values_worked_by_hand(text, value):
  assert listops.evaluate(ids(text)) == value
  assert listops.evaluate(np.pad(ids(text), (0, 5))) == value  # padding
  assert listops.decode(np.pad(ids(text), (0, 5))) == text


@pytest.mark.parametrize("text", ["", "1 2", "[MIN 1", "1 ]", "[MIN ]", "[MIN 1 ] ]", "[MIN 1 ] 2"])
def test_what_is_no_expression_raises(text):
  with pytest.raises(ValueError, match=r"without|expressions"):
    listops.evaluate(ids(text))


def test_vocabulary_is_fixed():
  assert " ".join(listops.TOKENS) == "<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"


def plain_tree(rng, depth):
  """The benchmark's distribution, written recursively: text of a node of that depth, and its depth below."""
  if depth == 10 or rng.random() > 0.25:
    return str(rng.randrange(10)), depth
  children = [plain_tree(rng, depth + 1) for _ in range(rng.randint(2, 10))]
  operator = rng.choice(["[MIN", "[MAX", "[MED", "[SM"])
  return f"{operator} {' '.join(text for text, _ in children)} ]", max(depth for _, depth in children)


def plain_value(text):
  """Evaluates by rewriting innermost brackets, with the statistics module."""
  work = {"MIN": min, "MAX": max, "MED": lambda v: int(statistics.median(v)), "SM": lambda v: sum(v) % 10}
  innermost = re.compile(r"\[(MIN|MAX|MED|SM)((?: [0-9])+) \]")
  while "[" in text:
    text = innermost.sub(lambda m: str(work[m[1]](list(map(int, m[2].split())))), text)
  return int(text)


def describe(texts):
  """Statistics whose means two samples of the same distribution share."""
  rows = []
  for text in texts:
    tokens = text.split()
    level = deepest = 0
    for token in tokens:
      level += token.startswith("[") - (token == "]")
      deepest = max(deepest, level + token.isdigit())
    operators = [text.count(name) for name in listops.OPERATORS]
    digits = [tokens.count(str(d)) for d in range(10)]
    arguments = (len(tokens) - 1 - sum(operators)) / sum(operators)  # each node but the root is one
    rows.append([len(tokens), len(tokens) ** 2, deepest, arguments, *operators, *digits])
  return np.array(rows, float)


def test_distribution_is_that_of_a_plain_generator():
  rng = random.Random(1)
  plain = []
  while len(plain) < 800:
    text, _ = plain_tree(rng, 1)
    if 500 < len(text.split()) < 2000:
      plain.append(text)
  split = listops.generate(2000, seed=5)
  ours = [listops.decode(row) for row in split.inputs]
  a, b = describe(plain), describe(ours)
  error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b) + 1e-12)
  assert np.abs((a.mean(0) - b.mean(0)) / error).max() < 4
  lengths_a, lengths_b = np.sort(a[:, 0]), np.sort(b[:, 0])
  grid = np.arange(500, 2000)
  gap = np.searchsorted(lengths_a, grid) / len(a) - np.searchsorted(lengths_b, grid) / len(b)
  assert np.abs(gap).max() < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))  # Kolmogorov-Smirnov, p = 0.001
  values_a = np.bincount([plain_value(text) for text in plain], minlength=10) / len(a)
  np.testing.assert_allclose(values_a, np.bincount(split.labels, minlength=10) / len(b), atol=0.07)


def test_examples_keep_the_rules():
  split = listops.generate(1500, seed=0)
  assert split.inputs.shape == (1500, 2000) and split.inputs.dtype == np.uint8
  assert split.labels.dtype == split.lengths.dtype == np.int32
  assert split.lengths.min() > 500 and split.lengths.max() < 2000
  np.testing.assert_array_equal(split.inputs > 0, np.arange(2000) < split.lengths[:, None])
  for tokens, label in list(zip(split.inputs, split.labels, strict=True))[:200]:
    text = listops.decode(tokens)
    assert plain_value(text) == listops.evaluate(tokens) == label
    counts, deepest = [], 0
    open_operators = []
    for token in text.split():
      if token == "]":
        counts.append(open_operators.pop())
      if open_operators and token != "]":
        open_operators[-1] += 1
      if token.startswith("["):
        open_operators.append(0)
      deepest = max(deepest, len(open_operators) + token.isdigit())
    assert min(counts) >= 2 and max(counts) <= 10 and deepest <= 10


def test_an_example_is_a_function_of_seed_and_index():
  whole = listops.generate(60, seed=3)
  pieces = [listops.generate(20, seed=3, first=first) for first in (0, 20, 40)]
  for name in ("inputs", "labels", "lengths"):
    np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in pieces]), getattr(whole, name))
  other = listops.generate(60, seed=4)
  assert not {row.tobytes() for row in whole.inputs} & {row.tobytes() for row in other.inputs}
  # Recorded: a change here silently changes the data set.
  assert listops.decode(whole.inputs[0])[:60] == RECORDED
  assert whole.labels[:10].tolist() == RECORDED_LABELS


RECORDED = "[MED 5 9 [MED [SM 8 [MIN 9 5 [MIN 6 4 3 3 ] 1 9 0 [MIN 6 6 2"
RECORDED_LABELS = [6, 6, 2, 3, 0, 5, 6, 0, 7, 4]


def test_smaller_expressions_for_quick_runs():
  split = listops.generate(200, seed=0, min_length=5, max_length=40, max_depth=3, max_arguments=4)
  assert split.inputs.shape == (200, 40) and split.lengths.min() > 5 and split.lengths.max() < 40
  assert max(len(re.findall(r" ", match)) for row in split.inputs for match in _flat(listops.decode(row))) <= 5
  assert all(plain_value(listops.decode(row)) == label for row, label in zip(split.inputs, split.labels, strict=True))


def _flat(text):
  return re.findall(r"\[[A-Z]+(?: [0-9])+ \]", text)


def test_load_splits_are_disjoint(monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # where no files are
  monkeypatch.setattr(listops, "SIZES", {"train": 300, "validation": 40, "test": 30})
  splits = listops.load(None)
  assert {name: len(split.labels) for name, split in splits.items()} == listops.SIZES
  rows = [row.tobytes() for split in splits.values() for row in split.inputs]
  assert len(set(rows)) == 370
  again = listops.load("/nonexistent", seed=1)
  assert not set(rows) & {row.tobytes() for row in again["train"].inputs}
  monkeypatch.setattr(listops, "generate", lambda count, seed: splits["train"].take(np.zeros(count, int)))
  with pytest.raises(AssertionError, match="twice"):
    listops.load(None, seed=2)


def parenthesise(text):
  """As the benchmark's files have it: ( ( ( [MIN 1 ) 2 ) ] ), one pair for every token after the operator."""
  stack = [[]]
  for token in text.split():
    if token.startswith("["):
      stack.append([token])
    elif token == "]":
      inner, *rest = [*stack.pop(), "]"]
      for item in rest:
        inner = f"( {inner} {item} )"
      stack[-1].append(inner)
    else:
      stack[-1].append(token)
  return stack[0][0]


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "listops"
  folder.mkdir()
  for number, name in enumerate(["train", "val", "test"]):
    split = listops.generate(5, seed=number)
    rows = [
      f"{parenthesise(listops.decode(row))}\t{label}" for row, label in zip(split.inputs, split.labels, strict=True)
    ]
    (folder / f"basic_{name}.tsv").write_text("\r\n".join(["Source\tTarget", *rows, ""]))  # as csv.writer ends lines
  return folder


def test_published_files_are_read(folder):
  assert parenthesise("[MIN 1 2 ]") == "( ( ( [MIN 1 ) 2 ) ] )"
  splits = listops.load(str(folder.parent))
  assert list(splits) == ["train", "validation", "test"]
  for number, split in enumerate(splits.values()):
    for ours, truth in zip(split, listops.generate(5, seed=number), strict=True):
      np.testing.assert_array_equal(ours, truth)


LONG = " ".join(["[SM", *["0"] * 2000, "]"])


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("( ( ( [MIN 1 ) 2 ) ] )\t2", "has the value 2, but its expression is 1"),
    ("( ( ( [MIN 1 ) 2 ) ] )\t10", "has the value '10', expected 0 to 9"),
    ("( ( ( [MIN 1 ) 2 ) ] )", "has the value '', expected 0 to 9"),
    ("( ( ( [MIN 12 ) 2 ) ] )\t2", "is not an expression of digits"),
    ("( ( ( [FIRST 1 ) 2 ) ] )\t1", "is not an expression of digits"),
    ("( ( [MIN 1 ) 2 )\t1", r"is not an expression \(1 operators without \]"),
    ("é\t1", "is not an expression of digits"),
    ("\t1", "is not an expression of digits"),
    (f"{LONG}\t0", "has 2002 tokens, more than 2000"),
  ],
)
def test_bad_lines_are_named(folder, line, message):
  path = folder / "basic_val.tsv"
  lines = path.read_text().splitlines()
  lines[3] = line
  path.write_text("\n".join(lines), encoding="latin-1")  # é in it is not UTF-8
  with pytest.raises(errors.UserError, match=f"^{re.escape(str(path))}:4: the line {message}[^\n]*$"):
    listops.read_tsv(folder)


def test_missing_file_and_missing_header_are_named(folder):
  (folder / "basic_test.tsv").unlink()
  with pytest.raises(errors.UserError, match=r"listops: basic_test\.tsv missing; expected [^\n]*$"):
    listops.load(str(folder.parent))
  (folder / "basic_test.tsv").write_bytes(b"")
  with pytest.raises(errors.UserError, match=r"basic_test\.tsv:1: expected the header"):
    listops.load(str(folder.parent))


def test_file_that_may_not_be_read_is_named():
  with machine.open_folder() as folder:
    (folder / "listops").mkdir()
    for name in ("train", "val", "test"):
      (folder / "listops" / f"basic_{name}.tsv").write_text("Source\tTarget\n")
    path = folder / "listops" / "basic_train.tsv"
    path.chmod(0)
    with machine.plain_user(), pytest.raises(errors.UserError) as refusal:
      listops.load(str(folder))
    assert str(refusal.value) == f"{path}: cannot be read (Permission denied); make it readable"
