//! Tests the vault in its release image, with only the privileges that the documentation gives it, on a real Docker
//! Engine.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use testkit::bollard::container::LogOutput;
use testkit::bollard::exec::{CreateExecOptions, StartExecResults};
use testkit::models::HostConfig;
use testkit::{Scope, Spec, images, wait_until};

#[path = "engine/reload.rs"]
mod reload;

const SOON: Duration = Duration::from_secs(30);
/// Limit of the image's size in bytes.
const MAX_IMAGE_BYTES: i64 = 12 << 20;

fn main() -> ExitCode {
    testkit::main(testkit::cases![
        the_image_serves_read_only_without_rights_and_keeps_what_it_has_over_kill_and_restart,
        a_key_that_is_not_there_ends_it_with_64_and_says_what_to_do,
        a_key_that_everybody_may_read_is_taken_in_a_container_of_its_own_and_one_they_may_write_never,
        reload::a_rotated_credential_restarts_one_after_the_other_and_a_bad_one_is_put_back,
        reload::a_vault_that_is_killed_between_the_steps_of_a_restart_goes_on_and_a_bad_one_is_still_put_back,
        reload::a_signal_reaches_the_first_process_and_nothing_is_restarted,
        reload::a_launched_program_has_its_credential_and_nobody_else_sees_it,
        reload::after_a_reboot_in_the_worst_order_what_was_refused_is_started_and_what_was_stopped_is_not,
        reload::the_socket_proxy_does_four_things_for_the_containers_of_its_list_by_id,
    ])
}

/// The settings of docs/credentials.md: three volumes, a private tmpfs for the socket, no network, no privileges.
fn host(scope: &Scope) -> HostConfig {
    let tmpfs = HashMap::from([("/run/dockflare-vault".to_owned(), "mode=0700,uid=65431,gid=65431".to_owned())]);
    HostConfig {
        mounts: Some(vec![
            scope.mount("data", "/app/data"),
            scope.mount("state", "/app/state"),
            scope.mount("config", "/app/config"),
        ]),
        tmpfs: Some(tmpfs),
        network_mode: Some("none".to_owned()),
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        ..HostConfig::default()
    }
}

/// Runs a command in the container. Returns its output and its exit code.
async fn exec(scope: &Scope, container: &str, arguments: &[&str]) -> Result<(String, i64)> {
    let command = ["/dockflare-vault"].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
    let options = CreateExecOptions {
        cmd: Some(command),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..CreateExecOptions::<String>::default()
    };
    let id = scope.docker().create_exec(container, options).await?.id;
    let mut text = String::new();
    if let StartExecResults::Attached { mut output, .. } = scope.docker().start_exec(&id, None).await? {
        while let Some(piece) = output.next().await {
            if let LogOutput::StdOut { message } | LogOutput::StdErr { message } = piece? {
                text += &String::from_utf8_lossy(&message);
            }
        }
    }
    let code = scope.docker().inspect_exec(&id).await?.exit_code.context("no code")?;
    Ok((text, code))
}

/// Builds the image and puts a key into its configuration volume.
async fn prepared(scope: &Scope, mode: u32) -> Result<String> {
    prepared_as(scope, "storage: {change_counter: /app/state/change}\n", mode).await
}

async fn prepared_with(scope: &Scope, config: &str) -> Result<String> {
    prepared_as(scope, config, 0o600).await
}

