#!/usr/bin/env bash
# Runs one mtl-jax command on every worker of a Cloud TPU slice. See README.md here.
#
#   TPU=my-slice ZONE=us-west4-a experiments/launch/tpu.sh \
#     run experiments/configs/tall_masks.py:paper --workdir gs://my-bucket/tall_masks
set -euo pipefail

usage() {
  echo "usage: TPU=NAME ZONE=ZONE [PROJECT=ID] [REF=GIT_REF] $0 run CONFIG --workdir gs://..." >&2
  exit 2
}

[ "$#" -ge 2 ] || usage
: "${TPU:?name of the TPU slice (gcloud compute tpus tpu-vm list)}"
: "${ZONE:?zone of the TPU slice}"

case " $* " in
*" --workdir gs://"* | *" --workdir=gs://"*) ;;
*)
  echo "$0: wants --workdir gs://...: every worker must see the same directory" >&2
  exit 2
  ;;
esac

cd "$(git rev-parse --show-toplevel)"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all)
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# What is committed, nothing else: the run can be repeated from the revision.
revision="$(git rev-parse "${REF:-HEAD}")"
git archive --format=tar.gz --output="$folder/mtl_jax.tar.gz" "$revision"

# Runs on each worker: unpack, install once, join the others, run.
cat >"$folder/mtl_jax_worker.sh" <<'WORKER'
#!/usr/bin/env bash
set -euo pipefail
metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
cd "$HOME"
rm -rf mtl_jax && mkdir mtl_jax && tar -xzf mtl_jax.tar.gz -C mtl_jax
[ -d mtl_jax_env ] || python3 -m venv mtl_jax_env
cd mtl_jax
"$HOME/mtl_jax_env/bin/pip" install --quiet -e '.[demo,tpu]'

# Endpoints are hosts, or name:id:address; worker 0 coordinates.
endpoints="$(metadata worker-network-endpoints)"
IFS=, read -r -a workers <<<"$endpoints"
export MTL_JAX_NUM_PROCESSES="${#workers[@]}"
export MTL_JAX_PROCESS_ID="$(metadata agent-worker-number)"
export MTL_JAX_COORDINATOR="${workers[0]##*:}:8476"
exec "$HOME/mtl_jax_env/bin/mtl-jax" "$@"
WORKER

echo "revision $revision on every worker of $TPU: mtl-jax $*"
gcloud compute tpus tpu-vm scp \
  "$folder/mtl_jax.tar.gz" "$folder/mtl_jax_worker.sh" "$TPU:" "${where[@]}"
gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" \
  --command="bash mtl_jax_worker.sh $(printf '%q ' "$@")"
