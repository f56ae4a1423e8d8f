#!/bin/sh
# One night's RayJob from the manifest given, for a CronJob: makes it, waits for its end, and fails where it failed.
# The name of the RayJob is the lock: where the last night's is still at work, this one leaves it alone and ends
# with 75.
set -eu
manifest=$1
every_s=${POLL_S:-30}
job=$(kubectl create --dry-run=client -f "$manifest" -o 'jsonpath={.metadata.name}')

# A question that gets no answer is asked again: the API server may be away for a moment.
ask() { kubectl get rayjob "$job" --ignore-not-found -o "jsonpath={.metadata.name} {.status.$1}" || echo "$job unanswered"; }

while :; do
  case $(ask jobDeploymentStatus) in
    '') break ;;
    "$job Complete" | "$job Failed" | "$job ValidationFailed") kubectl delete rayjob "$job" --wait ;;
    "$job unanswered") sleep "$every_s" ;;
    *) echo "left out: the last night's $job is still at work"; exit 75 ;;
  esac
done
kubectl create -f "$manifest"
while :; do
  case $(ask jobDeploymentStatus) in
    '') echo "$job is gone: somebody deleted it"; exit 1 ;;
    "$job Complete" | "$job Failed" | "$job ValidationFailed") break ;;
  esac
  sleep "$every_s"
done
result=$(ask jobStatus)
echo "$result $(ask message)"
[ "$result" = "$job SUCCEEDED" ]
