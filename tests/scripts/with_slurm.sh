#!/bin/sh
# On host0 of an emulated cluster: start Slurm on all hosts and run the command "$@" when they are idle.
set -eu
own=/dev/shm/slurm # of each host; what they share lies where host0's is seen by all
SLURM_CONF=/dev/shm/emulate/slurm/slurm.conf
export SLURM_CONF
shared=${SLURM_CONF%/*}
hosts=$(cut -d' ' -f1 "$ESPRESSO_HOSTFILE")
mkdir -p "$shared" "$own/state"
cat >"$SLURM_CONF" <<CONF
ClusterName=emulated
SlurmctldHost=host0
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$shared/munge
StateSaveLocation=$own/state
SlurmdSpoolDir=$own/spool
SlurmctldPidFile=$own/slurmctld.pid
SlurmdPidFile=$own/slurmd.pid
SlurmctldLogFile=$shared/slurmctld.log
SlurmdLogFile=$shared/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/linear
ReturnToService=2
NodeName=$(echo $hosts | tr ' ' ',') CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES
CONF
echo CgroupPlugin=cgroup/v1 >"$shared/cgroup.conf" # named, so that slurmd doesn't look for what the hosts' /sys lacks
head -c 128 /dev/urandom >"$own/munge.key"
chmod 600 "$own/munge.key"
munged --force --key-file="$own/munge.key" --socket="$shared/munge" --log-file="$shared/munge.log" \
    --pid-file="$own/munge.pid" --seed-file="$own/munge.seed"
slurmctld
for host in $hosts; do
    ssh "$host" "mkdir -p $own/spool && SLURM_CONF=$SLURM_CONF slurmd -N $host"
done
tries=0
until [ "$(sinfo --noheader --Node --states=idle | wc -l)" = "$(echo "$hosts" | wc -l)" ]; do
    tries=$((tries + 1))
    if [ $tries = 100 ]; then
        sinfo
        tail -n 5 "$shared"/*.log
        exit 1
    fi
    sleep 0.2
done
exec "$@"
