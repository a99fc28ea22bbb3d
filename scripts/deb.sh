#!/usr/bin/env bash
# Makes a Debian package of the built daemon and prints its path. It contains what scripts/install.sh installs, in the places
# that Debian's policy asks for, and the files of deploy/debian/: control file, maintainer scripts, copyright, overrides. Needs
# no root.
#
# usage: BIN=target/release/udp-fanout OUT=target/debian scripts/deb.sh
#
# DEBFULLNAME and DEBEMAIL name the maintainer, SOURCE_DATE_EPOCH the time of the package (default: that of the last commit).
set -euo pipefail
cd "$(dirname "$0")/.."

readonly DEBIAN=deploy/debian
temporary=$(mktemp --directory)
trap 'rm --recursive --force "$temporary"' EXIT
readonly ROOT=$temporary/root DOC=$temporary/root/usr/share/doc/udp-fanout

# A pre-release sorts before its release: Cargo writes that as "-", dpkg as "~".
version=$(sed -n '0,/^version = "\(.*\)"$/s//\1/p' Cargo.toml)
version=${version//-/\~}-1
maintainer="${DEBFULLNAME:-The udp-fanout authors} <${DEBEMAIL:-maintainers@udp-fanout.invalid}>"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat --format=%Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH

# The files, in the places that Debian's policy asks for.
stage() {
    BIN=$BIN PREFIX=/usr SYSCONFDIR=/etc DESTDIR=$ROOT scripts/install.sh >/dev/null
    strip --strip-unneeded --remove-section=.comment --remove-section=.note "$ROOT/usr/bin/udp-fanout"
    mkdir --parents "$ROOT/usr/share/zsh/vendor-completions"
    mv "$ROOT/usr/share/zsh/site-functions/_udp-fanout" "$ROOT/usr/share/zsh/vendor-completions/"
    rmdir "$ROOT/usr/share/zsh/site-functions"
    mv "$DOC/config" "$DOC/examples"
    gzip --best --no-name "$ROOT/usr/share/man/man8/udp-fanout.8"
    gzip --best --no-name --stdout CHANGELOG.md >"$DOC/changelog.gz"
    debian_changelog | gzip --best --no-name >"$DOC/changelog.Debian.gz"
    copyright >"$DOC/copyright"
    install -D --mode=644 "$DEBIAN/lintian-overrides" "$ROOT/usr/share/lintian/overrides/udp-fanout"
}

debian_changelog() {
    printf 'udp-fanout (%s) unstable; urgency=medium\n\n  * See changelog.gz for the changes.\n\n' "$version"
    printf ' -- %s  %s\n' "$maintainer" "$(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")"
}

# Every Debian system has copies of two of the licences; the other two are given in full.
copyright() {
    cat "$DEBIAN/copyright"
    echo 'License: Expat'
    sed '1,/^Copyright/d' LICENSE-MIT | as_field
    echo
    echo 'License: BSD-2-Clause'
    sed -n '/^Redistribution/,$p' bpf/LICENSE | as_field
}

# Formats a text as the continuation of a field: indented, with dots for empty lines.
as_field() {
    sed -e '/./,$!d' -e 's/^$/./' -e 's/^/ /'
}

# The packages, with versions, of the libraries that the binary is linked with.
depends() {
    mkdir "$temporary/debian"
    printf 'Source: udp-fanout\n\nPackage: udp-fanout\nArchitecture: any\n' >"$temporary/debian/control"
    (cd "$temporary" && dpkg-shlibdeps -O -e"$ROOT/usr/bin/udp-fanout") | sed -n 's/^shlibs:Depends=//p'
}

control() {
    local depends size
    depends=$(depends)
    [[ -n $depends ]] || {
        echo "dpkg-shlibdeps found no library that $BIN needs; is it an executable of this machine's architecture?" >&2
        return 1
    }
    size=$(du --summarize --apparent-size --block-size=1024 "$ROOT" | cut --fields=1)
    sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@MAINTAINER@/$maintainer/" \
        -e "s/@INSTALLED_SIZE@/$size/" -e "s/@DEPENDS@/$depends/" "$DEBIAN/control"
}

architecture=$(dpkg --print-architecture)
stage
mkdir "$temporary/DEBIAN"
control >"$temporary/DEBIAN/control"
install --mode=755 "$DEBIAN/postinst" "$DEBIAN/prerm" "$DEBIAN/postrm" "$temporary/DEBIAN/"
(cd "$ROOT" && find etc -type f -printf '/%p\n' | sort) >"$temporary/DEBIAN/conffiles"
(cd "$ROOT" && find usr -type f -print0 | sort --zero-terminated | xargs --null md5sum) >"$temporary/DEBIAN/md5sums"
mv "$temporary/DEBIAN" "$ROOT/"
chmod --recursive u=rwX,go=rX "$ROOT"

mkdir --parents "$OUT"
package=$OUT/udp-fanout_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$ROOT" "$package" >/dev/null
echo "$package"
