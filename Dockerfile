# The agent's image: one static program, CA certificates and two empty folders, nothing else; no shell. The same image
# runs the socket proxy: docker run … dockflare-agent socket-proxy
#
#   docker build -t dockflare-agent .
#   docker buildx build --platform linux/amd64,linux/arm64 -t dockflare-agent .
#
# Another user for the agent: --build-arg UID=1000 --build-arg GID=1000

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The workspace's cargo configuration links statically, for whichever architecture this stage runs on.
RUN cargo build --release --locked --package dockflare-agent --bin dockflare-agent \
    && install -D -m 0755 target/*/release/dockflare-agent /out/dockflare-agent \
    && install -d -m 0700 /out/data \
    && install -d -m 0755 /out/run

FROM scratch
ARG UID=65532
ARG GID=65532
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/dockflare-agent /dockflare-agent
# A new volume takes over this owner; a folder of the host mounted here must be given it by hand.
COPY --from=build --chown=${UID}:${GID} /out/data /app/data
# Where the socket proxy makes its socket. Root's, since without a capability root writes to nobody else's folder.
COPY --from=build /out/run /run/dockflare
WORKDIR /app
USER ${UID}:${GID}
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 CMD ["/dockflare-agent", "healthcheck"]
ENTRYPOINT ["/dockflare-agent"]
