//! The tunnel container, and the way from it to each labelled container.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{CONTAINERS, Section, TUNNEL};
use crate::config::{Config, DEFAULT_IMAGE};
use crate::docker::{Container, Docker, DockerError, Health, RunState};
use crate::events::counted_with;
use crate::health::{self, Glance, Readiness, Whose};
use crate::labels::{ENABLE_KEYS, Excess};
use crate::neighbours::{self, Verdict};
use crate::pending::agents_page;
use crate::state::{AgentId, DesiredState, Folder, TunnelId, TunnelState};

/// Maximum number of reachable containers to list, so that a person can read the list. Unreachable ones are all listed.
const MOST_WELL: usize = 200;

pub(super) async fn look(docker: &Docker, config: &Config, folder: &Folder, to: &mut Section) {
    to.begin(TUNNEL);
    let wanted = assigned(config, folder, to);
    let ids = own_ids(folder);
    let glance = health::glance(docker, &config.tunnel, Whose::Of(&ids)).await;
    match &glance {
        Err(error) => {
            to.refused_or_failed("tunnel.container", "container", error);
            to.skip("tunnel.ready", "ready", "the container cannot be looked at");
        }
        Ok(glance) => container(config, glance.as_ref(), wanted.is_some(), to),
    }
    let serves =
        matches!(&glance, Ok(Some(seen)) if !seen.foreign && seen.state == RunState::Running && seen.on_network);
    let tunnel = wanted.and_then(|state| Some((state.id.as_ref()?, state.name.as_deref())));
    ways(docker, config, tunnel, serves, to).await;
}

/// The ids that the agent has had, according to its stored state.
fn own_ids(folder: &Folder) -> Vec<AgentId> {
    let remembered = folder.tunnel.iter().flatten().flat_map(|state| state.owners.iter());
    folder.agent_id.iter().flatten().chain(remembered).cloned().collect()
}

/// The tunnel that should run, according to the agent's stored state.
fn assigned<'a>(config: &Config, folder: &'a Folder, to: &mut Section) -> Option<&'a TunnelState> {
    let (id, title) = ("tunnel.assigned", "assigned");
    let state = match (&folder.tombstone, &folder.tunnel) {
        (Ok(Some(_)), _) => {
            to.skip(id, title, "this agent was decommissioned, no tunnel is wanted");
            return None;
        }
        (_, Err(_)) => {
            to.skip(id, title, "tunnel_state.json cannot be read");
            return None;
        }
        (_, Ok(None)) => {
            pending(config, folder, to);
            return None;
        }
        (_, Ok(Some(state))) => state,
    };
    let name = state.name.as_deref().or(state.id.as_ref().map(|id| id.0.as_str())).unwrap_or("without a name");
    match (state.desired_state, &state.token) {
        (DesiredState::Running, None) => {
            let remedy = "enrol the agent on the master's Agents page";
            to.fail(id, title, format!("{name} should run and has no token"), remedy);
            return None;
        }
        (DesiredState::Running, Some(token)) => match token.claims() {
            Ok(_) if state.unclaimed => {
                let remedy = "enrol the agent on the master's Agents page, or delete the tunnel to end it";
                to.warn(
                    id,
                    title,
                    format!("{name}, but the master no longer assigns this tunnel to this host"),
                    remedy,
                );
            }
            Ok(_) => to.pass(id, title, format!("{name}, and it should run")),
            Err(problem) => {
                let remedy = "enrol the agent again on the master's Agents page";
                to.fail(id, title, format!("{name} should run, but {problem}"), remedy);
            }
        },
        (DesiredState::Stopped, _) => {
            to.skip(id, title, "no tunnel should run, says the master");
            return None;
        }
        (DesiredState::Unknown, _) => {
            pending(config, folder, to);
            return None;
        }
    }
    Some(state)
}

/// Reports that no tunnel was ever assigned. Assigning one is the next step once the master knows the agent.
fn pending(config: &Config, folder: &Folder, to: &mut Section) {
    let (id, title) = ("tunnel.assigned", "assigned");
    match &folder.agent_id {
        Ok(Some(_)) => {
            let page = agents_page(&config.master.url);
            let remedy = format!("choose a tunnel for this agent on the master's Agents page: {page}");
            to.fail(id, title, "no tunnel; the agent waits to be enrolled", remedy);
        }
        _ => to.skip(id, title, "not registered yet; once it is, enrol the agent on the master's Agents page"),
    }
}

