//! SIGKILL at random moments.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dockflare_vault::seal::Key;

use crate::scene::{SOON, Scene};

/// Pseudorandom numbers from a seed that a failure reports.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn key_id(path: &Path) -> String {
    Key::read(&fs::read(path).unwrap()).unwrap().id()
}

fn write_key(scene: &Scene, path: &Path) {
    fs::write(path, scene.ok(&["generate-key"], b"")).unwrap();
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

/// Kills the server after `changes` changes of the audit and a little later: just before, within or just after the
/// transaction that the newest line is about.
fn kill_after(pid: i32, audit: &Path, changes: u64, later: u64, is_over: &AtomicBool) {
    let look = || fs::metadata(audit).ok().map(|meta| (meta.len(), meta.modified().unwrap()));
    let (mut seen, mut left, until) = (look(), changes, Instant::now() + SOON);
    while left > 0 && Instant::now() < until {
        let now = look();
        left -= u64::from(std::mem::replace(&mut seen, now) != now);
        std::thread::yield_now();
    }
    for _ in 0..later {
        let _ = look();
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    is_over.store(true, Ordering::SeqCst);
}

/// Runs sets, deletions and rotations of both kinds, with an audit that starts a new file every twenty lines, and kills
/// the vault at random moments. Every acknowledged change must be there, under exactly one master key, and the audit's
/// chain must hold. `VAULT_KILLS` sets the number of rounds.
#[test]
#[allow(clippy::disallowed_macros, reason = "a test says what it did")]
fn killed_at_random_what_was_acknowledged_is_there_and_the_chain_holds() {
    let rounds = testkit::number("VAULT_KILLS", 40);
    let seed = RandomState::new().hash_one(0);
    let mut dice = Dice(seed);
    let scene = Scene::new();
    let (master, next) = (scene.path("master.key"), scene.path("next.key"));
    scene.configure_with("max_bytes: 4096, keep: 2", &format!("next_master_key_file: {}", next.display()), "");
    write_key(&scene, &next);
    // The last acknowledged value, and those under way since; 0 means none.
    let mut said: BTreeMap<String, (u64, Vec<u64>)> = BTreeMap::new();
    let (mut counter, mut masters, mut rotated) = (0, 0, 0);
    for round in 0..rounds {
        let at = format!("round {round} of seed {seed}");
        let server = scene.start();
        let status: serde_json::Value = serde_json::from_slice(&scene.ok(&["status"], b"")).unwrap();
        let id = status["master_key"].as_str().unwrap().to_owned();
        if id == key_id(&next) {
            // Do what the operator is told to do.
            fs::rename(&next, &master).unwrap();
            write_key(&scene, &next);
            masters += 1;
        }
        assert_eq!(id, key_id(&master), "{at}");
        for (name, (known, tried)) in &mut said {
            let output = scene.run(&["get", name], b"");
            let found = match output.status.code() {
                Some(0) => String::from_utf8(output.stdout).unwrap().parse().unwrap(),
                code => {
                    assert_eq!(code, Some(1), "{at}: {}", String::from_utf8_lossy(&output.stderr));
                    0
                }
            };
            assert!(found == *known || tried.contains(&found), "{at}: {name} is {found}, not {known} or {tried:?}");
            (*known, *tried) = (found, vec![]);
        }
        assert!(scene.ok(&["audit", "verify"], b"").ends_with(b"an unbroken chain\n"), "{at}");
        let (changes, later) = (1 + dice.below(12), dice.below(3000));
        let (is_over, pid, audit) = (AtomicBool::new(false), server.pid() as i32, scene.path("data/audit.log"));
        std::thread::scope(|threads| {
            threads.spawn(|| kill_after(pid, &audit, changes, later, &is_over));
            // Without a server, the command opens the store itself, which tests the same thing.
            while !is_over.load(Ordering::SeqCst) {
                counter += 1;
                let (name, input) = (format!("s/{}", dice.below(7)), counter.to_string());
                let (arguments, value) = match dice.below(10) {
                    0 => (vec!["rotate"], None::<u64>),
                    1 => (vec!["rotate", "--master"], None),
                    2 => (vec!["delete", name.as_str()], Some(0)),
                    _ => (vec!["set", name.as_str()], Some(counter)),
                };
                let output = scene.run(&arguments, input.as_bytes());
                let (is_said, is_missing) = (output.status.success(), output.status.code() == Some(1));
                rotated += u64::from(is_said && arguments[0] == "rotate");
                let Some(value) = value.filter(|_| !is_missing) else { continue };
                let entry = said.entry(name).or_default();
                match is_said {
                    true => *entry = (value, vec![]),
                    false => entry.1.push(value),
                }
            }
        });
        server.kill();
    }
    let files = fs::read_dir(scene.path("data")).unwrap();
    let audits = files.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("audit")).count();
    println!(
        "{rounds} kills, {counter} commands, {rotated} rotations, {masters} new master keys, {audits} files of audit"
    );
    assert!(audits > 1 && masters > 0 && rotated > 0, "{audits} {masters} {rotated}");
}
