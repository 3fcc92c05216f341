#!/usr/bin/env bash
# Makes a Soft-RoCE device (or, with --iwarp, a soft iWARP one) of the Linux kernel on a network interface.
#
# usage: rxe-setup.sh [add|remove|status] [NETDEV] [NAME] [--iwarp]
#
#   add      makes NAME (rxe0; siw0 with --iwarp) on NETDEV (default: the interface of the default route) and prints the
#            GID to use. Does nothing if it is there already.
#   remove   removes NAME, or every device of this kind on NETDEV. Does nothing if there is none.
#   status   lists the devices and says what is missing. The default.
#
# Exit status: 0 done; 1 something is missing or failed, and it says what; 2 the arguments are wrong.
set -euo pipefail

kind=rxe module=rdma_rxe words=()
for argument in "$@"; do
  case $argument in
    --iwarp) kind=siw module=siw ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) echo "error: unknown option $argument (see $0 --help)" >&2; exit 2 ;;
    *) words+=("$argument") ;;
  esac
done
action=${words[0]:-status} netdev=${words[1]:-} name=${words[2]:-${kind}0}

say() { printf '%s\n' "$@"; }
fail() { printf 'error: %s\n' "$1" >&2; shift; [ $# -eq 0 ] || printf '  %s\n' "$@" >&2; exit 1; }

as_root() {
  [ "$(id -u)" -eq 0 ] || fail "$action needs root" "sudo $0 $action ${netdev:+$netdev }$name"
}

# Whether the kernel can make these devices: with the code built in or loaded, or with a module to load.
has_module() {
  [ -d "/sys/module/$module" ] && return
  grep -qsw "${kind}_newlink" /proc/kallsyms && return
  modprobe --dry-run --quiet "$module" 2>/dev/null
}

no_module="the kernel $(uname -r) has no module $module"
where_modules_are=(
  "Debian: linux-image-amd64 has it, the cloud kernel does not; Ubuntu: apt-get install linux-modules-extra-$(uname -r)"
  "Fedora: dnf install kernel-modules-extra; a container cannot load it: run this on its host"
  "without it: ci/rxe.sh runs the tests under User-Mode Linux, and this library's soft device needs no module at all"
)
no_tool="the tool rdma is missing"
where_tool_is="apt-get install iproute2 (Debian, Ubuntu), dnf install iproute (Fedora, RHEL)"

# The library that gives programs access to the kernel's device.
has_provider() {
  local folder
  for folder in /etc/libibverbs.d /usr/etc/libibverbs.d /usr/local/etc/libibverbs.d; do
    [ -e "$folder/$kind.driver" ] && return
  done
  return 1
}

no_provider="libibverbs has no provider for $kind"
where_provider_is="apt-get install ibverbs-providers (Debian, Ubuntu), dnf install libibverbs (Fedora, RHEL)"

devices() {
  local path
  for path in /sys/class/infiniband/"$kind"* /sys/class/infiniband/"$name"; do
    if [ -e "$path" ]; then basename "$path"; fi
  done | sort -u
}

# The interface that a device is on.
interface_of() {
  cat "/sys/class/infiniband/$1/ports/1/gid_attrs/ndevs/0" 2>/dev/null || true
}

default_interface() {
  local found
  found=$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
  # Without a default route: the first interface that is up and is not the loopback.
  [ -n "$found" ] || found=$(ip -o link show up | awk -F': ' '$2 != "lo" { sub(/@.*/, "", $2); print $2; exit }')
  printf '%s' "$found"
}

# The largest path MTU that fits an interface: 80 bytes are for the headers.
path_mtu() {
  local mtu size
  mtu=$(cat "/sys/class/net/$1/mtu" 2>/dev/null || echo 0)
  for size in 4096 2048 1024 512 256; do
    if [ "$mtu" -ge $((size + 80)) ]; then
      printf '%s' "$size"
      return
    fi
  done
  printf 0
}

show_device() {
  local device=$1 port=/sys/class/infiniband/$1/ports/1 netdev index gid type best=
  netdev=$(interface_of "$device")
  say "$device: port $(cut -d' ' -f2 "$port/state"), interface ${netdev:-unknown} with an MTU of $(cat "/sys/class/net/$netdev/mtu" 2>/dev/null || echo unknown)"
  if [ "$kind" = siw ]; then
    say "  iWARP: connect through rdma_cm (rping, ucmatose, perftest -R); address handles and ibv_*_pingpong do not apply"
    return
  fi
  for index in $(cd "$port/gids" && printf '%s\n' * | sort -n); do
    read -r gid <"$port/gids/$index"
    [ "$gid" != 0000:0000:0000:0000:0000:0000:0000:0000 ] || continue
    type=$(cat "$port/gid_attrs/types/$index" 2>/dev/null || echo unknown)
    say "  GID $index: $gid ($type)"
    case $gid in
      0000:0000:0000:0000:0000:ffff:*) [ -n "$best" ] || best=$index ;;
    esac
  done
  if [ -n "$best" ]; then
    say "  use GID index $best (RoCE v2 over IPv4); the path MTU is at most $(path_mtu "$netdev")"
  else
    say "  no IPv4 address on $netdev yet: index 0, the link-local one, works on this link only; ip addr add ADDRESS/24 dev $netdev"
  fi
}

# What a program on the device may run into.
show_limits() {
  local locked netdev=$1
  has_provider || say "missing: $no_provider" "  $where_provider_is"
  locked=$(ulimit -l)
  if [ "$locked" != unlimited ] && [ "$locked" -lt 65536 ]; then
    say "note: at most $locked KiB may be locked in memory here (ulimit -l), which limits what programs can register" \
      "  add '* - memlock unlimited' to /etc/security/limits.conf and log in again"
  fi
  if [ -n "$netdev" ] && [ "$(path_mtu "$netdev")" -lt 4096 ]; then
    say "note: a path MTU of 4096 needs an interface MTU of 4176 or more, at both ends and between" "  ip link set $netdev mtu 4200"
  fi
}

case $action in
  add)
    as_root
    command -v rdma >/dev/null || fail "$no_tool" "$where_tool_is"
    has_module || fail "$no_module" "${where_modules_are[@]}"
    if [ -e "/sys/class/infiniband/$name" ]; then
      on=$(interface_of "$name")
      if [ -n "$netdev" ] && [ "$on" != "$netdev" ]; then
        fail "$name exists already, on $on" "remove it first ($0 remove $on $name), or choose another name ($0 add $netdev OTHER)"
      fi
      netdev=$on
      say "$name is there already"
    else
      netdev=${netdev:-$(default_interface)}
      [ -n "$netdev" ] || fail "no network interface is up" "name one: $0 add NETDEV"
      [ -e "/sys/class/net/$netdev" ] || fail "there is no interface $netdev" "there are: $(cd /sys/class/net && echo *)"
      ip link set "$netdev" up
      # The kernel loads the module by itself for a link of its type, where it may.
      modprobe --quiet "$module" 2>/dev/null || true
      rdma link add "$name" type "$kind" netdev "$netdev" ||
        fail "the kernel refused to make $name on $netdev" "dmesg | tail says why; an interface carries one $kind device"
      # GIDs follow the interface's addresses, a moment later.
      for _ in 1 2 3 4 5 6 7 8 9 10; do
        grep -qs 'ffff:' /sys/class/infiniband/"$name"/ports/1/gids/1 && break
        sleep 0.1
      done
    fi
    show_device "$name"
    show_limits "$netdev"
    ;;
  remove)
    as_root
    command -v rdma >/dev/null || fail "$no_tool" "$where_tool_is"
    # Named devices, or all on the interface.
    removed=0
    for device in $(devices); do
      if [ "${words[2]:-}" = "$device" ] || { [ -z "${words[2]:-}" ] && { [ -z "$netdev" ] || [ "$(interface_of "$device")" = "$netdev" ]; }; }; then
        rdma link delete "$device" || fail "$device could not be removed" "a program may still use it: rdma resource show qp link $device"
        say "$device removed"
        removed=1
      fi
    done
    [ "$removed" = 1 ] || say "nothing to remove"
    ;;
  status)
    missing=0
    if ! has_module; then
      say "missing: $no_module" "${where_modules_are[@]/#/  }"
      missing=1
    fi
    if ! command -v rdma >/dev/null; then
      say "missing: $no_tool" "  $where_tool_is"
      missing=1
    fi
    found=$(devices)
    if [ -z "$found" ]; then
      say "there is no $kind device; to make one: sudo $0 add$([ "$kind" = rxe ] || printf ' --iwarp')"
    fi
    for device in $found; do show_device "$device"; done
    show_limits ""
    has_provider || missing=1
    exit "$missing"
    ;;
  *)
    echo "error: $action is not add, remove or status (see $0 --help)" >&2
    exit 2
    ;;
esac
