//! The command line. A command that fails says in one line what went wrong. Exit codes: 0 done, 1 denied, not found or
//! something found wrong, 64 bad use or configuration, 70 a bug in the vault, 73 a place that is taken, 74 the disk.

#![allow(clippy::disallowed_methods, reason = "a command does one thing and has nothing else to serve")]
#![allow(clippy::disallowed_macros, reason = "a command ends with what it prints; the running vault logs")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Parser, Subcommand};
use dockflare_host::page::PageAddress;
use dockflare_host::{logging, signals};
use serde_json::Value as Json;
use zeroize::Zeroizing;

use crate::config::{Config, DEFAULT_FILE};
use crate::doors::admin::{Answer, Request, wipe};
use crate::run::{Source, run};
use crate::seal::Key;
use crate::secret::MAX_VALUE_BYTES;
use crate::socket_proxy::ProxyConfig;
use crate::{bundle, check, client, keyfile, launcher, pages, settings, socket_proxy};

/// Keeps credentials sealed, and hands them out by one table of grants.
///
/// Exit codes: 0 done, 1 denied, not found or something is wrong, 64 bad use or configuration, 70 a mistake in the
/// vault, 73 a place that is taken or cannot be used, 74 the disk.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration; else CONFIG_FILE, else /app/config/config.yaml.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the vault; the default.
    Run {
        /// Go on with a store that is older than its change counter: a backup that was put back.
        #[arg(long)]
        accept_rollback: bool,
    },
    /// Print a new master key: dockflare-vault generate-key > master.key.
    GenerateKey,
    /// Write the value of a secret to standard output, byte for byte.
    Get {
        key: String,
        /// One of the last ten versions, see history.
        #[arg(long)]
        version: Option<u64>,
    },
    /// Store a new version of a secret: from standard input, or asked for without being shown.
    Set {
        key: String,
        /// The value, for all to see in the process list.
        value: Option<String>,
        /// Seconds until it ends.
        #[arg(long)]
        expires_in: Option<u64>,
        /// Only if this is the newest version, 0 for none.
        #[arg(long)]
        if_version: Option<u64>,
    },
    /// Delete a secret and all its values. Workloads that have it keep their files, unless it is revoked.
    Delete {
        key: String,
        /// Take the files that were made of it from all workloads, at once; also when it was deleted before.
        #[arg(long)]
        revoke: bool,
    },
    /// Print the names, one a line.
    List { prefix: Option<String> },
    /// Seal everything with a new data key, or, with --master, wrap the keys for a new master key.
    Rotate {
        /// A file with the new master key, which the vault itself can read; else encryption.next_master_key_file.
        #[arg(long, value_name = "NEW_KEY_FILE")]
        #[expect(clippy::option_option, reason = "not given, given without a file, given with one")]
        master: Option<Option<PathBuf>>,
    },
    /// Print counts and ages, without names.
    Status,
    /// Print the versions of a secret, without values.
    History { key: String },
    /// Look after the audit.
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Try, without changing anything, each thing that the vault needs; exit 0 if nothing fails, 1 if something does.
    Check,
    /// Ask the vault that runs in this container whether it does its job; exit 0 if so, 1 if not.
    Healthcheck,
    /// Print one JSON document without secrets or names that helps to find out what is wrong.
    SupportBundle,
    /// Run the socket proxy: it alone holds the Docker socket, and lets the vault signal, restart and start the containers
    /// of RELOAD_CONTAINERS, and nothing else.
    SocketProxy {
        /// Ask the one that runs in this container whether it reaches Docker; exit 0 if so, 1 if not.
        #[arg(long)]
        check: bool,
    },
    /// In another container: wait for files, put them into the environment, and become the program after --.
    ///
    /// Exit codes before the program runs: 64 a name or a text that cannot be used, 73 a file that may not be read, 75
    /// time-out, 126 a program that cannot be run, 127 one that is not there, 143 SIGTERM while it waited.
    Exec {
        /// A folder with a file for each variable, called like it; /run/secrets unless another option names files.
        #[arg(long, value_name = "FOLDER")]
        dir: Vec<PathBuf>,
        /// A file with lines of NAME=VALUE.
        #[arg(long, value_name = "FILE")]
        env_file: Vec<PathBuf>,
        /// A variable and the file with its value.
        #[arg(long, value_name = "NAME=FILE", value_parser = launcher::variable)]
        file: Vec<(String, PathBuf)>,
        /// Seconds to wait for the files; without it there is no end.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// The program and its arguments.
        #[arg(last = true, required = true, value_name = "PROGRAM")]
        command: Vec<OsString>,
    },
    /// Wait until a workload has its files: exit 0 when it has, 75 when not in time.
    Wait {
        /// Its name in the configuration, or its folder, from the root, where there is none.
        workload: String,
        /// Seconds; 0 to look once.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Follow the chain through all lines that are kept; exit 1 if one was changed, removed, moved or cut off.
    Verify,
}

