#!/usr/bin/env bash
# Two simulated hosts on one machine, for what happens between machines.
#
#   scripts/cluster.sh start DIR      two hosts; DIR must not exist
#   scripts/cluster.sh ray DIR        a Ray node on each: the head on host 1; one worker each
#   scripts/cluster.sh run DIR HOST COMMAND...
#   scripts/cluster.sh stop DIR       ends everything that runs on the hosts, and deletes DIR
#
# Hosts are named 1 and 2. Each has processes, mounts, /dev/shm, network and address of its own, and
# its own DIR/local, with TMPDIR in it: one path that is another folder on every host, as /tmp is on
# two machines. The rest of the file system is shared. `run` says where the Ray of `ray` is: without
# RAY_ADDRESS vLLM would start another one, for itself. All of a host is in Linux namespaces that one
# process holds: they end with it, whoever ends it. Needs root, and the programs ip and unshare.
# DIR should be short: Ray keeps sockets below it, whose paths have 107 bytes at most.
set -Eeuo pipefail

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '4,7s/^#   //p' "$0" >&2
    exit 2
}

address() { echo "10.77.0.$1"; }

# The process that holds the namespaces of a host, found by its arguments: they are there before
# anything could note its id.
holder() { pgrep -f "^bash -c .* cluster-host$1 $dir\$"; }

on_host() { # HOST COMMAND...
    local host=$1 pid
    shift
    pid=$(holder "$host") || fail "host $host of $dir does not run; start it with: $0 start $dir"
    nsenter --target "$pid" --mount --net --ipc --pid --wd="$PWD" env \
        TMPDIR="$dir/local/tmp" VLLM_HOST_IP="$(address "$host")" \
        GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 "$@"
}

start_host() {
    local host=$1
    mkdir -p "$dir/host$host/tmp"
    # Its first process: when it is killed, the kernel kills all others of the host. It waits for
    # children that others left, or they would stay in the table of processes. It ends when its
    # directory is gone: "start" may be killed where "stop" cannot find this process yet.
    setsid unshare --mount --net --ipc --pid --fork --kill-child --mount-proc \
        bash -c 'while [ -d "$1" ]; do sleep 1 & wait; done' "cluster-host$host" "$dir" \
        >"$dir/host$host.log" 2>&1 </dev/null &
    for _ in $(seq 100); do
        holder "$host" >/dev/null && break
        sleep 0.05
    done
    holder "$host" >/dev/null || {
        cat "$dir/host$host.log" >&2
        return 1
    }
    on_host "$host" mount -t tmpfs -o size=4g tmpfs /dev/shm
    on_host "$host" mount --bind "$dir/host$host" "$dir/local"
    on_host "$host" ip link set lo up
}

start() {
    [ "$(id -u)" = 0 ] || fail "needs root, for network and mount namespaces"
    for program in ip unshare nsenter; do
        command -v "$program" >/dev/null || fail "needs the program $program"
    done
    mkdir "$dir" || fail "$dir exists; choose another folder, or end it with: $0 stop $dir"
    trap 'stop; fail "did not start"' ERR INT TERM
    mkdir "$dir/local"
    start_host 1
    start_host 2
    ip link add vmo-host1 netns "$(holder 1)" type veth peer name eth0 netns "$(holder 2)"
    on_host 1 ip link set vmo-host1 name eth0
    for host in 1 2; do
        on_host "$host" ip address add "$(address "$host")/24" dev eth0
        on_host "$host" ip link set eth0 up
    done
    trap - ERR INT TERM
}

# Object stores for the little that vLLM sends. Workers are not niced: Ray does that by 15 unless it is
# told otherwise, and they would wait for everything else that runs on the machine.
start_ray() {
    local host role
    for host in 1 2; do
        role=(--address "$(address 1):6379")
        [ "$host" = 1 ] && role=(--head --port 6379 --include-dashboard=false)
        on_host "$host" env RAY_worker_niceness=0 "${RAY:-ray}" start "${role[@]}" \
            --node-ip-address "$(address "$host")" --num-cpus 1 --num-gpus 1 \
            --object-store-memory 100000000 --disable-usage-stats \
            --temp-dir "$dir/local/ray" >"$dir/ray$host.log" 2>&1 ||
            fail "no Ray on host $host: $(cat "$dir/ray$host.log")"
    done
}

stop() {
    local pid host
    for host in 1 2; do
        pid=$(holder "$host") || continue
        kill -KILL "$pid"
        while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
    done
    rm -rf "$dir"
}

[ $# -ge 2 ] || usage
command=$1 dir=$(realpath -m "$2")
shift 2
case $command in
start) start ;;
ray) start_ray ;;
run)
    [ $# -ge 2 ] || usage
    host=$1
    shift
    on_host "$host" env RAY_ADDRESS="$(address 1):6379" "$@"
    ;;
stop) stop ;;
*) usage ;;
esac
