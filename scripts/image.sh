#!/usr/bin/env bash
# Builds the container image with docker, podman or buildah, whichever is installed. Called by `make image`, which sets
# IMAGE, and optionally ENGINE, BASE, RUST_IMAGE and IMAGE_ARGS.
set -euo pipefail
cd "$(dirname "$0")/.."

# docker needs its daemon to build.
find_engine() {
    if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        echo docker
    elif command -v podman >/dev/null; then
        echo podman
    elif command -v buildah >/dev/null; then
        echo buildah
    fi
}

engine=${ENGINE:-$(find_engine)}
if [[ -z $engine ]]; then
    echo "make image: found no docker with a running daemon, no podman and no buildah: install one of them" >&2
    exit 1
fi
arguments=(--file Dockerfile --tag "$IMAGE")
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || true)
[[ -z $revision ]] || arguments+=(--build-arg "REVISION=$revision")
[[ -z ${BASE:-} ]] || arguments+=(--build-arg "BASE=$BASE")
[[ -z ${RUST_IMAGE:-} ]] || arguments+=(--build-arg "RUST_IMAGE=$RUST_IMAGE")
# Unquoted: one word for each option of the engine.
read -ra more <<<"${IMAGE_ARGS:-}"
echo "building $IMAGE with $engine"
exec "$engine" build "${arguments[@]}" "${more[@]}" .
