#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs, obtained as a queued resource.
#
#   export NAME=magnet ZONE=us-central1-a ACCELERATOR=v5litepod-16
#   launch/cluster/tpu_vm.sh create          # asks for the slice
#   launch/cluster/tpu_vm.sh wait            # until it is there
#   launch/cluster/tpu_vm.sh install         # copies the committed repository and installs it
#   launch/cluster/tpu_vm.sh run --config music_small_10s --data /mnt/share/DATA \
#       --out /mnt/share/RUN
#   launch/cluster/tpu_vm.sh follow          # the first host's output; Ctrl-C leaves the run alone
#   launch/cluster/tpu_vm.sh stop            # SIGTERM: saves at the next step; `run` goes on there
#   launch/cluster/tpu_vm.sh delete          # stops paying
#
# What follows `run` is the command line of `python -m launch.train`, the same as on a laptop; it
# starts on every host and outlives this shell. A slice that was preempted is deleted, and created,
# waited for, installed and run with the same words.
#
# Variables:
#   NAME, ZONE     of the slice
#   ACCELERATOR    its type (create), as `gcloud compute tpus accelerator-types list` has them
#   RUNTIME        its system (create); v2-alpha-tpuv5-lite by default, each type has its own
#   PROJECT        another project than gcloud's
#   SPOT=1         asks for cheaper hosts, which may be taken away (create)
#   MOUNT          a command that every host runs at the end of `install`, to see the same folders:
#                  MOUNT='sudo mkdir -p /mnt/share && sudo mount 10.0.0.2:/share /mnt/share'
#
# Needs: gcloud, logged in; git; unless the slice has one host only, a place that all hosts see for
# RUN: a folder (Filestore) or gs://BUCKET/RUN. DATA may be in that folder, or a copy on each host:
#   MOUNT='cd magnet_jax && mkdir -p DATA && gcloud storage rsync -r gs://BUCKET/DATA DATA'
set -euo pipefail

usage="usage: tpu_vm.sh create|wait|install|run|follow|stop|delete"
action="${1:?$usage}"
shift
: "${NAME:?set NAME, the name of the slice}"
: "${ZONE:?set ZONE, as in us-central1-a}"
where=(--zone="$ZONE")
if [[ -n "${PROJECT:-}" ]]; then where+=(--project="$PROJECT"); fi

on() { # on WORKER COMMAND: runs it there, or on every host if WORKER is all
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

case "$action" in
  create)
    options=(--node-id="$NAME" --accelerator-type="${ACCELERATOR:?set ACCELERATOR}")
    options+=(--runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}")
    if [[ "${SPOT:-}" == 1 ]]; then options+=(--spot); fi
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}"
    ;;
  wait)
    while true; do
      state="$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
        --format='value(state.state)')"
      echo "$NAME: $state"
      case "$state" in
        ACTIVE) break ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING)
          echo "error: $NAME is $state and will not come: delete it and create another" >&2
          exit 1
          ;;
      esac
      sleep "${POLL_SECONDS:-30}"
    done
    ;;
  install)
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$folder/magnet_jax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$folder/magnet_jax.tar.gz" "$NAME:" "${where[@]}" --worker=all
    # The images' own Python may be older than 3.11; uv brings one.
    on all 'set -e; mkdir -p magnet_jax; tar -xzf magnet_jax.tar.gz -C magnet_jax; cd magnet_jax
      python3 -m pip install --quiet --user uv
      test -x .venv/bin/python || python3 -m uv venv --quiet --python 3.11 .venv
      python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu,gcs]"'
    if [[ -n "${MOUNT:-}" ]]; then on all "$MOUNT"; fi
    ;;
  run)
    printf -v words ' %q' "$@"
    # One run a host: a second one could not have the chips, and would only say so late.
    on all "cd magnet_jax || exit 2
      if kill -0 \"\$(cat train.pid 2>/dev/null)\" 2>/dev/null; then
        echo 'error: a run is going on here: stop it first' >&2; exit 2; fi
      nohup .venv/bin/python -u -m launch.train$words > train.log 2>&1 < /dev/null &
      echo \$! > train.pid"
    ;;
  follow)
    on 0 'tail -n 100 -F magnet_jax/train.log'
    ;;
  stop)
    # Waits until all have saved, so that what comes next (delete) cuts nothing short.
    # shellcheck disable=SC2016  # expands on the hosts
    on all 'cd magnet_jax || exit 2
      pid="$(cat train.pid)"; kill -TERM "$pid" 2>/dev/null || true
      while kill -0 "$pid" 2>/dev/null; do sleep 1; done; tail -n 1 train.log'
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
