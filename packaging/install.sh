#!/bin/sh
# Installs KVM Replica: programs, unit, libvirt hook and configuration.
#   packaging/install.sh [BINDIR]     BINDIR holds the built programs (bin)
# From the environment:
#   DESTDIR   put everything below this directory (for packages); empty: here
#   PREFIX    /usr/local, or /usr for packages
# An existing configuration is never overwritten. Running it again upgrades:
# the daemon may then be restarted at any time, data planes of running guests
# go on with the program they were started from.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
bin=${1:-$here/../bin}
DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}

die() { echo "install: $*" >&2; exit 1; }

case $PREFIX in /*) ;; *) die "PREFIX must be an absolute path, not $PREFIX" ;; esac
for p in replicad replicactl replicafsck; do
	[ -x "$bin/$p" ] || die "$bin/$p is missing; build it: make build"
done
[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || die "installing on this machine needs root (or set DESTDIR)"

# put MODE SOURCE TARGET: complete or not at all, also over a running program.
put() {
	mkdir -p "$(dirname "$DESTDIR$3")"
	cp "$2" "$DESTDIR$3.new"
	chmod "$1" "$DESTDIR$3.new"
	mv -f "$DESTDIR$3.new" "$DESTDIR$3"
	echo "$3"
}

for p in replicad replicactl replicafsck; do
	put 0755 "$bin/$p" "$PREFIX/sbin/$p"
done

unit=$(mktemp)
trap 'rm -f "$unit"' EXIT
sed "s|@SBINDIR@|$PREFIX/sbin|g" "$here/systemd/replicad.service.in" >"$unit"
put 0644 "$unit" "$PREFIX/lib/systemd/system/replicad.service"

put 0755 "$here/hooks/kvmreplica" /etc/libvirt/hooks/qemu.d/kvmreplica
put 0644 "$here/replicad.toml" "$PREFIX/share/kvmreplica/replicad.toml"
mkdir -p "$DESTDIR/etc/replicad"
chmod 0700 "$DESTDIR/etc/replicad"
if [ -e "$DESTDIR/etc/replicad/replicad.toml" ]; then
	echo "/etc/replicad/replicad.toml kept as it is; the new example is $PREFIX/share/kvmreplica/replicad.toml"
else
	put 0600 "$here/replicad.toml" /etc/replicad/replicad.toml
fi

[ -z "$DESTDIR" ] || exit 0
cat <<TEXT

Next:
  1. edit /etc/replicad/replicad.toml, then: replicad --check
  2. systemctl restart libvirtd      (or virtqemud: hooks are looked for at its
     start; running guests are not touched)
  3. systemctl daemon-reload && systemctl enable --now replicad
TEXT
