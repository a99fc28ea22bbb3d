#!/usr/bin/env bash
# Installs the built daemon with its man page, completions, example configuration and systemd unit. Called by
# `make install`, which sets BIN, PREFIX, SYSCONFDIR and DESTDIR. It builds nothing, so that `sudo make install` runs no
# compiler as root, and never overwrites a configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -x $BIN ]]; then
    echo "there is no $BIN: run \`make build\` first (not as root), then \`make install\` again" >&2
    exit 1
fi
temporary=$(mktemp --directory)
trap 'rm --recursive --force "$temporary"' EXIT

# put MODE SOURCE TARGET
put() {
    install -D --mode="$1" "$2" "$DESTDIR$3"
    echo "$DESTDIR$3"
}

put 755 "$BIN" "$PREFIX/bin/udp-fanout"

"$BIN" man >"$temporary/udp-fanout.8"
put 644 "$temporary/udp-fanout.8" "$PREFIX/share/man/man8/udp-fanout.8"

for shell in bash zsh fish; do
    "$BIN" completions "$shell" >"$temporary/$shell"
done
put 644 "$temporary/bash" "$PREFIX/share/bash-completion/completions/udp-fanout"
put 644 "$temporary/zsh" "$PREFIX/share/zsh/site-functions/_udp-fanout"
put 644 "$temporary/fish" "$PREFIX/share/fish/vendor_completions.d/udp-fanout.fish"

for example in config/*.toml; do
    put 644 "$example" "$PREFIX/share/doc/udp-fanout/config/${example##*/}"
done
put 644 config/syslog.toml "$SYSCONFDIR/udp-fanout/config.toml.example"

sed "s,/usr/local/bin/,$PREFIX/bin/,g" systemd/udp-fanout.service >"$temporary/udp-fanout.service"
put 644 "$temporary/udp-fanout.service" "$PREFIX/lib/systemd/system/udp-fanout.service"
