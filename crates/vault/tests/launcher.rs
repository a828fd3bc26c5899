#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests block as they like")]
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]
//! Tests `exec` and `wait` as operators run them: the real binary, real files, exit codes and signals.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(30);

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dockflare-vault"));
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").env("FROM_IMAGE", "kept");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the command, which must not start the program. Returns its exit code and standard error.
fn fails(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    assert_eq!(text(&output.stdout), "", "the program ran");
    (output.status.code().unwrap(), text(&output.stderr))
}

/// Delivers like the vault: makes a folder for the version, then replaces the link.
fn deliver(folder: &Path, version: &str, files: &[(&str, &str)]) {
    let place = folder.join(version);
    fs::create_dir(&place).unwrap();
    for (name, value) in files {
        fs::write(place.join(name), value).unwrap();
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(name), &link).unwrap();
        }
    }
    symlink(version, folder.join("..data.new")).unwrap();
    let before = fs::read_link(folder.join("..data")).ok();
    fs::rename(folder.join("..data.new"), folder.join("..data")).unwrap();
    if let Some(before) = before {
        fs::remove_dir_all(folder.join(before)).unwrap();
    }
}

/// Starts a child and waits until it reports that it waits.
fn waiting(arguments: &[&str]) -> (Child, std::io::BufReader<std::process::ChildStderr>, String) {
    use std::io::BufRead;
    let mut child = command(arguments).spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    (child, said, line)
}

#[test]
fn each_file_is_a_variable_and_the_program_takes_the_place_of_the_launcher() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("secrets");
    fs::create_dir(&folder).unwrap();
    deliver(&folder, "..1", &[("DB_PASSWORD", "p\n"), ("RAW", "two\nlines\n\n"), (".hidden-file", "x"), ("EMPTY", "")]);
    let shown = folder.display().to_string();
    let mut child = command(&["exec", "--dir", &shown, "--", "sh", "-c", "echo $$; echo $PPID; env; exit 7"]);
    let child = child.spawn().unwrap();
    let (pid, own) = (child.id().to_string(), std::process::id().to_string());
    let output = child.wait_with_output().unwrap();
    let said = text(&output.stdout);
    let mut lines = said.lines();
    assert_eq!((lines.next(), lines.next()), (Some(pid.as_str()), Some(own.as_str())), "it is the same process");
    assert_eq!(output.status.code(), Some(7));
    for expected in ["DB_PASSWORD=p\n", "RAW=two\nlines\n\n", "EMPTY=\n", "FROM_IMAGE=kept\n"] {
        assert!(said.contains(expected), "{expected:?} is missing in {said}");
    }
    assert!(!said.contains("hidden") && output.stderr.is_empty(), "{said}");
}

#[test]
fn what_the_program_inherits_is_as_if_nobody_had_stood_before_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("A"), "1").unwrap();
    let shown = dir.path().display().to_string();
    let what = "grep -E '^(Sig(Blk|Ign|Cgt)|ShdPnd)' /proc/self/status; ulimit -c; umask; ls /proc/self/fd";
    let alone = Command::new("bash").args(["-c", what]).stdin(Stdio::null()).output().unwrap();
    let output = run(&["exec", "--dir", &shown, "--", "bash", "-c", what]);
    assert_eq!(text(&output.stdout), text(&alone.stdout));
}

#[test]
fn lines_of_a_file_are_variables_as_they_stand_and_single_files_have_the_name_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    deliver(
        dir.path(),
        "..1",
        &[("app.env", "# a comment\n\nA=x=y \"z\" # no comment\r\nB=\n_c9=ü\n"), ("db-password", "hunter2\n")],
    );
    let (env_file, file) = (dir.path().join("app.env"), dir.path().join("db-password"));
    let pair = format!("PGPASSWORD={}", file.display());
    let output = run(&["exec", "--env-file", env_file.to_str().unwrap(), "--file", &pair, "--", "env"]);
    let said = text(&output.stdout);
    for expected in ["A=x=y \"z\" # no comment\n", "B=\n", "_c9=ü\n", "PGPASSWORD=hunter2\n"] {
        assert!(said.contains(expected), "{expected:?} is missing in {said}{}", text(&output.stderr));
    }
}

