"""ListOps of the Long Range Arena (Tay et al. 2021, section 2.2.1): nested lists of digits under MIN, MAX, MED and SM.

`load` reads the published tsv files where they are, else makes the data set with `generate`, which draws from the
benchmark's distribution (its program draws from Python's global random state, so its own examples cannot be redrawn).
The ids of the tokens are fixed here; the benchmark's depend on the order of a Python set.
"""

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from lra_jax import errors
from lra_jax.data import cache, sources
from lra_jax.data.sources import Split

# Index = id; 0 is padding. Parentheses, which the files have around every step, are left out as the benchmark does.
TOKENS = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}
MAX_LENGTH = 2000  # L; an expression has fewer tokens than this
MIN_LENGTH = 500  # and more than this
MAX_DEPTH = 10  # nodes above one another; the lowest are digits
MAX_ARGUMENTS = 10  # of one operator; at least 2
OPERATOR_PROBABILITY = 0.25  # of a node that is not at the lowest depth

_ID = {token: index for index, token in enumerate(TOKENS)}
_CLOSE = _ID["]"]
_FIRST_OPERATOR = _ID["[MIN"]
_FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
_BLOCK = 1024  # examples made at once: some 50 MB


def load(data_dir: str | None, seed: int = 0) -> dict[str, Split]:
  """The data set: from the published files in `data_dir`/listops, generated where that folder has none of them.

  Generating takes a minute or two. What was read or generated is kept in the cache.

  Args:
    data_dir: folder that may contain listops/basic_train.tsv, basic_val.tsv and basic_test.tsv; None or "" as of
      `sources.data_folder`.
    seed: of the generator; not used for files.

  Returns:
    "train", "validation", "test": inputs (N, 2000) uint8, labels (N,) in 0 … 9, lengths (N,). Generated: 96,000,
    2,000 and 2,000, no expression twice.

  Raises:
    UserError: as of `read_tsv`.
  """
  folder = sources.data_folder(data_dir) / "listops"
  files = [folder / name for name in _FILES.values()]
  if any(map(os.path.exists, files)):
    return cache.load(cache.entry("listops", "published", str(folder.resolve()), files), lambda: read_tsv(folder))
  entry = cache.entry("listops", f"seed{seed}-{'-'.join(map(str, SIZES.values()))}", "generated", ())
  return cache.load(entry, lambda: _generate_all(seed))


def _generate_all(seed):
  whole = generate(sum(SIZES.values()), seed)
  if len(np.unique(whole.inputs.view(f"V{MAX_LENGTH}"))) < len(whole.inputs):
    raise AssertionError(f"listops: seed {seed} made an expression twice")
  edges = np.cumsum([0, *SIZES.values()])
  return {split: whole.take(slice(*edges[i : i + 2])) for i, split in enumerate(SIZES)}


def generate(
  count: int,
  seed: int,
  first: int = 0,
  *,
  min_length: int = MIN_LENGTH,
  max_length: int = MAX_LENGTH,
  max_depth: int = MAX_DEPTH,
  max_arguments: int = MAX_ARGUMENTS,
) -> Split:
  """Draws expressions as the benchmark's program does, and evaluates each in two ways.

  A node is an operator with probability 0.25, drawn evenly from the four, over 2 … `max_arguments` nodes, their number
  drawn evenly; else, and always at the lowest depth, it is a digit, drawn evenly. Expressions whose number of tokens
  (brackets counted, parentheses not) does not lie between the lengths are drawn anew. Example i depends on `seed`
  and i alone: ranges can be made in several processes.

  Args:
    count: N.
    seed: which data set.
    first: index of the first example; the examples are first … first + count − 1.
    min_length, max_length: tokens are more than the one and fewer than the other.
    max_depth: nodes above one another, ≥ 2.
    max_arguments: of one operator, ≥ 2.

  Returns:
    inputs (N, max_length) uint8, labels (N,) in 0 … 9, lengths (N,).

  Raises:
    AssertionError: the value of the tree and `evaluate` of its tokens differ.
  """
  limits = (min_length, max_length, max_depth, max_arguments)
  inputs = np.zeros((count, max_length), np.uint8)
  labels = np.zeros(count, np.int32)
  lengths = np.zeros(count, np.int32)
  for start in range(0, count, _BLOCK):
    rows = slice(start, min(start + _BLOCK, count))
    roots, lengths[rows] = _draw_roots(seed, np.arange(first + start, first + rows.stop), limits)
    labels[rows] = _write(roots, max_depth, max_arguments, inputs[rows])
  for tokens, label in zip(inputs, labels, strict=True):
    if evaluate(tokens) != label:
      raise AssertionError(f"{decode(tokens)} is {evaluate(tokens)} by its tokens, {label} by its tree")
  return Split(inputs, labels, lengths)