/// A line for the user, and the exit code.
type Outcome = Result<(), (String, u8)>;

/// Runs a command, or the vault.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    let arguments = match launched(arguments) {
        Ok(arguments) => arguments,
        Err((line, code)) => return end(&line, code),
    };
    keep_to_itself();
    match perform(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err((line, code)) => end(&line, code),
    }
}

fn end(line: &str, code: u8) -> ExitCode {
    if !line.is_empty() {
        let _ = writeln!(io::stderr(), "{line}");
    }
    ExitCode::from(code)
}

/// Becomes another program if asked to. This comes before this process changes anything that the other program would
/// inherit, and needs no configuration, because there is none.
fn launched(arguments: Arguments) -> Result<Arguments, (String, u8)> {
    let Some(Command::Exec { mut dir, env_file, file, timeout, command }) = arguments.command else {
        return Ok(arguments);
    };
    if dir.is_empty() && env_file.is_empty() && file.is_empty() {
        dir.push(launcher::DEFAULT_FOLDER.into());
    }
    let limit = timeout.map(Duration::from_secs);
    Err(launcher::Launch { folders: dir, env_files: env_file, variables: file, limit, command }.run())
}

/// Keeps core dumps and debuggers of the same user away from what is in memory.
fn keep_to_itself() {
    // If the system refuses, the vault works all the same.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    let _ = nix::sys::prctl::set_dumpable(false);
}

