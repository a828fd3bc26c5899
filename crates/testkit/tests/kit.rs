//! Tests on a real engine the parts of the kit that the other engine tests rely on.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::expect_used, reason = "tests; clippy spares only the test functions themselves")]

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::FutureExt;
use serde_json::json;
use testkit::bollard::errors::Error;
use testkit::bollard::models::{ContainerCreateBody, HealthConfig, HostConfig, NetworkCreateRequest};
use testkit::bollard::query_parameters::{
    CreateContainerOptions, ListContainersOptions, ListImagesOptions, ListNetworksOptions, ListVolumesOptions,
};
use testkit::{Docker, Images, Scope, Spec, docker, images, token, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SOON: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    // The test of the sweep runs this program again and kills it.
    if std::env::var_os(LEFTOVERS).is_some() {
        return leave_things_behind();
    }
    if std::env::var_os(FAILURES).is_some() {
        return fail_in_every_way();
    }
    testkit::main(testkit::cases![
        the_stand_in_becomes_healthy_without_rights,
        the_stand_in_changes_when_told,
        the_stand_in_obeys_its_token_and_its_image,
        the_workload_serves_and_ends,
        the_proxy_refuses_what_is_not_open,
        the_proxy_comes_back_at_the_same_address,
        a_last_stage_is_built_from_local_files,
        named_images_stay_until_their_label_is_removed,
        a_scope_leaves_nothing_behind,
        a_scope_leaves_nothing_behind_after_a_panic,
        a_scope_leaves_alone_what_was_there_before,
        the_sweep_removes_what_a_killed_process_left,
        without_an_engine_all_is_ignored_but_fails_in_ci,
        a_failure_explains_itself,
    ])
}

/// Returns the agent's settings for its connector: no capabilities, a read-only root, and a Docker health check.
fn like_the_agent() -> (HostConfig, HealthConfig) {
    let host = HostConfig {
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".into()]),
        security_opt: Some(vec!["no-new-privileges".into()]),
        ..HostConfig::default()
    };
    let second = 1_000_000_000;
    let test = ["CMD", "cloudflared", "tunnel", "--metrics", "127.0.0.1:20241", "ready"];
    let health = HealthConfig {
        test: Some(test.map(str::to_owned).to_vec()),
        interval: Some(second / 5),
        timeout: Some(5 * second),
        retries: Some(1),
        ..HealthConfig::default()
    };
    (host, health)
}

async fn stand_in(scope: &Scope, image: &str, token: &str) -> Result<String> {
    let (host, health) = like_the_agent();
    let env = [("TUNNEL_TOKEN", token), ("TUNNEL_METRICS", "0.0.0.0:20241")];
    let args = ["tunnel", "--no-autoupdate", "run"];
    scope.run(Spec { image, env: &env, args: &args, host, health: Some(health), ..Spec::default() }).await
}

async fn wait_for_health(scope: &Scope, id: &str, wanted: &str) -> Result<()> {
    wait_until(wanted, SOON, async || (scope.health(id).await.ok()? == wanted).then_some(())).await
}

async fn the_stand_in_becomes_healthy_without_rights() -> Result<()> {
    let scope = Scope::new(docker()?);
    let token = token("tunnel-1", "");
    let id = stand_in(&scope, &images().stand_in().await?, &token).await?;
    wait_for_health(&scope, &id, "healthy").await?;
    let log = scope.logs(&id).await?;
    ensure!(log.contains("Registered tunnel connection connIndex=0 "), "{log}");
    ensure!(!log.contains(&token), "the token is in the log");
    scope.stop(&id, 0).await
}

