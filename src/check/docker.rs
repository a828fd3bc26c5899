//! Docker: whether it answers, which calls it allows, including unneeded ones; the image and the network.

use super::{CONTAINERS, DOCKER, Section, TUNNEL, tunnel};
use crate::config::{Config, DockerHost};
use crate::docker::Remedy as _;
use crate::docker::{Docker, Engine, Gate, Registry, Surplus};
use crate::membership::{Apart, COST, own};
use crate::state::Folder;

pub(super) async fn look(config: &Config, folder: &Folder, to: &mut Section) {
    to.begin(DOCKER);
    let docker = Docker::new(config.docker_host.clone());
    let engine = match docker.engine().await {
        Ok(engine) => engine,
        Err(error) => {
            to.fail("docker.answer", "answers", format!("{}: it {error}", docker.host()), error.advice());
            for group in [DOCKER, TUNNEL, CONTAINERS] {
                to.begin(group);
                let id = if group == DOCKER { "docker.rest" } else { group };
                let title = if group == DOCKER { "the rest" } else { "all of it" };
                to.skip(id, title, "Docker does not answer");
            }
            return;
        }
    };
    answer(&docker, &engine, to);
    let may_create_network = if engine.own_proxy {
        to.pass("docker.proxy", "socket proxy", "this project's own: lets through the agent's calls and no others");
        true
    } else {
        let may_create_network = permissions(&docker, to).await;
        surplus(&docker, to).await;
        may_create_network
    };
    image(&docker, config, to).await;
    network(&docker, config, may_create_network, to).await;
    membership(&docker, config, to).await;
    tunnel::look(&docker, config, folder, to).await;
}

fn answer(docker: &Docker, engine: &Engine, to: &mut Section) {
    to.pass("docker.answer", "answers", docker.host().to_string());
    let (id, title) = ("docker.version", "version");
    match &engine.version {
        Some(seen) => {
            to.pass(id, title, format!("{}, API {}, {}/{}", seen.engine, seen.api, seen.os, seen.arch));
        }
        None => to.warn(
            id,
            title,
            "is not told; the agent works, but does not recognise Docker Desktop",
            "set VERSION=1 on the socket proxy and recreate it",
        ),
    }
}

/// Adds one finding for each call. Returns whether the agent may create networks.
async fn permissions(docker: &Docker, to: &mut Section) -> bool {
    let mut may_create_network = false;
    for permission in docker.permissions().await {
        let (id, title) = (format!("docker.may_{}", permission.id), format!("may {}", permission.doing));
        may_create_network |= permission.id == "new_network" && permission.gate == Gate::Open;
        match permission.gate {
            Gate::Open => to.pass(&id, &title, format!("yes ({})", permission.grant)),
            Gate::Closed => {
                let remedy = format!("set {} on the socket proxy and recreate it", permission.grant);
                to.fail(&id, &title, format!("refused, needs {}", permission.grant), remedy);
            }
            Gate::Unclear(problem) => {
                to.fail(&id, &title, format!("cannot be told: {problem}"), "see the log of the socket proxy");
            }
        }
    }
    may_create_network
}

/// Reports what the proxy allows although the agent does not need it.
async fn surplus(docker: &Docker, to: &mut Section) {
    let (exec, surplus) = tokio::join!(docker.may_exec(), docker.surplus());
    let variables = match surplus {
        Surplus::Everything => {
            let detail = match docker.host() {
                DockerHost::Unix(_) => "none: whoever takes over the agent has the whole host",
                DockerHost::Http(_) => {
                    "none, or one that lets through everything: whoever reaches it has the whole host"
                }
                DockerHost::Tls(_) => "none: whoever takes over the agent, or its certificate, has the whole host",
            };
            return to.warn("docker.proxy", "socket proxy", detail, "put one between, as docker-compose.yml does");
        }
        Surplus::Some(variables) => variables,
    };
    if exec {
        let detail = "lets programs be started in containers (exec), which the agent never does";
        to.warn("docker.exec", "no exec", detail, "set EXEC=0 on the socket proxy and recreate it");
    } else {
        to.pass("docker.exec", "no exec", "refused, as it should be");
    }
    if variables.is_empty() {
        to.pass("docker.proxy", "socket proxy", "lets through nothing else of what was tried");
    } else {
        let off: Vec<_> = variables.iter().map(|variable| format!("{variable}=0")).collect();
        let remedy = format!("set {} on the socket proxy and recreate it", off.join(" "));
        let detail = format!("lets through what the agent does not need: {}", variables.join(", "));
        to.warn("docker.proxy", "socket proxy", detail, remedy);
    }
}

async fn image(docker: &Docker, config: &Config, to: &mut Section) {
    let (id, title, image) = ("docker.image", "image", &config.tunnel.image);
    match docker.has_image(image).await {
        Ok(true) => return to.pass(id, title, format!("{image} is here")),
        Ok(false) => {}
        Err(error) => return to.refused_or_failed(id, title, &error),
    }
    let remedy = "check CLOUDFLARED_IMAGE and the host's way to the registry, or load the image with docker load";
    match docker.registry_has(image).await {
        Ok(Registry::Has) => to.pass(id, title, format!("{image} is in its registry, and pulled when it is needed")),
        Ok(Registry::HasNot(said)) => {
            to.fail(id, title, format!("{image} is not here, and the registry says: {said}"), remedy);
        }
        Ok(Registry::Away(problem)) => {
            to.fail(id, title, format!("{image} is not here, and its registry cannot be asked: {problem}"), remedy);
        }
        Ok(Registry::Closed) => {
            to.skip(id, title, format!("{image} is not here; it is pulled when it is needed"));
        }
        Err(error) => to.fail(id, title, format!("{image} is not here, and Docker {error}"), remedy),
    }
}

/// Whether the agent running here is on the tunnel's network.
async fn membership(docker: &Docker, config: &Config, to: &mut Section) {
    let (id, title, network) = ("docker.joined", "agent on it", &config.tunnel.network);
    let runs = match config.health_page {
        Some(page) => crate::page::ask(page, "/live").await.is_ok(),
        None => false,
    };
    if !runs {
        return to.skip(id, title, "no agent answers in this container; it joins the network when it starts");
    }
    match own(docker, config.hostname.as_deref()).await {
        Ok(Ok(seen)) if seen.networks.contains_key(network) => to.pass(id, title, "yes"),
        Ok(Ok(seen)) => {
            let remedy = format!("see the agent's log for why, or run: docker network connect {network} {}", seen.name);
            to.warn(id, title, format!("no: {COST}"), remedy);
        }
        Ok(Err(Apart::Outside(why))) => to.skip(id, title, why),
        Ok(Err(Apart::Barred(problem))) => {
            let remedy = "give the agent's container a network of its own, as docker-compose.yml does";
            to.warn(id, title, format!("the agent {problem}: {COST}"), remedy);
        }
        Err(error) => to.skip(id, title, format!("Docker {error}")),
    }
}

async fn network(docker: &Docker, config: &Config, may_create: bool, to: &mut Section) {
    let (id, title, network) = ("docker.network", "network", &config.tunnel.network);
    match docker.has_network(network).await {
        Ok(true) => to.pass(id, title, format!("{network} is here")),
        Ok(false) if may_create => to.pass(id, title, format!("{network} is made when it is needed")),
        Ok(false) => {
            let detail = format!("{network} is not here, and the agent may not make it");
            to.fail(id, title, detail, format!("run: docker network create {network}"));
        }
        Err(error) => to.refused_or_failed(id, title, &error),
    }
}