/// As [`prepared`], with this configuration and this mode of both files.
async fn prepared_as(scope: &Scope, config: &str, mode: u32) -> Result<String> {
    let image = images().vault(Path::new(env!("CARGO_BIN_EXE_dockflare-vault"))).await?;
    let mounts = Some(vec![scope.mount("config", "/app/config")]);
    let make = Spec {
        image: &image,
        args: &["generate-key"],
        host: HostConfig { mounts, network_mode: Some("none".to_owned()), ..HostConfig::default() },
        ..Spec::default()
    };
    let maker = scope.run(make).await?;
    wait_until("the key to be made", SOON, async || (scope.status(&maker).await.ok()? == "exited").then_some(()))
        .await?;
    let key = scope.logs(&maker).await?;
    ensure!(key.trim().len() == 44, "no key was printed");
    let mut archive = tar::Builder::new(Vec::new());
    for (name, text) in [("master.key", key.trim()), ("config.yaml", config)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(mode);
        header.set_uid(65431);
        header.set_gid(65431);
        header.set_cksum();
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    let body = testkit::bollard::body_full(archive.into_inner()?.into());
    let to = testkit::bollard::query_parameters::UploadToContainerOptions {
        path: "/app/config".to_owned(),
        ..Default::default()
    };
    scope.docker().upload_to_container(&maker, Some(to), body).await?;
    Ok(image)
}

async fn the_image_serves_read_only_without_rights_and_keeps_what_it_has_over_kill_and_restart() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let image = prepared(&scope, 0o600).await?;
    let vault = scope.run(Spec { image: &image, host: host(&scope), ..Spec::default() }).await?;
    let started = async || scope.logs(&vault).await.ok()?.contains("dockflare-vault started").then_some(());
    wait_until("the vault to start", SOON, started).await?;

    assert_eq!(exec(&scope, &vault, &["set", "app/db", "hunter2"]).await?.1, 0);
    assert_eq!(exec(&scope, &vault, &["get", "app/db"]).await?, ("hunter2".to_owned(), 0));
    assert_eq!(exec(&scope, &vault, &["get", "none"]).await?, ("none is not there\n".to_owned(), 1));
    assert_eq!(exec(&scope, &vault, &["healthcheck"]).await?.1, 0);
    let (checked, code) = exec(&scope, &vault, &["check"]).await?;
    assert_eq!(code, 0, "{checked}");

    scope.kill(&vault, "SIGKILL").await?;
    scope.start(&vault).await?;
    let again = async || (exec(&scope, &vault, &["status"]).await.ok()?.1 == 0).then_some(());
    wait_until("the vault to serve again", SOON, again).await?;
    assert_eq!(exec(&scope, &vault, &["get", "app/db"]).await?, ("hunter2".to_owned(), 0));
    let inspected = serde_json::to_string(&scope.inspect(&vault).await?)?;
    assert!(!inspected.contains("hunter2") && !scope.logs(&vault).await?.contains("hunter2"));

    scope.stop(&vault, 10).await?;
    assert_eq!(scope.inspect(&vault).await?.state.and_then(|state| state.exit_code), Some(0));
    // Check the size in a release build only: a debug build is many times larger.
    if !cfg!(debug_assertions) {
        let bytes = scope.docker().inspect_image(&image).await?.size.context("no size")?;
        assert!(bytes <= MAX_IMAGE_BYTES, "{bytes}");
    }
    Ok(())
}

/// Docker mounts its secrets with 0444.
async fn a_key_that_everybody_may_read_is_taken_in_a_container_of_its_own_and_one_they_may_write_never() -> Result<()> {
    for mode in [0o444, 0o666] {
        let scope = Scope::new(testkit::docker()?);
        let image = prepared(&scope, mode).await?;
        let vault = scope.run(Spec { image: &image, host: host(&scope), ..Spec::default() }).await?;
        let said = if mode == 0o444 { "dockflare-vault started" } else { "may be changed by others (mode 0666)" };
        wait_until(said, SOON, async || scope.logs(&vault).await.ok()?.contains(said).then_some(())).await?;
    }
    Ok(())
}

async fn a_key_that_is_not_there_ends_it_with_64_and_says_what_to_do() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let image = images().vault(Path::new(env!("CARGO_BIN_EXE_dockflare-vault"))).await?;
    let vault = scope.run(Spec { image: &image, host: host(&scope), ..Spec::default() }).await?;
    wait_until("the vault to end", SOON, async || (scope.status(&vault).await.ok()? == "exited").then_some(())).await?;
    assert_eq!(scope.inspect(&vault).await?.state.and_then(|state| state.exit_code), Some(64));
    let log = scope.logs(&vault).await?;
    assert!(log.contains("dockflare-vault generate-key > /app/config/master.key"), "{log}");
    Ok(())
}
