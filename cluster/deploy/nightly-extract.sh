#!/usr/bin/env bash
# One night's extraction on a running Ray cluster, for cron: nightly-extract.sh --config conf/own.yaml [key=value …]
#
# Submits prepare-and-extract.sh as a Ray job, waits for it, and ends with its exit status (0 done, 2 bad
# configuration, 3 bad data, 4 the run failed); 75 where the last night's is still running, and 4 where the
# cluster cannot be reached. Ended early (TERM, INT), it stops the job.
#
#   RAY_API_SERVER_ADDRESS   the cluster's dashboard, http://127.0.0.1:8265 if unset
#   RAY_AUTH_TOKEN           or ~/.ray/auth_token: the cluster's token
#   GARE_LOGS                where extract-DATE.log and the lock are, ~/.gare/logs if unset
set -uo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$repository" || exit 4
# cron's PATH is short.
if [ -d "$repository/.venv/bin" ]; then PATH=$repository/.venv/bin:$PATH; fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

logs=${GARE_LOGS:-$HOME/.gare/logs}
mkdir -p "$logs" || exit 4
log=$logs/extract-$(date +%F).log
exec 3>&2 >>"$log" 2>&1
say() { echo "$(date '+%F %T') $*"; }
# What is written to the first standard error is mailed by cron: nothing of a good night, the log's end of a bad one.
end() {
  say "$2"
  [ "$1" = 0 ] || { echo "$log ends:" && tail -n 20 "$log"; } >&3
  exit "$1"
}

exec 9>"$logs/extract.lock"
flock --nonblock 9 || end 75 "left out: the last night's extraction is still running ($logs/extract.lock is held)"

job=nightly-$(date +%Y%m%dT%H%M%S)-$$
trap 'ray job stop --no-wait "$job" 9>&-; end 4 "$job was stopped"' TERM INT
say "submitting $job"
# In the background and waited for, since bash runs a trap only once the command in front of it has ended.
# Without the lock and cron's mail: a client that outlives this script must keep neither the next night nor cron.
ray job submit --submission-id "$job" --working-dir . -- \
  sh cluster/deploy/prepare-and-extract.sh "$@" 3>&- 9>&- &
wait $!

# `ray job submit` answers 1 whatever the job's own status was.
status=$(python - "$job" 9>&- <<'PY'
import sys

from ray.job_submission import JobStatus, JobSubmissionClient

job = JobSubmissionClient().get_job_info(sys.argv[1])
print(0 if job.status == JobStatus.SUCCEEDED else job.driver_exit_code or 4)
PY
) || status=4
end "$status" "$job ended with status $status"
