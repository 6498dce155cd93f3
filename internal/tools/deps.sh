#!/bin/sh
# Installs what building and testing needs on a bare Debian 12, as root.
# Quick, and without a network, when everything is there already.
#   deps.sh          everything
#   deps.sh --list   only print the packages
set -eu
cd "$(dirname "$0")/../.."

packages="
  build-essential ca-certificates git make
  qemu-system-x86 qemu-utils ovmf
  libvirt-daemon-system libvirt-daemon libvirt-clients dnsmasq-base iptables
  libnbd-bin python3-libnbd nbdkit nbd-client nbd-server fio
  busybox-static e2fsprogs e2fsck-static xfsprogs btrfs-progs sqlite3 qemu-guest-agent swtpm swtpm-tools
  iproute2 util-linux procps strace debootstrap systemd-container dbus
"
[ "${1:-}" = --list ] && { printf '%s\n' $packages; exit 0; }

say() { printf 'deps: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

# --- packages
installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' 2>/dev/null | sed -n 's/ installed$//p')
missing=
for p in $packages; do
  printf '%s\n' "$installed" | grep -qx -- "$p" || missing="$missing $p"
done
if [ -n "$missing" ]; then
  [ "$(id -u)" = 0 ] || die "these packages are missing, and installing them needs root:$missing"
  command -v apt-get >/dev/null || die "this is no Debian; install the equivalents of:$missing"
  say "installing:$missing"
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi

# --- Go. Debian 12's own (1.19) is too old. Any Go from 1.21 on fetches the
# version that go.mod names by itself; bookworm-backports has one.
want=$(sed -n 's/^go \([0-9.]*\)$/\1/p' go.mod)
export GOTOOLCHAIN="${GOTOOLCHAIN:-auto}"
usable() { command -v go >/dev/null && go version >/dev/null 2>&1; }
if ! usable; then
  . /etc/os-release
  if [ "$(id -u)" = 0 ] && [ "${VERSION_CODENAME:-}" = bookworm ]; then
    say "no usable Go; installing golang-go from bookworm-backports, which then fetches Go $want"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Release: bookworm' 2>/dev/null | head -n 1)
    [ -n "$mirror" ] || die "apt names no mirror of bookworm; install Go $want by hand and run make deps again"
    echo "deb $mirror bookworm-backports main" >/etc/apt/sources.list.d/kvmreplica-backports.list
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -t bookworm-backports golang-go || true
  fi
  usable || go version || true # its own words, when there is one
  usable || die "Go $want or newer is needed and could not be installed.
      Debian 12's own golang is too old. Unpack the Go project's archive to
      /usr/local/go (the Makefile looks there) and run make deps again."
fi
say "$(go version)"

# --- linters, pinned by internal/tools/go.mod
stamp=bin/tools/.stamp
sum=$(cat internal/tools/go.mod internal/tools/go.sum internal/tools/runtests/*.go | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$sum" ]; then
  say "building staticcheck, gofumpt and the test runner"
  mkdir -p bin/tools
  out=$PWD/bin/tools
  (cd internal/tools && GOFLAGS= GOBIN="$out" go install tool ./runtests)
  printf '%s' "$sum" >$stamp
fi
say "all there"
