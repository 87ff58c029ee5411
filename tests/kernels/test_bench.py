"""The benchmark of the operations as a command."""

import csv


def test_bench_measures_what_can_serve_and_says_what_cannot(python, tmp_path):
  file = tmp_path / "rows.csv"
  arguments = ("linear_recurrence", "--shape", "digits", "--rounds", "2", "--grad", "--csv", file)
  process = python("kernels.bench", *arguments)
  assert process.returncode == 0, process.stderr
  assert "mosaic left out: linear_recurrence: implementation='mosaic' cannot serve: it needs" in process.stderr
  rows = list(csv.DictReader(file.read_text().splitlines()))
  assert {row["implementation"] for row in rows} == {"sequential", "associative"}
  assert all(float(row["milliseconds"]) > 0 and row["what"] == "gradient" for row in rows)
  times = [float(row["milliseconds"]) for row in rows]
  assert abs(float(rows[0]["ratio"]) - times[0] / times[1]) < 1e-6
  assert process.stdout.count("linear_recurrence digits") == 2