def evaluate(tokens: np.ndarray) -> int:
  """The value of one expression, by a stack machine over its tokens; knows nothing of the trees of `generate`.

  MED is the median rounded down, SM the sum modulo 10.

  Args:
    tokens: (L,) ids of `TOKENS`; what follows the first padding is not read.

  Returns:
    0 … 9.

  Raises:
    ValueError: brackets that do not match, an operator without arguments, more than one expression.
  """
  stack = [[]]
  for token in tokens.tolist():
    if 1 <= token <= 10:
      stack[-1].append(token - 1)
    elif token == _CLOSE:
      if len(stack) < 2:
        raise ValueError("a ] without its operator")
      operator, *values = stack.pop()
      if not values:
        raise ValueError("an operator without arguments")
      if operator == _ID["[MIN"]:
        value = min(values)
      elif operator == _ID["[MAX"]:
        value = max(values)
      elif operator == _ID["[SM"]:
        value = sum(values) % 10
      else:
        values.sort()
        value = (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
      stack[-1].append(value)
    elif token == 0:
      break
    else:
      stack.append([token])
  if len(stack) != 1 or len(stack[0]) != 1:
    raise ValueError(f"{len(stack) - 1} operators without ], {len(stack[0])} expressions")
  return stack[0][0]


def decode(tokens: np.ndarray) -> str:
  """The expression as text, one space between tokens, no parentheses and no padding."""
  return " ".join(TOKENS[token] for token in tokens if token)


def read_tsv(folder: str | pathlib.Path) -> dict[str, Split]:
  """Reads the benchmark's files: a header line, then an expression with parentheses, a tab and its value in each line.

  Args:
    folder: has basic_train.tsv, basic_val.tsv and basic_test.tsv.

  Returns:
    "train", "validation", "test": inputs (N, 2000) uint8, labels (N,), lengths (N,).

  Raises:
    UserError: a file is missing or not UTF-8, a line is not of that form, is longer than 2,000 tokens, or its value is
      not that of its expression.
  """
  folder = pathlib.Path(folder)
  missing = [name for name in _FILES.values() if not os.path.isfile(folder / name)]
  if missing:
    raise errors.UserError(
      f"{folder}: {', '.join(missing)} missing; expected {', '.join(_FILES.values())} of lra_release.gz there, "
      "or none of them, and the data are generated"
    )
  return {split: _read_file(folder / name) for split, name in _FILES.items()}


# Any order of tokens that stand by themselves; whether they make an expression is for `evaluate` to say.
_SOURCE = re.compile(rb"(?:(?:[()\]0-9]|\[MIN|\[MAX|\[MED|\[SM)(?:[ ]+|$))+")
_TO_IDS = bytes.maketrans(b"0123456789abcd]", bytes(range(1, 16)))


def _read_file(path):
  try:
    lines = path.read_bytes().splitlines()
  except OSError as error:
    raise errors.UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
  if not lines or lines[0].split(b"\t") != [b"Source", b"Target"]:
    raise errors.UserError(f"{path}:1: expected the header Source, tab, Target; take the file of lra_release.gz")
  inputs = np.zeros((len(lines) - 1, MAX_LENGTH), np.uint8)
  labels = np.zeros(len(lines) - 1, np.int32)
  lengths = np.zeros(len(lines) - 1, np.int32)
  for index, line in enumerate(lines[1:]):
    source, _, target = line.partition(b"\t")
    try:
      tokens, value = _parse(source)
      if not re.fullmatch(rb"[0-9]", target):
        raise ValueError(f"has the value {target[:20].decode(errors='replace')!r}, expected 0 to 9")
      if value != int(target):
        raise ValueError(f"has the value {int(target)}, but its expression is {value}")
    except ValueError as error:
      raise errors.UserError(f"{path}:{index + 2}: the line {error}; take the file of lra_release.gz") from error
    inputs[index, : len(tokens)], labels[index], lengths[index] = tokens, value, len(tokens)
  return Split(inputs, labels, lengths)


def _parse(source):
  """Tokens and value of an expression as it is written; a ValueError whose text goes on after "the line"."""
  if not _SOURCE.fullmatch(source):
    raise ValueError("is not an expression of digits, [MIN, [MAX, [MED, [SM and ]")
  for letter, name in zip(b"abcd", OPERATORS, strict=True):
    source = source.replace(name.encode(), bytes([letter]))
  tokens = np.frombuffer(source.translate(_TO_IDS, b"() "), np.uint8)
  if len(tokens) > MAX_LENGTH:
    raise ValueError(f"has {len(tokens)} tokens, more than {MAX_LENGTH}")
  try:
    return tokens, evaluate(tokens)
  except ValueError as error:
    raise ValueError(f"is not an expression ({error})") from error


def encode(texts: Sequence[bytes], max_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Expressions as they are written, with or without parentheses, to tokens.

  Args:
    texts: N of them, tokens with blanks between them.
    max_length: L.

  Returns:
    (N, L) uint8 ids of `TOKENS`, and the numbers of tokens (N,) int32.

  Raises:
    ValueError: one is no expression, or has more than L tokens.
  """
  ids, lengths = np.zeros((len(texts), max_length), np.uint8), np.zeros(len(texts), np.int32)
  for row, source in enumerate(texts):
    tokens, _ = _parse(b" ".join(source.split()))
    if len(tokens) > max_length:
      raise ValueError(f"has {len(tokens)} tokens, more than {max_length}")
    ids[row, : len(tokens)], lengths[row] = tokens, len(tokens)
  return ids, lengths


# The generator: every node of every tree owns 64 random bits, made from its parent's by the mixing function of
# SplitMix64 (Steele, Lea, Flood 2014). A tree is thus given by its root's, and many grow level by level at once.


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64: (…) uint64 to as many bits that look random."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def child_bits(bits: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """(…) uint64, the bits of child number 0, 1, … of the owner of those bits."""
  return mix(bits + (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def _arguments(bits, max_arguments):
  """How many arguments the node has if it is an operator: bits 16 … 35."""
  bits = (bits >> np.uint64(16)) & np.uint64(0xFFFFF)
  return 2 + ((bits * np.uint64(max_arguments - 1)) >> np.uint64(20)).astype(np.int64)


def _is_operator(bits):
  """Bits 40 … 63."""
  return (bits >> np.uint64(40)) < np.uint64(int(OPERATOR_PROBABILITY * 2**24))


def _is_node_operator(bits, depth, max_depth):
  if depth == 1:  # a digit alone is never long enough: the root is an operator, as if drawn anew until it is one
    return np.ones(len(bits), bool)
  return _is_operator(bits) if depth < max_depth else np.zeros(len(bits), bool)


def _ranks(counts):
  """0 … c − 1 for every count c, in one array."""
  return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _draw_roots(seed, indices, limits):
  """Bits of the root (N,) and number of tokens (N,) of the first tree in the sequence of each index that fits."""
  key = mix(np.array([seed % 2**64], np.uint64) + GOLDEN)  # an array: it may wrap around without a warning
  streams = child_bits(np.repeat(key, len(indices)), indices)
  roots = np.zeros(len(indices), np.uint64)
  lengths = np.zeros(len(indices), np.int32)
  pending = np.arange(len(indices))
  attempt, tries = 0, 8
  while len(pending):
    trial = np.tile(np.arange(attempt, attempt + tries), len(pending))
    bits = child_bits(np.repeat(streams[pending], tries), trial)
    tokens = _count_tokens(bits, limits).reshape(-1, tries)
    fits = (tokens > limits[0]) & (tokens < limits[1])
    best = fits.argmax(1)
    done = fits.any(1)
    rows = pending[done]
    roots[rows] = bits.reshape(-1, tries)[done, best[done]]
    lengths[rows] = tokens[done, best[done]]
    pending = pending[~done]
    attempt += tries
  return roots, lengths


def _count_tokens(roots, limits):
  """(T,) number of tokens of each tree; of one that is too long, some number that is too large."""
  _, max_length, max_depth, max_arguments = limits
  total = np.zeros(len(roots), np.int64)
  bits, tree = roots, np.arange(len(roots))
  for depth in range(1, max_depth + 1):
    operator = _is_node_operator(bits, depth, max_depth)
    total += np.bincount(tree, 1.0 + operator, len(roots)).astype(np.int64)
    keep = operator & (total < max_length)[tree]
    bits, tree = bits[keep], tree[keep]
    counts = _arguments(bits, max_arguments)
    bits = child_bits(np.repeat(bits, counts), _ranks(counts))
    tree = np.repeat(tree, counts)
  return total


def _write(roots, max_depth, max_arguments, out_NL):
  """Writes the trees' tokens into rows of zeros, (N, L) uint8; returns their values (N,)."""
  levels = []  # from the root down: bits of the nodes, which are operators, how many arguments those have
  bits = roots
  for depth in range(1, max_depth + 1):
    operator = _is_node_operator(bits, depth, max_depth)
    counts = _arguments(bits[operator], max_arguments)
    levels.append((bits, operator, counts))
    bits = child_bits(np.repeat(bits[operator], counts), _ranks(counts))
  sizes = [None] * max_depth  # tokens of every node with all below it
  value = np.zeros(0, np.int64)
  for depth in reversed(range(max_depth)):
    bits, operator, counts = levels[depth]
    below, children = value, sizes[depth + 1] if depth + 1 < max_depth else None
    value = ((bits & np.uint64(0xFFFF)) * np.uint64(10) >> np.uint64(16)).astype(np.int64)
    sizes[depth] = np.ones(len(bits), np.int64)
    if len(counts):
      starts = np.cumsum(counts) - counts
      sizes[depth][operator] = 2 + np.add.reduceat(children, starts)
      value[operator] = _apply(bits[operator] & np.uint64(3), below, starts, counts)
  place = np.arange(len(roots)) * out_NL.shape[1]
  flat = out_NL.reshape(-1)
  for (bits, operator, counts), size, children in zip(levels, sizes, [*sizes[1:], None], strict=True):
    digit = ((bits & np.uint64(0xFFFF)) * np.uint64(10) >> np.uint64(16)).astype(np.uint8) + 1
    name = (bits & np.uint64(3)).astype(np.uint8) + _FIRST_OPERATOR
    flat[place] = np.where(operator, name, digit)
    flat[(place + size - 1)[operator]] = _CLOSE
    if children is not None and len(children):
      before = np.cumsum(children) - children  # tokens of all nodes before in this level
      starts = np.cumsum(counts) - counts
      place = np.repeat(place[operator] + 1 - before[starts], counts) + before
    else:
      break
  return value


def _apply(names, values, starts, counts):
  """Values of operators 0 … 3 (MIN, MAX, MED, SM) over groups of values that lie one after another."""
  group = np.repeat(np.arange(len(counts)), counts)
  ordered = np.sort(group * 10 + values) - group * 10  # each group ascending
  median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
  smallest, largest = ordered[starts], ordered[starts + counts - 1]
  return np.choose(names.astype(np.int64), [smallest, largest, median, np.add.reduceat(values, starts) % 10])