async fn the_stand_in_changes_when_told() -> Result<()> {
    let scope = Scope::new(docker()?);
    let id = stand_in(&scope, &images().stand_in().await?, &token("tunnel-1", "drain=10")).await?;
    wait_for_health(&scope, &id, "healthy").await?;
    scope.tell_stand_in(&id, &json!({"unready": true})).await?;
    wait_for_health(&scope, &id, "unhealthy").await?;
    scope.tell_stand_in(&id, &json!({"unready": false})).await?;
    wait_for_health(&scope, &id, "healthy").await?;
    // As PID 1 it must end on SIGTERM by itself: within its drain, before Docker kills it.
    scope.stop(&id, 60).await?;
    let state = scope.inspect(&id).await?.state.context("state")?;
    ensure!(state.exit_code == Some(0), "{state:?}");
    Ok(())
}

async fn the_stand_in_obeys_its_token_and_its_image() -> Result<()> {
    let scope = Scope::new(docker()?);
    let image = images().stand_in_with(&[("STAND_IN_NO_DNS", "1"), ("STAND_IN_SPEED", "50")]).await?;
    for (image, token, code) in [
        (image, token("t", ""), 1),
        (images().stand_in().await?, token("t", "exit=7"), 7),
        (images().stand_in().await?, "not a token".into(), 255),
    ] {
        let id = stand_in(&scope, &image, &token).await?;
        wait_until("its end", SOON, async || (scope.status(&id).await.ok()? == "exited").then_some(())).await?;
        let state = scope.inspect(&id).await?.state.context("state")?;
        ensure!(state.exit_code == Some(code), "{code}: {state:?}\n{}", scope.logs(&id).await?);
    }
    Ok(())
}

async fn the_workload_serves_and_ends() -> Result<()> {
    let scope = Scope::new(docker()?);
    let network = scope.name("net");
    scope.create_network(&network).await?;
    let id = scope.run_workload(&[("dockflare.enable", "true")], &[], Some(&network), false).await?;
    let address = format!("{}:8080", scope.ip(&id).await?);
    let hello = async || Some(testkit::http::get(&address, "/").await.ok()?.body);
    let hello = wait_until("hello", SOON, hello).await?;
    ensure!(hello == format!("hello from {}\n", &id[..12]), "{hello}");
    let labels = scope.inspect(&id).await?.config.and_then(|config| config.labels).unwrap_or_default();
    ensure!(labels.get("dockflare.enable").is_some_and(|value| value == "true"), "{labels:?}");
    scope.pause(&id).await?;
    ensure!(scope.status(&id).await? == "paused");
    scope.unpause(&id).await?;
    scope.stop(&id, 60).await?;
    ensure!(scope.inspect(&id).await?.state.and_then(|state| state.exit_code) == Some(0));
    let brief = scope.run_workload(&[], &["sleep", "10"], None, true).await?;
    wait_until("a container run with --rm to be gone", SOON, async || {
        (scope.status(&brief).await.ok()? == "gone").then_some(())
    })
    .await
}

async fn the_proxy_refuses_what_is_not_open() -> Result<()> {
    let scope = Scope::new(docker()?);
    let proxy = scope.socket_proxy(&[("CONTAINERS", "1"), ("POST", "1")]).await?;
    let through = Docker::connect_with_host(&proxy.host_url())?;
    let all = ListContainersOptions { all: true, ..Default::default() };
    let listed = through.list_containers(Some(all)).await?;
    ensure!(listed.iter().any(|container| container.id.as_deref() == Some(proxy.container())), "{listed:?}");
    let refused = through.inspect_exec("0123").await;
    let is_403 = matches!(refused, Err(Error::DockerResponseServerError { status_code: 403, .. }));
    ensure!(is_403, "exec: {refused:?}");
    let answer = testkit::http::get(proxy.address(), "/v1.41/networks").await?;
    ensure!(answer.status == 403 && answer.body.contains("<html>"), "networks: {answer:?}");
    // The proxy that it imitates answers like this, and clients have been seen to fail on it.
    let raw = raw_answer(proxy.address(), "GET /exec/0123/json HTTP/1.1\r\nHost: docker\r\n\r\n").await?;
    ensure!(raw.starts_with("HTTP/1.0 403 Forbidden\r\n") && raw.ends_with("</html>\n"), "{raw}");
    let ping = testkit::http::get(proxy.address(), "/v1.41/_ping").await?;
    ensure!(ping.status == 200, "ping is open by default: {ping:?}");

    let reader = scope.socket_proxy(&[("CONTAINERS", "1")]).await?;
    let through = Docker::connect_with_host(&reader.host_url())?;
    through.list_containers(None).await?;
    let refused = through.start_container(proxy.container(), None).await;
    let is_403 = matches!(refused, Err(Error::DockerResponseServerError { status_code: 403, .. }));
    ensure!(is_403, "POST: {refused:?}");
    Ok(())
}