fn perform(arguments: Arguments) -> Outcome {
    let env: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let named = arguments.config.or_else(|| env.get("CONFIG_FILE").filter(|f| !f.is_empty()).map(PathBuf::from));
    let source = Source { is_named: named.is_some(), file: named.unwrap_or_else(|| DEFAULT_FILE.into()), env };
    let command = arguments.command.unwrap_or(Command::Run { accept_rollback: false });
    match &command {
        Command::GenerateKey => return generate_key(),
        Command::SocketProxy { check } => return proxy(&source.env, *check),
        Command::Wait { workload, timeout } if workload.starts_with('/') => {
            return launcher::wait(Path::new(workload), Duration::from_secs(*timeout));
        }
        _ => {}
    }
    let config = source.load().map_err(|errors| (errors.to_string(), 64))?;
    let ask = |request| asked(client::ask(&config, request));
    match command {
        Command::GenerateKey | Command::SocketProxy { .. } | Command::Exec { .. } => Ok(()),
        Command::Wait { workload, timeout } => wait(&config, &workload, Duration::from_secs(timeout)),
        Command::Run { accept_rollback } => serve(source, config, accept_rollback),
        Command::Get { key, version } => {
            let data = ask(Request::Get { name: key, version })?;
            let text = data["value_base64"].as_str().unwrap_or_default();
            let bytes = Zeroizing::new(STANDARD.decode(text).unwrap_or_default());
            wipe(data);
            print(&bytes)
        }
        Command::Set { key, value, expires_in, if_version } => {
            let value = match value {
                Some(value) => {
                    let _ = writeln!(
                        io::stderr(),
                        "the value stood in the process list; better: printf %s VALUE | dockflare-vault set {key}"
                    );
                    Zeroizing::new(value.into_bytes())
                }
                None => value_from_input(&key)?,
            };
            let value_base64 = Zeroizing::new(STANDARD.encode(&*value));
            let data = ask(Request::Set { name: key, value_base64, expires_in, if_version })?;
            print(format!("version {}\n", data["version"]).as_bytes())
        }
        Command::Delete { key, revoke } => {
            let data = ask(Request::Delete { name: key, revoke })?;
            let word = if revoke { "revoked" } else { "deleted" };
            print(format!("{word}; the last version was {}\n", data["version"]).as_bytes())
        }
        Command::List { prefix } => {
            let data = ask(Request::List { prefix })?;
            let names: Vec<_> = data.as_array().into_iter().flatten().filter_map(Json::as_str).collect();
            print(names.iter().map(|name| format!("{name}\n")).collect::<String>().as_bytes())
        }
        Command::Rotate { master: None } => {
            let data = ask(Request::Rotate { master_key_file: None })?;
            print(
                format!(
                    "data key {} seals from now on; what older keys have sealed is sealed anew meanwhile, see status\n",
                    data["data_key"]
                )
                .as_bytes(),
            )
        }
        Command::Rotate { master: Some(file) } => {
            let file = file.or_else(|| config.next_master_key_file.clone());
            let file = file.ok_or_else(|| {
                let line = "no new master key: rotate --master FILE, or set encryption.next_master_key_file";
                (line.to_owned(), 64)
            })?;
            let file =
                file.canonicalize().map_err(|error| (format!("{} cannot be read: {error}", file.display()), 64))?;
            let data = ask(Request::Rotate { master_key_file: Some(file.clone()) })?;
            let (id, old) = (data["master_key"].as_str().unwrap_or_default(), config.master_key_file.display());
            print(format!("the store opens with the master key {id} only: put {} in the place of {old} before the next start\n", file.display()).as_bytes())
        }
        Command::Status => print_json(&ask(Request::Status)?),
        Command::History { key } => print_json(&ask(Request::History { name: key })?),
        Command::Audit { command: AuditCommand::Verify } => {
            let data = ask(Request::AuditVerify)?;
            let broken: Vec<_> = data["broken"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
            if broken.is_empty() {
                return print(
                    format!("{} lines in {} files, an unbroken chain\n", data["lines"], data["files"]).as_bytes(),
                );
            }
            Err((broken.join("\n"), 1))
        }
        Command::Check => {
            let (text, is_well) = check::check(&source, &config, check::Names::Shown);
            print(text.as_bytes())?;
            if is_well { Ok(()) } else { Err((String::new(), 1)) }
        }
        Command::Healthcheck => {
            let address = config.health.map(|(ip, port)| PageAddress((ip, port).into()));
            runtime()?.block_on(pages::check(address)).map_err(|line| (line, 1))
        }
        Command::SupportBundle => print_json(&bundle::bundle(&source, &config)),
    }
}

/// Waits for the files of a workload that is configured.
fn wait(config: &Config, workload: &str, limit: Duration) -> Outcome {
    match config.deliveries.iter().find(|delivery| delivery.workload.as_str() == workload) {
        Some(delivery) => launcher::wait(&delivery.directory, limit),
        None => {
            let names: Vec<_> = config.deliveries.iter().map(|delivery| delivery.workload.as_str()).collect();
            let there_are = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let line = format!("there is no workload {workload} in the configuration: there are {there_are}");
            Err((format!("{line}; a folder begins with a slash"), 64))
        }
    }
}

fn generate_key() -> Outcome {
    let key = Key::random().map_err(|error| (error.to_string(), 74))?;
    keyfile::close_output().map_err(|error| (format!("the key's file cannot be closed to others: {error}"), 74))?;
    let text = key.to_text();
    print(Zeroizing::new(format!("{}\n", *text)).as_bytes())
}

fn serve(source: Source, config: Config, accept_rollback: bool) -> Outcome {
    let log = settings::log(&source.env).map_err(|problems| (problems.join("\n"), 64))?;
    let failed = |error: &dyn std::fmt::Display| (format!("the vault cannot begin: {error}"), 70);
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        logging::start(&log).map_err(|error| failed(&error))?;
        logging::end_on_panic("this is a mistake in the vault, please report it".to_owned(), 70);
        let shutdown = signals::shutdown_on_signals().map_err(|error| failed(&error))?;
        run(source, config, accept_rollback, shutdown).await.map_err(|error| {
            tracing::error!("{error}");
            (String::new(), error.exit_code())
        })
    });
    runtime.shutdown_background();
    logging::flush();
    code
}

