#!/bin/sh
# Submits a command as a Ray job and follows it to its end: sh jobs/cluster/submit.sh python jobs/nightly_eval.py ...
# RAY_API_SERVER_ADDRESS is the dashboard's address; the current folder is uploaded. Ends with the command's own exit code,
# which `ray job submit` turns into 1, so that an alarm (3) can be told from a failure.
id="${JOB_NAME:-job}-$(date -u +%Y%m%dT%H%M%S)-$$"
ray job submit --submission-id "$id" --working-dir . -- "$@" && exit 0
code=$(ray job status "$id" 2>&1 | sed -n 's/.*command failed with exit code \([0-9][0-9]*\).*/\1/p' | head -n 1)
exit "${code:-1}"