/// Sends the request and reads until the other side closes.
async fn raw_answer(address: &str, request: &str) -> Result<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await.context("it does not close")??;
    Ok(answer)
}

async fn the_proxy_comes_back_at_the_same_address() -> Result<()> {
    let scope = Scope::new(docker()?);
    let proxy = scope.socket_proxy(&[]).await?;
    let through = Docker::connect_with_host(&proxy.host_url())?;
    through.version().await?;
    proxy.kill().await?;
    ensure!(through.version().await.is_err(), "it answers though it was killed");
    proxy.restart().await?;
    through.version().await?;
    let network = scope.name("net");
    scope.create_network(&network).await?;
    let url = proxy.join(&network).await?;
    let networks = scope.inspect(proxy.container()).await?.network_settings.and_then(|settings| settings.networks);
    let aliases = networks.and_then(|mut networks| networks.remove(&network)?.aliases).unwrap_or_default();
    ensure!(aliases.iter().any(|alias| url == format!("tcp://{alias}:2375")), "{url}: {aliases:?}");
    Ok(())
}

async fn a_last_stage_is_built_from_local_files() -> Result<()> {
    let scope = Scope::new(docker()?);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("Dockerfile");
    let text = "FROM rust AS build\nRUN false\nFROM scratch\n\
        COPY --from=build --chmod=0755 /target/workload /bin/workload\n\
        COPY --from=build --chown=65532:65532 /out/data /app/data\n\
        USER 65532:65532\nVOLUME /app/data\nENTRYPOINT [\"/bin/workload\"]\n";
    std::fs::write(&file, text)?;
    let program = testkit::binary("workload")?;
    let empty = tempfile::tempdir()?;
    let sources = [("workload", program.as_path()), ("data", empty.path())];
    let image = images().from_stage("stage", &file, None, &sources).await?;
    let id = scope.run(Spec { image: &image, args: &["exit", "4"], ..Spec::default() }).await?;
    wait_until("its end", SOON, async || (scope.status(&id).await.ok()? == "exited").then_some(())).await?;
    ensure!(scope.inspect(&id).await?.state.and_then(|state| state.exit_code) == Some(4));
    Ok(())
}

async fn named_images_stay_until_their_label_is_removed() -> Result<()> {
    let scope = Scope::new(docker()?);
    let (repository, label) = (scope.name("dockflare-test-named"), scope.name("dockflare-test.named"));
    let image = Images::named(&repository, (&label, "1")).workload().await?;
    ensure!(image == format!("{repository}/workload:local"), "{image}");
    testkit::sweep(&docker()?).await?;
    // A container inherits its image's labels.
    let id = scope.run(Spec { image: &image, name: &repository, ..Spec::default() }).await?;
    let removed = testkit::remove_labelled(&docker()?, &format!("{label}=1")).await?;
    ensure!(removed == [format!("container {repository}"), format!("image {image}")], "{removed:?}");
    ensure!(scope.status(&id).await? == "gone");
    ensure!(testkit::remove_labelled(&docker()?, &label).await?.is_empty());
    Ok(())
}