fn container(config: &Config, glance: Option<&Glance>, wanted: bool, to: &mut Section) {
    let (id, title) = ("tunnel.container", "container");
    let (ready, ready_title) = ("tunnel.ready", "ready");
    let name = &config.tunnel.container_name;
    let Some(seen) = glance else {
        if wanted {
            let remedy = "start the agent, or see its log for why it does not start the tunnel";
            to.fail(id, title, format!("{name} is not there, and should run"), remedy);
        } else {
            to.skip(id, title, format!("{name} is not there, and not wanted"));
        }
        return to.skip(ready, ready_title, "there is no container");
    };
    if seen.foreign {
        let remedy = format!("remove it with docker rm {name}, or set TUNNEL_CONTAINER_NAME to another name");
        let detail = match &seen.another {
            Some(other) => format!("{name} is the tunnel container of another agent, with the id {other}"),
            None => format!("{name} is not the agent's: its image is {}", seen.image),
        };
        to.fail(id, title, detail, remedy);
        return to.skip(ready, ready_title, "the container is not the agent's");
    }
    if seen.state != RunState::Running {
        let state = match seen.state {
            RunState::Restarting => format!("ends again and again, last with exit code {}", seen.exit_code),
            RunState::Exited | RunState::Dead => format!("has ended, with exit code {}", seen.exit_code),
            RunState::Paused => "is paused".to_owned(),
            RunState::Created | RunState::Running => "was never started".to_owned(),
        };
        let detail = format!("{} {state}", seen.name);
        if wanted {
            to.fail(id, title, detail, not_ready_remedy(seen));
        } else {
            to.skip(id, title, format!("{detail}; it is not wanted"));
        }
        return to.skip(ready, ready_title, "the container does not run");
    }
    if seen.on_network {
        let version = seen.version.as_deref().map(|version| format!(", cloudflared {version}")).unwrap_or_default();
        to.pass(id, title, format!("{} runs{version}, image {}", seen.name, seen.image));
    } else {
        let detail = format!("{} runs, but not on the network {}", seen.name, config.tunnel.network);
        to.fail(id, title, detail, "start the agent, or see its log for why it does not replace the container");
    }
    age(seen, Timestamp::now(), to);
    readiness(seen, to);
}

/// Cloudflare supports a version for this many months.
const SUPPORTED_MONTHS: i64 = 12;

/// Warns of a version that is too old. A version names its month: `2026.8.2`.
fn age(seen: &Glance, now: Timestamp, to: &mut Section) {
    let Some(version) = seen.version.as_deref() else { return };
    let Some(months) = months_old(version, now).filter(|months| *months > SUPPORTED_MONTHS) else { return };
    let detail = format!("cloudflared {version} is {months} months old; Cloudflare supports a version for one year");
    let remedy = format!("set CLOUDFLARED_IMAGE={DEFAULT_IMAGE} or a newer one, for agent and socket proxy alike");
    to.warn("tunnel.version", "version", detail, remedy);
}

