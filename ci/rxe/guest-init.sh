#!/bin/bash
# The first process of the guest: mounts what programs expect, runs the job, powers off.
# From the kernel's command line: RXE_JOB, RXE_OUT (the host's folder behind /run/out), RXE_MHZ.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/tmp
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t configfs configfs /sys/kernel/config 2>/dev/null
ln -sfn /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
mkdir -p /run/netns /run/rdma /run/out /run/tmp
export TMPDIR=/run/tmp
ulimit -l unlimited
mount -t hostfs hostfs /run/out -o "$RXE_OUT"
ip link set lo up
if [ -n "$RXE_MHZ" ] && ! grep -q 'cpu MHz' /proc/cpuinfo; then
  sed "s/^bogomips/cpu MHz\t\t: $RXE_MHZ\nbogomips/" /proc/cpuinfo >/run/cpuinfo
  mount --bind /run/cpuinfo /proc/cpuinfo
fi
cd /run || exit
/bin/bash "$RXE_JOB" </dev/null
echo $? >/run/out/exitcode
sync
exec busybox poweroff -f
