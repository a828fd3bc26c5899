//! Fills real disks: a tmpfs of a few megabytes each for store, audit and counter, in the test's own mount namespace.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use crate::scene::{SOON, Scene};

/// A shell in the namespace. Its mounts disappear with it.
struct Room {
    shell: Child,
    input: ChildStdin,
    output: Receiver<String>,
}

impl Room {
    /// Enters a namespace. `None` where the system allows none.
    fn enter() -> Option<Self> {
        let arguments: &[&str] = if nix::unistd::geteuid().is_root() { &["-m"] } else { &["-rm"] };
        let mut shell = Command::new("unshare")
            .args(arguments)
            .args([
                "sh",
                "-c",
                "exec 2>&1; while read -r line; do eval \"$line\"; code=$?; echo; echo \"done $code\"; done",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let (mut input, output) = (shell.stdin.take()?, lines(shell.stdout.take()?));
        writeln!(input, ":").ok()?;
        let is_there = output.iter().find(|line| !line.is_empty()).is_some_and(|line| line == "done 0");
        is_there.then_some(Self { shell, input, output })
    }

    /// Runs a command. Returns its output and its exit code.
    fn run(&mut self, command: &str) -> (String, i32) {
        writeln!(self.input, "{command}").unwrap();
        let mut text = String::new();
        loop {
            let line = self.output.recv_timeout(SOON).unwrap_or_else(|_| panic!("{command} does not end: {text}"));
            match line.strip_prefix("done ").and_then(|code| code.parse().ok()) {
                Some(code) => return (text.trim().to_owned(), code),
                None => text = text + &line + "\n",
            }
        }
    }

    fn ok(&mut self, command: &str) -> String {
        let (text, code) = self.run(command);
        assert_eq!(code, 0, "{command}: {text}");
        text
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = writeln!(self.input, "kill $vault; wait $vault; exit");
        let _ = self.shell.wait();
    }
}

fn lines(output: ChildStdout) -> Receiver<String> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = send.send(line);
        }
    });
    lines
}

/// Fills the disk of the store, of the audit, or of the counter while the vault runs, then makes room again.
#[test]
fn a_full_disk_is_said_loses_nothing_and_with_room_again_the_same_vault_serves() {
    let Some(mut room) = Room::enter() else {
        return testkit::skipped("unshare gives no mount namespace here");
    };
    let scene = Scene::new();
    let at = |name: &str| scene.path(name).display().to_string();
    std::fs::create_dir(scene.path("audit")).unwrap();
    std::fs::write(
        scene.path("config.yaml"),
        format!(
            "storage: {{file: {data}/vault.redb, change_counter: {other}/change}}\nencryption: {{master_key: {key}}}\n\
             audit: {{file: {audit}/audit.log}}\nadmin: {{socket: {run}/admin.sock}}\nhealth: {{port: 0}}\n",
            data = at("data"),
            other = at("other"),
            key = at("master.key"),
            audit = at("audit"),
            run = at("run"),
        ),
    )
    .unwrap();
    for folder in ["data", "audit", "other"] {
        room.ok(&format!("mount -t tmpfs -o size=4m,mode=0700 tmpfs {}", at(folder)));
    }
    let vault = format!("{} --config {}", env!("CARGO_BIN_EXE_dockflare-vault"), at("config.yaml"));
    room.ok(&format!("{vault} run > {} & vault=$!", at("log")));
    room.ok(&format!("until grep -q 'dockflare-vault started' {}; do kill -0 $vault || break; done", at("log")));
    let big = "x".repeat(60_000);
    for disk in ["data", "audit", "other"] {
        scene.ok(&["set", "kept"], disk.as_bytes());
        let ballast = format!("{}/ballast", at(disk));
        room.run(&format!("dd if=/dev/zero of={ballast} bs=4k 2> /dev/null"));
        // The file that is open may have a page with room left.
        let (mut refused, mut stored) = (None, vec![]);
        for number in 0..200 {
            let output = scene.run(&["set", &format!("{disk}/{number}")], big.as_bytes());
            match output.status.code() {
                Some(0) => stored.push(number),
                code => {
                    refused = Some((code, String::from_utf8(output.stderr).unwrap()));
                    break;
                }
            }
            if disk == "other" {
                break;
            }
        }
        match (disk, refused) {
            // The counter falls behind: the vault logs it and goes on.
            ("other", None) => {
                let log = std::fs::read_to_string(at("log")).unwrap();
                assert!(log.contains("the counter of changes") && log.contains("cannot be written"), "{log}");
            }
            ("data" | "audit", Some((code, said))) => {
                assert_eq!(code, Some(74), "{said}");
                let what = if disk == "data" { "the store" } else { "the audit" };
                assert!(said.contains(what) && said.contains("make room; nothing was lost"), "{said}");
            }
            other => panic!("{other:?}"),
        }
        if disk == "audit" {
            let said = scene.fails(&["get", "kept"], b"", 74);
            assert!(said.contains("nothing is answered until it can be"), "{said}");
        }
        if disk == "data" {
            assert_eq!(scene.ok(&["get", "kept"], b""), disk.as_bytes(), "a full store can be read");
        }
        room.ok(&format!("rm {ballast}"));
        assert_eq!(scene.ok(&["get", "kept"], b""), disk.as_bytes());
        for number in stored {
            assert_eq!(scene.ok(&["get", &format!("{disk}/{number}")], b""), big.as_bytes());
            scene.ok(&["delete", &format!("{disk}/{number}")], b"");
        }
        assert!(scene.ok(&["set", "kept"], b"again").starts_with(b"version "));
        assert!(scene.ok(&["audit", "verify"], b"").ends_with(b"an unbroken chain\n"));
    }
    // Start on a full disk: the vault inspects its files without a write.
    room.ok("kill $vault; wait $vault");
    room.run(&format!("dd if=/dev/zero of={}/ballast bs=4k 2> /dev/null", at("data")));
    let (said, code) = room.run(&format!("{vault} get kept"));
    assert!(code == 0 && said == "again" || code == 74 && said.contains("make room; nothing was lost"), "{said}");
    room.ok(&format!("rm {}/ballast", at("data")));
    let (said, code) = room.run(&format!("{vault} get kept"));
    assert_eq!((said.as_str(), code), ("again", 0));
    assert!(room.ok(&format!("{vault} audit verify")).contains("an unbroken chain"));
}