/// Makes a container as the program under test does: without our labels.
async fn unlabelled_container(docker: &Docker, name: &str) -> Result<()> {
    let image = Some(images().workload().await?);
    let options = CreateContainerOptions { name: Some(name.into()), ..Default::default() };
    docker.create_container(Some(options), ContainerCreateBody { image, ..Default::default() }).await?;
    docker.start_container(name, None).await?;
    Ok(())
}

async fn unlabelled_network(docker: &Docker, name: &str) -> Result<()> {
    docker.create_network(NetworkCreateRequest { name: name.into(), ..Default::default() }).await?;
    Ok(())
}

/// Makes six objects: a network, a volume, two containers, and an unlabelled container and network.
async fn fill(scope: &Scope) -> Result<()> {
    let network = scope.name("net");
    scope.create_network(&network).await?;
    scope.create_volume(&scope.name("vol")).await?;
    scope.run_workload(&[], &[], Some(&network), false).await?;
    scope.run_workload(&[], &["exit", "1"], None, false).await?;
    for (owned, name) in [(true, scope.name("agent-made")), (false, scope.name("agent-net"))] {
        if owned {
            scope.owns_container(&name);
            unlabelled_container(scope.docker(), &name).await?;
        } else {
            scope.owns_network(&name);
            unlabelled_network(scope.docker(), &name).await?;
        }
    }
    Ok(())
}

/// Returns the containers, networks and volumes whose description contains this suffix.
async fn leftovers(suffix: &str) -> Result<Vec<String>> {
    let docker = docker()?;
    let all = ListContainersOptions { all: true, ..Default::default() };
    let containers = docker.list_containers(Some(all)).await?.into_iter().map(|container| format!("{container:?}"));
    let networks = docker.list_networks(None::<ListNetworksOptions>).await?.into_iter().map(|n| format!("{n:?}"));
    let volumes = docker.list_volumes(None::<ListVolumesOptions>).await?.volumes.unwrap_or_default();
    let volumes = volumes.into_iter().map(|volume| format!("{volume:?}"));
    Ok(containers.chain(networks).chain(volumes).filter(|thing| thing.contains(suffix)).collect())
}

async fn a_scope_leaves_nothing_behind() -> Result<()> {
    let scope = Scope::new(docker()?);
    let suffix = scope.suffix().to_owned();
    fill(&scope).await?;
    ensure!(leftovers(&suffix).await?.len() == 6, "{:?}", leftovers(&suffix).await?);
    drop(scope);
    ensure!(leftovers(&suffix).await?.is_empty(), "{:?}", leftovers(&suffix).await?);
    Ok(())
}

async fn a_scope_leaves_nothing_behind_after_a_panic() -> Result<()> {
    let scope = Scope::new(docker()?);
    let suffix = scope.suffix().to_owned();
    let test = async move {
        fill(&scope).await.expect("filled");
        // Not `panic!`: its message would look like a failure of this test.
        std::panic::resume_unwind(Box::new("a failing test"));
    };
    let result: Result<(), _> = std::panic::AssertUnwindSafe(test).catch_unwind().await;
    ensure!(result.is_err());
    ensure!(leftovers(&suffix).await?.is_empty(), "{:?}", leftovers(&suffix).await?);
    Ok(())
}

async fn a_scope_leaves_alone_what_was_there_before() -> Result<()> {
    let outer = Scope::new(docker()?);
    let name = outer.name("here-before");
    outer.owns_container(&name);
    unlabelled_container(outer.docker(), &name).await?;
    let inner = Scope::new(docker()?);
    inner.owns_container(&name);
    drop(inner);
    ensure!(outer.status(&name).await? == "running");
    Ok(())
}

const LEFTOVERS: &str = "TESTKIT_LEAVE_THINGS_BEHIND";

/// The process to kill: prints the scope's suffix once everything exists, then waits forever.
fn leave_things_behind() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let scope = Scope::new(docker().expect("client"));
        fill(&scope).await.expect("filled");
        println!("suffix={}", scope.suffix());
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}

