#!/bin/sh
# Builds a tool that the tests and the demo need, once, at the version that its
# nested module pins, into a cache folder outside the tree, and prints the path
# of the binary.
#
#   tools/build.sh consul|xcaddy          build it if need be
#   tools/build.sh --find consul|xcaddy   only look; fail if it isn't there
#
# Consul isn't built if $CONSUL_BIN names a binary, or if `consul` on PATH is
# new enough. The cache is $CADDY_CONSUL_CACHE, by default caddy-consul in
# $XDG_CACHE_HOME or ~/.cache.
set -eu

min_consul_minor=18 # of Consul 1

usage() {
	echo "usage: tools/build.sh [--find] consul|xcaddy" >&2
	exit 2
}

find_only=false
if [ "${1-}" = --find ]; then
	find_only=true
	shift
fi
[ $# -eq 1 ] || usage

case $1 in
consul) module=github.com/hashicorp/consul package=$module ;;
xcaddy) module=github.com/caddyserver/xcaddy package=$module/cmd/xcaddy ;;
*) usage ;;
esac
name=$1

# is_recent_consul tells whether the binary $1 is a Consul that will do.
is_recent_consul() {
	minor=$("$1" version 2>/dev/null | sed -n '1s/^Consul v1\.\([0-9]*\)\..*/\1/p') || return 1
	[ -n "$minor" ] && [ "$minor" -ge "$min_consul_minor" ]
}

if [ "$name" = consul ]; then
	if [ -n "${CONSUL_BIN-}" ]; then
		if ! is_recent_consul "$CONSUL_BIN"; then
			echo "CONSUL_BIN=$CONSUL_BIN is no Consul 1.$min_consul_minor or later: unset it, or name another" >&2
			exit 1
		fi
		echo "$CONSUL_BIN"
		exit
	fi
	if on_path=$(command -v consul) && is_recent_consul "$on_path"; then
		echo "$on_path"
		exit
	fi
fi

folder=$(cd "$(dirname "$0")/$name" && pwd)
version=$(sed -n "s|^[[:space:]]*\(require \)\{0,1\}$module v\([^ ]*\).*|\2|p" "$folder/go.mod")
if [ -z "$version" ]; then
	echo "$folder/go.mod requires no version of $module" >&2
	exit 1
fi

cache=${CADDY_CONSUL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/caddy-consul}
binary=$cache/$name-$version/$name
if [ -x "$binary" ]; then
	echo "$binary"
	exit
fi
if $find_only; then
	exit 1
fi

takes=
[ "$name" != consul ] || takes=' (about 7 minutes on 2 cores)'
echo "Building $name $version once, into $cache$takes ..." >&2
mkdir -p "$cache/$name-$version"
unfinished=$(mktemp "$cache/$name-$version/$name.XXXXXX")
trap 'rm -f "$unfinished"' EXIT
trap 'exit 1' HUP INT TERM
(
	cd "$folder"
	# The binary is for this machine, whatever the caller builds for or with.
	unset GOOS GOARCH
	GOFLAGS='' GOWORK=off go build -trimpath -o "$unfinished" "$package"
) >&2
chmod +x "$unfinished"
mv -f "$unfinished" "$binary"
echo "$binary"
