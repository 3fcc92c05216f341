# Sourced by the scripts in ci/: a strict shell at the repository's root, and one line before each step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n== %s\n' "$*"; }

# Installs Debian packages that are missing. usage: need PACKAGE...
need() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  echo "installing ${missing[*]}"
  local sudo=; [ "$(id -u)" -eq 0 ] || sudo=sudo
  if ! command -v apt-get >/dev/null || ! $sudo apt-get update -qq >/dev/null ||
    ! DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    echo "error: these packages are needed and cannot be installed here with apt-get: ${missing[*]}" >&2
    exit 1
  fi
}

# Name and path of the programs of a kind that `cargo test --message-format=json` told of. usage: programs test|example|bin FILE
programs() {
  jq -r --arg kind "$1" 'select(.reason == "compiler-artifact" and .executable != null and .target.kind == [$kind]
    and .profile.test == ($kind == "test")) | [.target.name, .executable] | @tsv' "$2" | sort -u
}

# What failed and was skipped, and `N passed, N failed, N skipped`; fails when something failed.
# usage: summary FILE... (verdict, group, name, detail, separated by tabs)
summary() {
  cat "$@" | awk -F'\t' '
    { n[$1]++ }
    $1 == "FAILED" { failed = failed sprintf("FAILED   %s: %s (%s)\n", $2, $3, $4) }
    $1 == "skipped" { skipped = skipped sprintf("skipped  %s: %s (%s)\n", $2, $3, $4) }
    END {
      printf "%s%s%d passed, %d failed, %d skipped\n", failed, skipped, n["ok"], n["FAILED"], n["skipped"]
      exit n["FAILED"] > 0 || NR == 0
    }'
}

# One line per result. usage: table FILE
table() { awk -F'\t' '{ printf "%-8s %-14s %-60s %s\n", $1, $2, $3, $4 }' "$1"; }