async fn the_sweep_removes_what_a_killed_process_left() -> Result<()> {
    let env: Vec<_> = std::env::vars().chain([(LEFTOVERS.to_owned(), "1".to_owned())]).collect();
    let mut victim = testkit::AgentProcess::spawn(&std::env::current_exe()?, &env, "/".as_ref())?;
    let line = victim.wait_for_log("suffix=", Duration::from_secs(60)).await?;
    let suffix = line.trim_start_matches("suffix=").to_owned();
    // A container of a living process: this one.
    let bystander = Scope::new(docker()?);
    let kept = bystander.run_workload(&[], &[], None, false).await?;

    testkit::sweep(&docker()?).await?;
    ensure!(leftovers(&suffix).await?.len() == 6, "it is alive yet: {:?}", leftovers(&suffix).await?);
    victim.sigkill()?;
    victim.wait_exit(SOON).await?;
    testkit::sweep(&docker()?).await?;
    ensure!(leftovers(&suffix).await?.is_empty(), "{:?}", leftovers(&suffix).await?);
    ensure!(bystander.status(&kept).await? == "running", "the sweep took a living process's container");
    let filters = HashMap::from([("label".to_owned(), vec![format!("dockflare-test.pid={}", victim.pid())])]);
    let options = ListImagesOptions { filters: Some(filters), ..Default::default() };
    let images = docker()?.list_images(Some(options)).await?;
    ensure!(images.is_empty(), "{images:?}");
    Ok(())
}

/// Runs this program again to its end, with additional variables. Returns its exit code and its output.
async fn run_self(more: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let mut env: Vec<_> = std::env::vars().filter(|(name, _)| name != "CI").collect();
    env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let mut process = testkit::AgentProcess::spawn(&std::env::current_exe()?, &env, "/".as_ref())?;
    let code = process.wait_exit(Duration::from_secs(100)).await?.code();
    Ok((code, process.log()))
}

async fn without_an_engine_all_is_ignored_but_fails_in_ci() -> Result<()> {
    let nowhere = ("DOCKER_HOST", "unix:///no/such.sock");
    let (code, log) = run_self(&[nowhere]).await?;
    ensure!(
        code == Some(0) && log.contains("test result: ok. 0 passed; 0 failed; ") && !log.contains(" 0 ignored"),
        "{log}"
    );
    let (code, log) = run_self(&[nowhere, ("CI", "true")]).await?;
    ensure!(code != Some(0) && log.contains("test result: FAILED. 0 passed; ") && log.contains(" 0 ignored"), "{log}");
    Ok(())
}

const FAILURES: &str = "TESTKIT_FAIL_IN_EVERY_WAY";

fn fail_in_every_way() -> ExitCode {
    let overruns = testkit::case("overruns", || async {
        let scope = Scope::new(docker()?);
        scope.run_workload(&[], &[], None, false).await?;
        std::future::pending().await
    });
    let panics = testkit::case("panics", || async { panic!("this is how") });
    let tells = testkit::case("tells", || async {
        let env = [("PATH".to_owned(), std::env::var("PATH")?)];
        let args = ["-c", "echo the secret is hunter2"];
        let mut process = testkit::AgentProcess::spawn_with("/bin/sh".as_ref(), &args, &env, "/".as_ref())?;
        process.plant("hunter2");
        process.wait_exit(SOON).await?;
        Ok(())
    });
    testkit::main(vec![overruns.limit(Duration::from_secs(15)), panics, tells])
}

async fn a_failure_explains_itself() -> Result<()> {
    let (code, log) = run_self(&[(FAILURES, "1")]).await?;
    ensure!(code != Some(0) && log.contains("test result: FAILED. 0 passed; 3 failed"), "{log}");
    ensure!(log.contains("not done within 15s") && log.contains("workload: listening on 0.0.0.0:8080"), "{log}");
    ensure!(log.contains("panicked: this is how"), "{log}");
    ensure!(log.contains("wrote a secret to its log:\nthe secret is <THE SECRET>"), "{log}");
    Ok(())
}