#[test]
fn all_that_is_wrong_is_said_at_once_without_a_value_and_the_program_does_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let long = "s3cret".repeat(30_000);
    for (name, value) in [
        ("db-password", "s3cret"),
        ("9", "s3cret"),
        ("ZERO", "s3\0cret"),
        ("LONG", long.as_str()),
        ("lines.env", "s3cret\n s3cret=1\nA=1\nA=s3cret\n=s3cret\nexport B=s3cret"),
    ] {
        fs::write(dir.path().join(name), value).unwrap();
    }
    let (shown, lines) = (dir.path().display().to_string(), dir.path().join("lines.env").display().to_string());
    let (code, said) = fails(&["exec", "--dir", &shown, "--env-file", &lines, "--", "echo", "ran"]);
    assert_eq!(code, 64, "{said}");
    for expected in [
        "db-password: the name is no name of a variable",
        "/9: the name is no name",
        "ZERO: the value of ZERO has a zero byte",
        "LONG: LONG and its value have 180006 bytes, and a variable has 131072 at the most",
        "lines.env line 1: there is no '='",
        "lines.env line 2: what stands before '='",
        "lines.env line 4: A is in ",
        "lines.env line 5: what stands",
        "lines.env line 6: what stands",
    ] {
        assert!(said.contains(expected), "{expected:?} is missing in {said}");
    }
    assert_eq!(said.lines().count(), 9, "{said}");
    assert!(!said.contains("s3cret") && !said.contains("s3\0"), "{said}");
    let (code, said) = fails(&["exec", "--file", "a-b=/x", "--", "echo"]);
    assert!(code == 64 && said.contains("no name of a variable"), "{code} {said}");
}

#[test]
fn the_longest_variable_that_it_takes_is_one_that_the_system_takes() {
    let dir = tempfile::tempdir().unwrap();
    let value = "x".repeat(32 * 4096 - 3);
    fs::write(dir.path().join("A"), &value).unwrap();
    let shown = dir.path().display().to_string();
    let output = run(&["exec", "--dir", &shown, "--", "sh", "-c", "echo ${#A}"]);
    assert_eq!(text(&output.stdout), format!("{}\n", value.len()), "{}", text(&output.stderr));
}

#[test]
fn it_waits_for_the_files_says_so_and_then_runs() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("later");
    let shown = folder.display().to_string();
    let (child, _said, line) = waiting(&["exec", "--dir", &shown, "--", "env"]);
    assert!(line.contains(&format!("waiting for the folder {shown}")), "{line}");
    fs::create_dir(&folder).unwrap();
    deliver(&folder, "..1", &[("A", "come")]);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && text(&output.stdout).contains("A=come\n"));
}

#[test]
fn a_signal_ends_the_wait_and_a_time_out_has_a_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.env").display().to_string();
    let (mut child, _said, line) = waiting(&["exec", "--env-file", &file, "--", "echo", "ran"]);
    assert!(line.contains(&file), "{line}");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let (code, said) = fails(&["exec", "--env-file", &file, "--timeout", "0", "--", "echo", "ran"]);
    assert!(code == 75 && said.contains(&format!("{file}: not there after 0 s")), "{code} {said}");
}

#[test]
fn a_program_that_cannot_be_run_is_named_with_the_codes_of_a_shell() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("A"), "s3cret").unwrap();
    let program = dir.path().join("program");
    fs::write(&program, "x").unwrap();
    let (shown, env) = (dir.path().display().to_string(), format!("A={}/A", dir.path().display()));
    let (code, said) = fails(&["exec", "--file", &env, "--", &format!("{shown}/none")]);
    assert!(code == 127 && said.contains("/none is not there"), "{code} {said}");
    let (code, said) = fails(&["exec", "--file", &env, "--", program.to_str().unwrap()]);
    assert!(code == 126 && said.contains("Permission denied"), "{code} {said}");
    let (code, _) = fails(&["exec", "--file", &env]);
    assert_eq!(code, 64);
}

#[test]
fn a_file_that_may_not_be_read_or_is_none_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&dir.path().join("FIFO"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let shown = dir.path().display().to_string();
    let (code, said) = fails(&["exec", "--dir", &shown, "--", "echo", "ran"]);
    assert!(code == 73 && said.contains("FIFO is a FIFO"), "{code} {said}");
}

#[test]
fn what_is_read_is_one_version_and_never_a_mixture_while_they_change() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_owned();
    let files = |value: &'static str| [("A", value), ("B", value), ("C", value), ("D", value)];
    deliver(&folder, "..0", &files("first"));
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1_u32.. {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                deliver(&folder, &format!("..{number}"), &files(["odd", "even"][number as usize % 2]));
            }
        });
        let shown = folder.display().to_string();
        let checked = std::panic::catch_unwind(|| {
            for _ in 0..100 {
                let output = run(&["exec", "--dir", &shown, "--", "sh", "-c", "echo $A $B $C $D"]);
                let said = text(&output.stdout);
                let words: std::collections::BTreeSet<_> = said.split_whitespace().collect();
                assert!(words.len() == 1 && said.split_whitespace().count() == 4, "{said}{}", text(&output.stderr));
            }
        });
        ends.store(true, Ordering::Relaxed);
        checked.unwrap();
    });
}

