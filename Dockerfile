# docker build -t udp-fanout:latest .
#
# The kernel program is inside the binary, and libbpf, libelf and zlib are linked statically: the binary alone would do.
# The image adds the tools that the deployment guide's troubleshooting runs inside the container.

FROM rust:1-bookworm AS build
# hadolint ignore=DL3008 # within one Debian release, versions only get fixes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends clang libelf-dev zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# For `udp-fanout --version`: --build-arg REVISION=$(git rev-parse --short=12 HEAD)
ARG REVISION=unknown
RUN UDP_FANOUT_REVISION="$REVISION" cargo build --release --locked --bin udp-fanout

FROM debian:bookworm-slim
# hadolint ignore=DL3008 # within one Debian release, versions only get fixes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bpftool iproute2 tcpdump \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/udp-fanout /usr/local/bin/udp-fanout
ENTRYPOINT ["/usr/local/bin/udp-fanout"]
CMD ["run", "--config", "/etc/udp-fanout/config.toml"]
