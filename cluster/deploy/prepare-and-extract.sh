#!/bin/sh
# What a scheduled job runs: the manifest first, so that what came since the last night is in it, then the
# store. Both get all arguments: --config FILE and section.key=value. Ends with the status of the step that
# failed, as the steps themselves do.
set -eu
cd "$(dirname "$0")/../.."
python pipelines/prepare.py "$@"
exec python pipelines/extract.py "$@"