#[test]
fn wait_ends_when_the_files_are_there_and_needs_no_configuration_for_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display().to_string();
    let (code, said) = fails(&["wait", &shown, "--timeout", "0"]);
    assert!(code == 75 && said.contains(&format!("files in {shown}: not there")), "{code} {said}");
    let child = command(&["wait", &shown]).spawn().unwrap();
    deliver(dir.path(), "..1", &[("a-file", "x")]);
    let began = Instant::now();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert!(began.elapsed() < SOON);
    assert_eq!(run(&["wait", &shown, "--timeout", "0"]).status.code(), Some(0));
    // By the workload's name, if there is a configuration.
    let config = dir.path().join("config.yaml");
    let row = format!("deliveries:\n- {{workload: app, directory: {shown}, files: [{{name: a-file, secret: a}}]}}\n");
    fs::write(&config, row).unwrap();
    let config = config.display().to_string();
    let wait = |name: &str| run(&["--config", &config, "wait", name, "--timeout", "0"]);
    assert_eq!(wait("app").status.code(), Some(0));
    let unknown = wait("ap");
    assert_eq!(unknown.status.code(), Some(64));
    assert!(text(&unknown.stderr).contains("no workload ap in the configuration: there are app"), "{unknown:?}");
}

#[test]
fn an_end_by_a_signal_is_the_programs_own() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("A"), "1").unwrap();
    let shown = dir.path().display().to_string();
    let output = run(&["exec", "--dir", &shown, "--", "sh", "-c", "kill -USR1 $$"]);
    assert_eq!(output.status.signal(), Some(Signal::SIGUSR1 as i32));
}

#[test]
fn the_vault_puts_the_launcher_into_its_folder_and_replaces_another_version_in_one_step() {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["data", "run", "launcher"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    let made = run(&["generate-key"]);
    let path = |name: &str| dir.path().join(name);
    fs::write(path("master.key"), made.stdout).unwrap();
    fs::set_permissions(path("master.key"), fs::Permissions::from_mode(0o600)).unwrap();
    let shown = dir.path().display();
    let config = format!(
        "storage: {{file: {shown}/data/vault.redb}}\nencryption: {{master_key: {shown}/master.key}}\naudit: {{file: {shown}/data/audit.log}}\nadmin: {{socket: {shown}/run/admin.sock}}\nhealth: {{port: 0}}\nlauncher: {{folder: {shown}/launcher}}\n"
    );
    fs::write(path("config.yaml"), config).unwrap();
    let program = path("launcher/dockflare-vault");
    let own = fs::read(env!("CARGO_BIN_EXE_dockflare-vault")).unwrap();
    let start = || {
        use std::io::{BufRead, BufReader};
        let mut child = command(&["--config", path("config.yaml").to_str().unwrap(), "run"]).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let seen: Vec<_> = lines
            .scan(false, |ends, line| {
                (!std::mem::replace(ends, line.contains("dockflare-vault started"))).then_some(line)
            })
            .collect();
        assert!(seen.iter().any(|line| line.contains("launcher is in its place")), "{seen:#?}");
        child.kill().unwrap();
        child.wait().unwrap();
    };
    start();
    assert!(fs::read(&program).unwrap() == own);
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o7777, 0o555);
    let before = fs::metadata(&program).unwrap().modified().unwrap();
    start();
    assert_eq!(fs::metadata(&program).unwrap().modified().unwrap(), before, "what is right stays");
    // Another version that is running, and half a copy that a killed vault left.
    fs::remove_file(&program).unwrap();
    fs::copy("/bin/sleep", &program).unwrap();
    fs::write(path("launcher/.dockflare-vault.new"), "half").unwrap();
    let mut old = Command::new(&program).arg("600").spawn().unwrap();
    start();
    assert!(fs::read(&program).unwrap() == own && old.try_wait().unwrap().is_none());
    old.kill().unwrap();
    old.wait().unwrap();
    assert_eq!(fs::read_dir(path("launcher")).unwrap().count(), 1);
    let output = Command::new(&program).args(["wait", "/none", "--timeout", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(75));
}
