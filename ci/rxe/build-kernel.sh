#!/usr/bin/env bash
# Builds the User-Mode Linux kernel of this folder from Debian's source package. usage: build-kernel.sh OUTPUT [WORKDIR]
# The package comes from trixie-backports, through an apt configuration of its own: the machine's is left as it is.
# Needs (installed if missing): a C toolchain, flex, bison, bc, cpio, xz. 3 to 10 minutes on two cores, 2 GB of disk.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=$(readlink -f "$1")
work=${2:-$(mktemp -d)}
version=7.3
. "$here/../lib.sh"
need gcc libc6-dev make flex bison bc cpio xz-utils libelf-dev debian-archive-keyring
mkdir -p "$work/lists/partial" "$work/archives/partial"
cd "$work"

mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie-backports main" >sources.list
apt=(-o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$work/lists" -o Dir::Cache="$work")
if ! [ -d "linux-source-$version" ]; then
  apt-get "${apt[@]}" update -qq
  apt-get "${apt[@]}" download -qq "linux-source-$version"
  dpkg -x "linux-source-$version"_*.deb package
  tar xf "package/usr/src/linux-source-$version.tar.xz"
fi

cd "linux-source-$version"
make -s ARCH=um allnoconfig
scripts/kconfig/merge_config.sh -m -O . .config "$here/kernel.fragment" >/dev/null
make -s ARCH=um olddefconfig
for option in RDMA_RXE RDMA_SIW NET_SCH_NETEM VETH DUMMY; do
  grep -q "^CONFIG_$option=y" .config || { echo "error: the configuration lost CONFIG_$option" >&2; exit 1; }
done
make -s ARCH=um -j"$(nproc)"
strip -o "$output" linux
echo "built $output: $(stat -c %s "$output") bytes from $(ls "$work"/linux-source-"$version"_*.deb)"
