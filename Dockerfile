# The agent's image: one static program, CA certificates and two empty folders, nothing else; no shell. The same image
# runs the socket proxy: docker run … dockflare-agent socket-proxy
#
#   docker build -t dockflare-agent .
#   docker buildx build --platform linux/amd64,linux/arm64 -t dockflare-agent .
#
# Another user for the agent: --build-arg UID=1000 --build-arg GID=1000
#
# The vault, for credentials (docs/credentials.md), is a second image of the same file:
#
#   docker build --target vault -t dockflare-vault .

FROM rust:1.95-slim-bookworm AS source
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

FROM source AS build
# The workspace's cargo configuration links statically, for whichever architecture this stage runs on.
RUN cargo build --release --locked --package dockflare-agent --bin dockflare-agent \
    && install -D -m 0755 target/*/release/dockflare-agent /out/dockflare-agent \
    && install -d -m 0700 /out/data \
    && install -d -m 0755 /out/run

FROM scratch AS agent
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

FROM source AS build-vault
RUN cargo build --release --locked --package dockflare-vault --bin dockflare-vault \
    && install -D -m 0755 target/*/release/dockflare-vault /out/dockflare-vault \
    && install -d -m 0700 /out/data \
    && install -d -m 0755 /out/launcher \
    && install -d -m 0755 /out/run

FROM scratch AS vault
# A user that nobody else is: not the agent's, and not the one that distroless images have.
ARG VAULT_UID=65431
ARG VAULT_GID=65431
COPY --from=build-vault /out/dockflare-vault /dockflare-vault
# New volumes take over this owner.
COPY --from=build-vault --chown=${VAULT_UID}:${VAULT_GID} /out/data /app/data
COPY --from=build-vault --chown=${VAULT_UID}:${VAULT_GID} /out/data /app/state
COPY --from=build-vault --chown=${VAULT_UID}:${VAULT_GID} /out/data /app/config
COPY --from=build-vault --chown=${VAULT_UID}:${VAULT_GID} /out/data /run/dockflare-vault
# Shared with the containers whose programs the launcher starts.
COPY --from=build-vault --chown=${VAULT_UID}:${VAULT_GID} /out/launcher /app/launcher
# Where its socket proxy makes its socket. Root's, since without a capability root writes to nobody else's folder.
COPY --from=build-vault /out/run /run/dockflare
WORKDIR /app
USER ${VAULT_UID}:${VAULT_GID}
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 CMD ["/dockflare-vault", "healthcheck"]
ENTRYPOINT ["/dockflare-vault"]

# What is built unless a target is named.
FROM agent