/// Whole months from the month in a version to now; `None` if the version names no month.
fn months_old(version: &str, now: Timestamp) -> Option<i64> {
    let mut parts = version.split('.');
    let (year, month): (i64, i64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let today = now.to_zoned(TimeZone::UTC).date();
    let is_month = (2018..=9999).contains(&year) && (1..=12).contains(&month);
    is_month.then(|| (i64::from(today.year()) - year) * 12 + i64::from(today.month()) - month)
}

fn readiness(seen: &Glance, to: &mut Section) {
    let (id, title) = ("tunnel.ready", "ready");
    match (&seen.readiness, seen.health) {
        (Readiness::Ready { connections, .. }, _) => {
            to.pass(id, title, format!("{connections} connection(s) to Cloudflare"));
        }
        (Readiness::NotReady, _) | (Readiness::Silent, Some(Health::Unhealthy)) => {
            let cause = seen.clue.map_or("has no connection to Cloudflare", |clue| clue.what());
            let detail = seen.detail.map(|detail| format!(": {detail}")).unwrap_or_default();
            to.fail(id, title, format!("the tunnel {cause}{detail}"), not_ready_remedy(seen));
        }
        (Readiness::Silent, Some(Health::Healthy)) => {
            to.pass(id, title, "Docker's own check of it says so; cloudflared cannot be asked from here");
        }
        (Readiness::Silent, Some(Health::Starting)) => to.skip(id, title, "it was started just now"),
        (Readiness::Silent, None) => {
            to.skip(id, title, "cloudflared cannot be asked from here, and Docker does not check it");
        }
    }
}

fn not_ready_remedy(seen: &Glance) -> String {
    match seen.clue {
        Some(clue) => clue.next().to_owned(),
        None => format!("see docker logs {}", seen.name),
    }
}

async fn ways(
    docker: &Docker,
    config: &Config,
    tunnel: Option<(&TunnelId, Option<&str>)>,
    serves: bool,
    to: &mut Section,
) {
    let looked = async {
        let listed = docker.list_with_label_keys(&ENABLE_KEYS).await?;
        let (mut labelled, mut excess) = (BTreeMap::new(), Vec::new());
        for (container, beyond) in listed.into_iter().filter_map(counted_with) {
            excess.extend(beyond.map(|beyond| (container.name.clone(), beyond.sentence())));
            labelled.insert(container.id.clone(), container);
        }
        let seen = neighbours::glance(docker, &config.tunnel, &labelled, tunnel).await?;
        Ok::<_, DockerError>((labelled, excess, seen))
    };
    let (labelled, excess, seen) = match looked.await {
        Ok(looked) => looked,
        Err(error) => {
            to.begin(CONTAINERS);
            return to.refused_or_failed("containers", "labelled containers", &error);
        }
    };
    if let (false, Some(_)) = (seen.rivals.is_empty(), tunnel) {
        let names = seen.rivals.join(" ");
        let detail = format!("another container runs a connector of the same tunnel: {names}");
        to.warn("tunnel.alone", "no other connector", detail, format!("run: docker rm -f {names}"));
    } else if tunnel.is_some() {
        to.pass("tunnel.alone", "no other connector", "none on this host");
    }
    to.begin(CONTAINERS);
    for (name, problem, remedy) in &seen.nearly {
        to.warn("container.labels", name, format!("is not enabled, and seems to be meant to: {problem}"), remedy);
    }
    for (name, sentence) in excess {
        to.warn("container.left_out", &name, sentence, Excess::REMEDY);
    }
    if labelled.is_empty() {
        return to.skip("containers", "labelled containers", "none that runs has dockflare.enable=true");
    }
    let mut well = 0;
    for container in labelled.values() {
        let verdict = seen.ways.get(&container.name);
        if matches!(verdict, Some(Verdict::Open { note: None, .. })) {
            well += 1;
            if well > MOST_WELL {
                continue;
            }
        }
        way(container, verdict, serves, config.tunnel.auto_connect, seen.problem.as_ref(), to);
    }
    if well > MOST_WELL {
        to.pass("container", &format!("{} more", well - MOST_WELL), "the tunnel reaches them");
    }
}

fn way(
    container: &Container,
    verdict: Option<&Verdict>,
    serves: bool,
    auto_connect: bool,
    problem: Option<&DockerError>,
    to: &mut Section,
) {
    let (id, title) = ("container", container.name.as_str());
    match verdict {
        Some(Verdict::Open { network, service, note }) => {
            let note = note.as_ref().map(|note| format!("; {note}")).unwrap_or_default();
            to.pass(id, title, format!("the tunnel reaches {service} on the network {network}{note}"));
        }
        Some(Verdict::NoRule(kind)) => {
            let remedy = format!("set the label dockflare.{kind}");
            to.warn(id, title, format!("no {kind} label, so the master makes no rule"), remedy);
        }
        Some(Verdict::Unjudged) => to.skip(id, title, "nothing can be said of the way to it"),
        Some(Verdict::Blocked { problem, connects: true, .. }) if auto_connect => {
            let remedy = "nothing: the agent connects the tunnel to its network (AUTO_CONNECT_NETWORKS)";
            to.warn(id, title, format!("not yet: {problem}"), remedy);
        }
        Some(Verdict::Blocked { problem, remedy, .. }) => {
            to.fail(id, title, format!("the tunnel cannot reach it: {problem}"), remedy);
        }
        None if !serves => to.skip(id, title, "the tunnel container does not run on its network"),
        None => match problem {
            Some(error) => to.skip(id, title, format!("Docker {error}")),
            None => to.skip(id, title, "it has ended by now"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_as_old_as_its_month_and_what_names_none_has_no_age() {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        for (version, months) in [
            ("2026.8.2", Some(3)),
            ("2025.11.0", Some(12)),
            ("2025.9.0", Some(14)),
            ("2026.12.1", Some(-1)),
            ("2026.13.0", None),
            ("1.2.3", None),
            ("DEV", None),
            ("", None),
        ] {
            assert_eq!(months_old(version, now), months, "{version}");
        }
    }
}
