# make image, or: docker build -t udp-fanout:latest .
#
# The binary contains the kernel program, libbpf, libelf and zlib, and needs nothing else to run. The image adds the tools
# that the deployment guide's troubleshooting runs inside the container.

# The build stage: Rust on Debian 12 or older, because the binary needs the C library it is built with or a newer one.
ARG RUST_IMAGE=docker.io/library/rust:1-bookworm
# The base of the image: Debian 12 or newer.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
# hadolint ignore=DL3008 # within one Debian release, versions only get fixes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends clang gcc libc6-dev libelf-dev make pkg-config zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/image deploy/image
RUN cc -shared -fPIC -O2 -Wall -Wextra -Werror -o stay_root.so deploy/image/stay_root.c
COPY . .
# For `udp-fanout --version`: --build-arg REVISION=$(git rev-parse --short=12 HEAD)
ARG REVISION=unknown
RUN UDP_FANOUT_REVISION="$REVISION" cargo build --release --locked --bin udp-fanout

FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="udp-fanout" \
      org.opencontainers.image.description="Fans UDP datagrams out to downstream receivers inside the kernel" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.revision="$REVISION"
# hadolint ignore=DL3008 # within one Debian release, versions only get fixes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bpftool iproute2 tcpdump \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/stay_root.so /usr/local/lib/
COPY --from=build /src/deploy/image/bpftool /src/deploy/image/tcpdump /usr/local/bin/
COPY --from=build /src/target/release/udp-fanout /usr/local/bin/
# Root, because container runtimes give added capabilities only to root; mode "userspace" works with any user.
ENTRYPOINT ["/usr/local/bin/udp-fanout"]
CMD ["run", "--config", "/etc/udp-fanout/config.toml"]
