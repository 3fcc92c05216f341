#!/usr/bin/env bash
# Runs a job as root in a User-Mode Linux guest whose kernel has rxe and siw: no module, no root, no KVM needed.
# usage: guest-run.sh JOB.sh OUTDIR      exit status: the job's; 125 when the guest did not come up or died
#
# The guest's root is this machine's, read-only; what the job writes under /run/out lands in OUTDIR.
# RXE_KERNEL names another kernel; RXE_MEMORY its memory (1G); RXE_SECONDS the time after which it is killed (300).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
job=$(readlink -f "$1")
mkdir -p "$2"
out=$(readlink -f "$2")
rm -f "$out/exitcode"

kernel=${RXE_KERNEL:-}
if [ -z "$kernel" ]; then
  cache=${CARGO_TARGET_DIR:-$here/../../target}/rxe
  kernel=$cache/linux-uml-7.3
  if [ ! -x "$kernel" ] || [ "$here/linux-uml-7.3.xz" -nt "$kernel" ]; then
    mkdir -p "$cache"
    xz -dc "$here/linux-uml-7.3.xz" >"$kernel.$$"
    chmod +x "$kernel.$$"
    mv "$kernel.$$" "$kernel"
  fi
fi

# The guest's memory is an unlinked file that must be mappable for execution.
scratch=
for folder in /dev/shm "${TMPDIR:-/tmp}" /var/tmp; do
  free=$(df --output=avail -k "$folder" 2>/dev/null | tail -n 1) || continue
  if [ "$free" -gt 1200000 ] && ! findmnt -no OPTIONS -T "$folder" | grep -qw noexec; then
    scratch=$folder
    break
  fi
done
[ -n "$scratch" ] || { echo "error: no folder with 1.2 GB free and without noexec for the guest's memory" >&2; exit 125; }

# perftest reads the processor's frequency, which the guest's kernel does not know.
mhz=$(awk '/cpu MHz/ { print $4; exit }' /proc/cpuinfo)
# A guest that hangs is killed with all of its processes, which are in one session.
TMPDIR=$scratch timeout --kill-after=5 "${RXE_SECONDS:-300}" \
  "$kernel" mem="${RXE_MEMORY:-1G}" root=/dev/root rootfstype=hostfs hostfs=/ ro quiet loglevel=3 con=null con0=fd:0,fd:1 \
  init="$here/guest-init.sh" seccomp=on ncpus=2 RXE_MHZ="$mhz" RXE_JOB="$job" RXE_OUT="$out" </dev/null || true
exit "$(cat "$out/exitcode" 2>/dev/null || echo 125)"
