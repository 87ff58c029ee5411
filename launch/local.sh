#!/usr/bin/env bash
# Starts N processes of one run on this host:  launch/local.sh N configs/vit.py:cifar10 [--workdir W] [flags of lra_jax.main]
#
# Process i takes the i-th GPU of CUDA_VISIBLE_DEVICES, or of the host (GPUS_PER_PROCESS=2 gives it two of them). Without
# GPUs, or with JAX_PLATFORMS=cpu, it has CPUS devices of the CPU (CPUS=1).
# Lines of process i start with [i]; process 0 has the progress bar. When one process ends with an error, all others are
# ended within 30 seconds, and the exit code is its. Ctrl-C and SIGTERM are passed on: all save the same step and end; a
# second one kills them.
# PYTHON names the interpreter. Needs bash 5.1.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: launch/local.sh needs bash 5.1 or newer, this is $BASH_VERSION" >&2
  exit 2
fi
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: expected a number of processes and a config, as in: launch/local.sh 2 configs/vit.py:cifar10" >&2
  exit 2
fi
count=$1 config=$2
shift 2
python=${PYTHON:-python}
if ! command -v "$python" >/dev/null; then
  echo "error: no interpreter $python; activate the environment, or name one: PYTHON=.venv/bin/python launch/local.sh ..." >&2
  exit 2
fi

per_process=${GPUS_PER_PROCESS:-1}
gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null 2>&1; then
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
  if ((${#gpus[@]} < count * per_process)); then
    echo "error: $count processes with $per_process GPUs each, but there are ${#gpus[@]} GPUs; start fewer" >&2
    exit 2
  fi
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export LRA_JAX_PROCESSES=$count LRA_JAX_COORDINATOR=127.0.0.1:$port
pids=()
for ((i = 0; i < count; i++)); do
  (
    export LRA_JAX_PROCESS=$i
    if ((${#gpus[@]})); then
      CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i * per_process:per_process}")
      export CUDA_VISIBLE_DEVICES
    else
      export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${CPUS:-1}
    fi
    if ((i == 0)); then
      exec "$python" -u -m lra_jax.main --config "$config" "$@"
    fi
    exec "$python" -u -m lra_jax.main --config "$config" "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2)
  ) &
  pids+=($!)
done

number=TERM
# shellcheck disable=SC2329  # by trap
pass_on() {
  kill -$number "${pids[@]}" 2>/dev/null || true
  number=KILL
}
trap pass_on INT TERM

code=0 left=$count
while ((left > 0)); do
  one=0
  wait -n -p ended "${pids[@]}" || one=$?
  [[ -n ${ended:-} ]] || continue # a signal woke us
  left=$((left - 1))
  for i in "${!pids[@]}"; do
    if [[ ${pids[i]} == "$ended" ]]; then
      which=$i
      unset "pids[i]"
      break
    fi
  done
  if ((one != 0 && code == 0)); then
    code=$one
    if ((left > 0)); then
      echo "error: process $which ended with exit code $one; ending the others" >&2
      (sleep 30; kill -KILL "${pids[@]}") >/dev/null 2>&1 &
      killer=$!
    fi
  fi
done
[[ -z ${killer:-} ]] || kill "$killer" 2>/dev/null || true
exit "$code"
