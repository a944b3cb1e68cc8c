#!/usr/bin/env bash
# A real Slurm of one node on loopback, without systemd: for tests, as root, on Debian or Ubuntu.
#
#   slurm.sh start      install slurm-wlm and munge if they are missing (apt), write a configuration, start the daemons
#   slurm.sh stop       cancel all jobs, stop the daemons, remove what start has written
#   slurm.sh env        print what a shell needs to use it: eval "$(tests/cluster/slurm.sh env)"
#
#   SLURM_TEST_CPUS=4   cores the node offers; may be more than there are
#
# Nothing is written but below $home, and a line for the host's name in /etc/hosts.
set -euo pipefail

home=/run/calibrant-slurm  # not in /tmp: munge wants folders that only root can write to
here=$(cd "$(dirname "$0")" && pwd)
host=$(hostname -s)
cpus=${SLURM_TEST_CPUS:-4}
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
export SLURM_CONF=$home/slurm.conf

fail() { echo "$1" >&2; exit 1; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
patiently() { for _ in $(seq 100); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; return 1; }
is_up() { scontrol ping | grep -q UP; }
is_idle() { [ "$(sinfo -h -o %T)" = idle ]; }
is_empty() { [ -z "$(squeue -h)" ]; }

install_packages() {
    command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v srun >/dev/null && return 0
    command -v apt-get >/dev/null || fail "slurmctld and munged are not installed, and there is no apt-get to install them"
    export DEBIAN_FRONTEND=noninteractive
    local policy=/usr/sbin/policy-rc.d ours=false
    if [ ! -e $policy ]; then  # keeps the packages from starting daemons of their own
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && ours=true
    fi
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >"$home/apt.log" 2>&1 ||
        fail "apt-get could not install slurm-wlm and munge: $(tail -2 "$home/apt.log")"
    if $ours; then rm -f $policy; fi
}

write_configuration() {
    getent hosts "$host" | grep -q '^127\.' || echo "127.0.0.1 $host" >>/etc/hosts
    mkdir -p "$home/state" "$home/spool"
    # cred_expire: a requeued job waits that long before it may run again. MinJobAge: bin/sacct asks for jobs that ended.
    # No cgroups and no accounting, which a container rarely allows. KillWait: seconds from SIGTERM to SIGKILL.
    cat >"$SLURM_CONF" <<CONF
ClusterName=calibrant
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
MinJobAge=86400
KillWait=10
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    printf 'ConstrainCores=no\nConstrainRAMSpace=no\n' >"$home/cgroup.conf"
    (umask 077 && head -c 1024 /dev/urandom >"$home/munge.key")
}

start() {
    [ "$(id -u)" = 0 ] || fail "Slurm's daemons need root"
    mkdir -p -m 755 "$home"
    alive "$home/slurmctld.pid" && fail "it runs already: tests/cluster/slurm.sh stop"
    install_packages
    write_configuration
    munged --force --socket="$home/munge.socket" --key-file="$home/munge.key" --pid-file="$home/munged.pid" \
        --log-file="$home/munged.log" --seed-file="$home/munged.seed"
    slurmctld -c
    patiently is_up || fail "slurmctld did not come up: $(tail -3 "$home/slurmctld.log")"
    slurmd
    patiently is_idle || fail "the node did not become idle: $(sinfo -h -o '%T %E'; tail -3 "$home/slurmd.log")"
}

stop() {
    if [ -e "$SLURM_CONF" ] && timeout 5 scontrol ping 2>/dev/null | grep -q UP; then
        squeue -h -o %A | sort -u | xargs -r scancel --signal=KILL --full 2>/dev/null || true
        squeue -h -o %A | sort -u | xargs -r scancel 2>/dev/null || true
        patiently is_empty || true
    fi
    for name in slurmd slurmctld munged; do
        alive "$home/$name.pid" || continue
        local pid
        pid=$(cat "$home/$name.pid")
        kill "$pid" && patiently eval "! kill -0 $pid" || kill -9 "$pid"
    done
    rm -rf "$home"
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    env) echo "export SLURM_CONF=$SLURM_CONF PATH=$here/bin:\$PATH" ;;
    *) sed -n 2,12p "$0"; exit 2 ;;
esac
