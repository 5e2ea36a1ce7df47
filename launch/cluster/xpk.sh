#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs that was made by xpk.
#
#   export CLUSTER=my-cluster WORKLOAD=magnet-1 TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/magnet_jax
#   launch/cluster/xpk.sh --config music_small_10s --data /data/DATA --out /data/RUN
#
# The arguments are the command line of `python -m launch.train`, the same as on a laptop. xpk makes
# a JobSet of them; a pod that is evicted or fails restarts all, and the run goes on from its last
# checkpoint. Afterwards: `xpk workload delete --workload WORKLOAD --cluster CLUSTER`.
#
# Variables:
#   CLUSTER, WORKLOAD, TPU_TYPE   as xpk has them
#   IMAGE         with this repository installed, see gke_jobset.yaml
#   NUM_SLICES    1 by default
#   MAX_RESTARTS  50 by default; xpk restarts upon mistakes as well
#   SPARE         further options of `xpk workload create`, in words: SPARE='--zone us-east5-b'
#
# Needs: xpk and gcloud, logged in; DATA and RUN in a folder that all pods see, attached to the
# cluster with `xpk storage attach`.
set -euo pipefail

read -r -a spare <<< "${SPARE:-}"
printf -v words ' %q' "$@"
# exec: SIGTERM reaches the program and not a shell around it.
xpk workload create \
  --cluster="${CLUSTER:?set CLUSTER}" --workload="${WORKLOAD:?set WORKLOAD}" \
  --tpu-type="${TPU_TYPE:?set TPU_TYPE}" --num-slices="${NUM_SLICES:-1}" \
  --docker-image="${IMAGE:?set IMAGE}" --max-restarts="${MAX_RESTARTS:-50}" \
  ${spare[@]+"${spare[@]}"} --command="exec python -u -m launch.train$words"