/// Runs the socket proxy, or checks whether it works.
fn proxy(env: &BTreeMap<String, String>, is_check: bool) -> Outcome {
    let settings = ProxyConfig::read(env).map_err(|problems| (problems.join("\n"), 64));
    if is_check {
        let asked = runtime()?.block_on(dockflare_engine::proxy::listen::check(&settings?.listen));
        return asked.map_err(|line| (line, 1)).and_then(|line| print(format!("{line}\n").as_bytes()));
    }
    let log = settings::log(env).map_err(|problems| (problems.join("\n"), 64))?;
    let config = settings?;
    let failed = |error: &dyn std::fmt::Display| (format!("the socket proxy cannot begin: {error}"), 70);
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        logging::start(&log).map_err(|error| failed(&error))?;
        logging::end_on_panic("this is a mistake in the vault, please report it".to_owned(), 70);
        let shutdown = signals::shutdown_on_signals().map_err(|error| failed(&error))?;
        socket_proxy::run(config, shutdown).await.map_err(|error| {
            tracing::error!("{error}");
            (String::new(), error.exit_code())
        })
    });
    runtime.shutdown_background();
    logging::flush();
    code
}

fn runtime() -> Result<tokio::runtime::Runtime, (String, u8)> {
    // A file system that hangs may hold a thousand directories. Each costs a thread and stops nothing else.
    let built = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4096).build();
    built.map_err(|error| (format!("the system gives no runtime: {error}"), 70))
}

fn asked(answer: Answer) -> Result<Json, (String, u8)> {
    if answer.status == "success" {
        return Ok(answer.data);
    }
    Err((answer.message.unwrap_or_else(|| "no answer".to_owned()), answer.exit.unwrap_or(70)))
}

fn print(bytes: &[u8]) -> Outcome {
    let mut output = io::stdout().lock();
    output.write_all(bytes).and_then(|()| output.flush()).map_err(|error| (format!("cannot be printed: {error}"), 74))
}

fn print_json(data: &Json) -> Outcome {
    print(format!("{data:#}\n").as_bytes())
}

/// Reads the value byte for byte from a pipe or file, or prompts for it without showing it.
fn value_from_input(key: &str) -> Result<Zeroizing<Vec<u8>>, (String, u8)> {
    let failed = |error: io::Error| (format!("the value cannot be read: {error}"), 74);
    let mut input = io::stdin().lock();
    // Reserve all the room it may need: a buffer that grows leaves copies behind.
    let mut value = Zeroizing::new(Vec::with_capacity(MAX_VALUE_BYTES + 64));
    if io::stdin().is_terminal() {
        let _ = write!(io::stderr(), "value of {key}: ");
        let _silence = Silence::begin().map_err(|error| failed(error.into()))?;
        io::BufRead::read_until(&mut input, b'\n', &mut value).map_err(failed)?;
        let _ = writeln!(io::stderr());
        while value.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            value.pop();
        }
        return Ok(value);
    }
    input.take(MAX_VALUE_BYTES as u64 + 1).read_to_end(&mut value).map_err(failed)?;
    if value.len() > MAX_VALUE_BYTES {
        return Err((format!("the value has more than {MAX_VALUE_BYTES} bytes: larger things are files"), 64));
    }
    if value.ends_with(b"\n") {
        let _ =
            writeln!(io::stderr(), "the value ends with a line break, which belongs to it; printf %s leaves it out");
    }
    Ok(value)
}

/// Keeps the terminal from showing what is typed, until it is dropped.
struct Silence(nix::sys::termios::Termios);

impl Silence {
    fn begin() -> nix::Result<Self> {
        use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(io::stdin(), SetArg::TCSAFLUSH, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let _ = nix::sys::termios::tcsetattr(io::stdin(), nix::sys::termios::SetArg::TCSAFLUSH, &self.0);
    }
}
