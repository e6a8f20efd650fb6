#!/bin/bash
{{options}}
# A job of upcycle: {{what}}.
# A site may edit a copy of this file and give it as launch.template=FILE. What stands in double braces is filled in at submission.

# Before the time limit Slurm sends USR1, to this script alone and up to a minute early. Training then writes a checkpoint, and the job is queued
# again. A stage without checkpoints has {{patience}} seconds left to come to its end. TERM (preemption, scancel) stops training too; whether the job comes back
# is then Slurm's to say.
limit=no
work=
at_limit() {
    limit=yes
    touch "$UPCYCLE_STOP_FILE"
    (sleep {{patience}}; [ -z "$work" ] || kill -TERM "$work" 2> /dev/null) &
}
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
export UPCYCLE_STOP_FILE={{run}}/slurm/stop-$job
rm -f "$UPCYCLE_STOP_FILE"
trap at_limit USR1
trap 'touch "$UPCYCLE_STOP_FILE"' TERM

{{setup}}
# The copy that was made at submission, not a package that lies in the working directory.
export PYTHONPATH={{code}}${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
cd {{here}} || exit 1

# Stages of one array are a task each; other jobs have one entry, a stage or several that follow one another.
stages=({{stages}})
stage=${stages[${SLURM_ARRAY_TASK_ID:-0}]}

# Where the processes of all nodes meet: a port of the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" -o | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
export UPCYCLE_JOB=${address:-$first}:$((20000 + SLURM_JOB_ID % 20000))

[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun no longer takes over by itself
echo "$(date '+%F %T') $stage on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
srun --kill-on-bad-exit=1 --ntasks-per-node=1 {{command}} &
work=$!
while kill -0 "$work" 2> /dev/null; do wait "$work"; done  # a signal ends `wait` before its time
wait "$work"
code=$?
rm -f "$UPCYCLE_STOP_FILE"

# 75: a checkpoint was written. Without one, starting again can only help where the stage came late to its work: once.
restarts={{restarts}}
[ $code -eq 75 ] || restarts=1
if [ $code -ne 0 ] && [ $limit = yes ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
        echo "upcycle: $stage is not done at its time limit, after $((SLURM_RESTART_COUNT + 1)) starts; give it more time, nodes or launch.restarts" >&2
        exit 1
    fi
    echo "upcycle: the time limit is near; $stage goes on when Slurm starts this job again"
    scontrol requeue "$job" && sleep 60  # which ends here
fi
exit $code
