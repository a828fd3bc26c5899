//! The program itself: arguments, exit codes, `.env`.

use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitStatus;

use dockflare_dev_master::Protocol;
use serde_json::{Value, json};
use testkit::AgentProcess;

use crate::desk::Desk;
use crate::support::{SOON, agent_binary};

/// Runs the program to its end, and returns its exit code and its output.
pub(crate) async fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().unwrap();
    let env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let mut program = AgentProcess::spawn_with(&agent_binary(), args, &env, folder.path()).unwrap();
    let code = program.wait_exit(SOON).await.as_ref().ok().and_then(ExitStatus::code);
    (code, program.log())
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn help_and_version_end_with_0_and_a_bad_argument_with_64() {
    let (code, text) = run(&["--help"], &[]).await;
    assert!(
        code == Some(0)
            && text.contains("healthcheck")
            && text.contains("support-bundle")
            && text.contains("64")
            && text.contains("73"),
        "{text}"
    );
    let (code, text) = run(&["--version"], &[]).await;
    assert_eq!((code, &*text), (Some(0), concat!("dockflare-agent ", env!("CARGO_PKG_VERSION"))));
    for bad in [&["--no-such-option"][..], &["explode"], &["run", "twice"]] {
        let (code, text) = run(bad, &[]).await;
        assert!(code == Some(64) && text.contains("Usage"), "{bad:?}: {code:?} {text}");
    }
}

/// With a process limit so low that the program can start no thread, or only one. The kernel applies the limit only to
/// users other than root.
#[tokio::test]
async fn a_limit_on_processes_is_named_whatever_the_program_was_about_to_say() {
    if !nix::unistd::getuid().is_root() {
        return testkit::skipped("takes root");
    }
    // A folder from which that user may run the program.
    let folder = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir();
    let folder = folder.unwrap();
    let program = folder.path().join("agent");
    std::fs::copy(agent_binary(), &program).unwrap();
    let data = folder.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    // Pick a user id under which nothing else runs.
    let user = fastrand::u32(200_000..4_000_000).to_string();
    for (limit, args) in [("1", vec![]), ("1", vec!["check"]), ("2", vec![])] {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "prlimit"]).arg(format!("--nproc={limit}"));
        command.arg(&program).args(&args).current_dir(folder.path()).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("DOCKFLARE_MASTER_URL", "http://127.0.0.1:1").env("DOCKFLARE_API_KEY", "k");
        command.env("DOCKER_HOST", "unix:///nowhere").env("HEALTH_CHECK_PORT", "0");
        command.env("DOCKFLARE_DATA_DIR", &data);
        let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&[ended.stdout, ended.stderr].concat()).into_owned();
        assert!(text.contains("--ulimit nproc"), "{limit} {args:?}: {:?} {text:?}", ended.status);
        assert!(!ended.status.success(), "{limit} {args:?}: {text}");
    }
}

#[tokio::test]
async fn a_bad_configuration_ends_with_64_and_names_everything_that_is_wrong() {
    let env = [
        ("DOCKFLARE_MASTER_URL", "ftp://master"),
        ("DOCKER_HOST", "ssh://host"),
        ("REPORT_INTERVAL_SECONDS", "4"),
        ("CF_ACCESS_CLIENT_ID", "only-this"),
        ("TZ", "Mars/Olympus"),
    ];
    for args in [&[][..], &["run"]] {
        let (code, text) = run(args, &env).await;
        assert_eq!(code, Some(64), "{text}");
        let names = ["DOCKFLARE_MASTER_URL", "DOCKFLARE_API_KEY", "DOCKER_HOST", "REPORT_INTERVAL", "CF_ACCESS", "TZ"];
        for name in names {
            assert!(text.contains(name), "{name} is not in: {text}");
        }
    }
}

#[tokio::test]
async fn a_data_folder_that_cannot_be_made_ends_with_73() {
    let env = [
        ("DOCKFLARE_MASTER_URL", "http://127.0.0.1:9"),
        ("DOCKFLARE_API_KEY", "key"),
        ("DOCKFLARE_DATA_DIR", "/proc/nowhere"),
    ];
    let (code, text) = run(&[], &env).await;
    assert!(
        code == Some(73) && text.contains("/proc/nowhere") && text.contains("set DOCKFLARE_DATA_DIR"),
        "{code:?} {text}"
    );
}

#[tokio::test]
async fn a_dotenv_in_the_working_folder_fills_what_is_unset_or_empty_and_nothing_else() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let file = format!(
        "# settings\nexport DOCKFLARE_MASTER_URL={}\nDOCKFLARE_API_KEY=\"{}\"\nAGENT_DISPLAY_NAME='of the file'\nLOG_FORMAT=json\n",
        desk.master.url(),
        desk.key
    );
    std::fs::write(desk.path(".env"), file).unwrap();
    desk.env.retain(|(name, _)| name != "DOCKFLARE_MASTER_URL");
    desk.set("DOCKFLARE_API_KEY", "");
    desk.set("AGENT_DISPLAY_NAME", "of the environment");
    let agent = desk.agent().unwrap();
    assert_eq!(desk.registered(1).await.unwrap().display_name, "of the environment");
    let line = agent.wait_for_log("registered at the master", SOON).await.unwrap();
    assert!(line.starts_with('{'), "{line}");
    desk.assert_no_violations();
}

/// Operators' log collectors rely on these names.
#[tokio::test]
async fn the_log_as_json_has_the_fields_that_the_documentation_names() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    desk.set("LOG_FORMAT", "json");
    desk.set("LOG_LEVEL", "INFO");
    let agent = desk.agent().unwrap();
    let banner = agent.wait_for_log("dockflare-agent runs", SOON).await.unwrap();
    let lines: Vec<Value> = agent.log().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        for key in ["timestamp", "level", "message"] {
            assert!(line[key].is_string(), "{key} of {line}");
        }
        line["timestamp"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    }
    let banner: Value = serde_json::from_str(&banner).unwrap();
    assert_eq!((&banner["level"], &banner["message"]), (&json!("INFO"), &json!("dockflare-agent runs")));
    let fields = ["version", "id", "master", "protocol", "docker", "host", "network", "image"];
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operate.md")).unwrap();
    for field in ["timestamp", "level", "message"].into_iter().chain(fields) {
        assert!(banner.get(field).is_some(), "{field} of {banner}");
        assert!(page.contains(&format!("`{field}`")), "{field} is not in docs/operate.md");
    }
    assert_eq!(banner.as_object().unwrap().len(), 3 + fields.len(), "{banner}");
}
