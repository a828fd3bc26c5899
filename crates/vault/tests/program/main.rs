#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests block as they like")]
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]
//! Tests the program as operators run it: the real binary, its socket, its files, its exit codes, SIGKILL and full
//! disks.
//!
//! What `swarm-vaultctl`, the earlier vault, tests of itself, and where this project tests it:
//!
//! | there | here |
//! |---|---|
//! | encryption: there and back, any bytes, another key, a changed text, the key's file | the tests in `seal`, `keyfile` and `store::sealed`, and `from_a_new_key_to_a_value_that_is_read_byte_for_byte` |
//! | rotation of the key | `store::sealed`, `rotations_of_both_kinds_and_restarts_lose_nothing` |
//! | store: set, get, replace, delete, list, missing entries, after a restart | `store::sealed`, `every_operation_with_and_without_what_it_is_about` |
//! | operations: each one, an unknown one, one without its key or value | `every_operation_with_and_without_what_it_is_about`, `bad_input_is_named_and_nothing_is_lost` |
//! | handler and access rows: allowed, denied, unknown subject, none at all | `grant` with its model, `vault`, `config` |
//! | command line: each command, its output and its code | `every_operation_with_and_without_what_it_is_about`, `bad_input_is_named_and_nothing_is_lost` |
//! | end to end, over a restart | `rotations_of_both_kinds_and_restarts_lose_nothing`, `tests/engine.rs` in the image |

use std::fs;
use std::time::Instant;

mod full_disk;
mod kills;
mod planted;
mod scene;

use scene::{SOON, Scene};

#[test]
fn from_a_new_key_to_a_value_that_is_read_byte_for_byte() {
    let scene = Scene::new();
    let value: Vec<u8> = (0..=255).chain(*b"\n").collect();
    // Without a server, with one, and without one again: the same store and the same answers.
    assert_eq!(scene.ok(&["set", "app/db"], &value), b"version 1\n");
    let server = scene.start();
    assert_eq!(scene.ok(&["get", "app/db"], b""), value);
    assert_eq!(scene.ok(&["set", "app/db", "second", "--if-version", "1"], b""), b"version 2\n");
    assert!(
        scene.fails(&["set", "app/db", "third", "--if-version", "1"], b"", 1).contains("is at version 2, not at 1")
    );
    assert_eq!(scene.ok(&["get", "app/db", "--version", "1"], b""), value);
    assert_eq!(scene.ok(&["set", "other", "x", "--expires-in", "0"], b""), b"version 1\n");
    assert!(scene.fails(&["get", "other"], b"", 1).contains("other is not there"));
    assert_eq!(scene.ok(&["list"], b""), b"app/db\n");
    assert!(String::from_utf8(scene.ok(&["history", "app/db"], b"")).unwrap().contains("\"version\": 2"));
    assert_eq!(server.stop().0, Some(0));
    assert_eq!(scene.ok(&["get", "app/db"], b""), b"second");
    scene.ok(&["delete", "app/db"], b"");
    assert!(scene.fails(&["get", "app/db"], b"", 1).contains("is not there"));
    assert!(scene.ok(&["audit", "verify"], b"").ends_with(b"an unbroken chain\n"));
    scene.ok(&["check"], b"");
}

#[test]
fn rotations_of_both_kinds_and_restarts_lose_nothing() {
    let scene = Scene::new();
    let server = scene.start();
    for number in 0..20 {
        scene.ok(&["set", &format!("s/{number}")], number.to_string().as_bytes());
    }
    scene.ok(&["rotate"], b"");
    server.wait_for("the old one is gone");
    let new = scene.run(&["generate-key"], b"").stdout;
    fs::write(scene.path("new.key"), &new).unwrap();
    fs::set_permissions(scene.path("new.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let said = scene.ok(&["rotate", "--master", scene.path("new.key").to_str().unwrap()], b"");
    assert!(String::from_utf8(said).unwrap().contains("before the next start"));
    assert!(!scene.run(&["check"], b"").status.success(), "the key file does not open the store any more");
    server.kill();
    let said = scene.fails(&["get", "s/7"], b"", 64);
    assert!(said.contains("does not open the store") && said.contains("nothing was changed"), "{said}");
    scene.write_key(&new);
    let server = scene.start();
    for number in 0..20 {
        assert_eq!(scene.ok(&["get", &format!("s/{number}")], b""), number.to_string().as_bytes());
    }
    assert_eq!(server.stop().0, Some(0));
}

#[test]
fn bad_input_is_named_and_nothing_is_lost() {
    let scene = Scene::new();
    scene.ok(&["set", "a"], b"x");
    for (arguments, text) in [
        (vec!["get", "../a"], "\"..\""),
        (vec!["get", "a//b"], "empty segment"),
        (vec!["frobnicate"], "unrecognized"),
        (vec!["set"], "required"),
    ] {
        assert!(scene.fails(&arguments, b"x", 64).contains(text), "{arguments:?}");
    }
    assert!(scene.fails(&["set", "big"], &vec![b'x'; (512 << 10) + 1], 64).contains("larger things are files"));
    assert_eq!(scene.ok(&["set", "big"], &vec![b'x'; 512 << 10]), b"version 1\n");

    let key = fs::read(scene.path("master.key")).unwrap();
    scene.write_key(b"too short");
    assert!(scene.fails(&["get", "a"], b"", 64).contains("it holds no key"));
    let other = scene.run(&["generate-key"], b"").stdout;
    scene.write_key(&other);
    assert!(scene.fails(&["get", "a"], b"", 64).contains("does not open the store"));
    assert!(scene.fails(&["run"], b"", 64).is_empty(), "the log has it");
    fs::remove_file(scene.path("master.key")).unwrap();
    assert!(scene.fails(&["get", "a"], b"", 64).contains("generate-key"));
    scene.write_key(&key);

    let sound = fs::read(scene.path("data/vault.redb")).unwrap();
    fs::write(scene.path("data/vault.redb"), &sound[..sound.len() / 2]).unwrap();
    assert!(scene.fails(&["get", "a"], b"", 74).contains("is damaged"));
    fs::write(scene.path("data/vault.redb"), &sound).unwrap();
    assert_eq!(scene.ok(&["get", "a"], b""), b"x");

    scene.configure("storge: {}\nacl:\n- subject: a..b\n  operations: [gte]\n");
    let said = scene.fails(&["run"], b"", 64);
    for problem in ["is storage meant?", "no NATS subject", "no operation"] {
        assert!(said.contains(problem), "{said}");
    }
}

#[test]
fn an_older_copy_of_the_store_is_taken_only_when_that_was_said() {
    let scene = Scene::new();
    scene.ok(&["set", "a"], b"old");
    let copy = fs::read(scene.path("data/vault.redb")).unwrap();
    scene.ok(&["set", "a"], b"new");
    fs::write(scene.path("data/vault.redb"), copy).unwrap();
    let said = scene.fails(&["get", "a"], b"", 74);
    assert!(said.contains("older than it was") && said.contains("--accept-rollback"), "{said}");
    let mut child = scene.command(&["run", "--accept-rollback"]).spawn().unwrap();
    let until = Instant::now() + SOON;
    while !scene.path("run/admin.sock").exists() {
        assert!(Instant::now() < until, "it does not start");
        std::thread::yield_now();
    }
    assert_eq!(scene.ok(&["get", "a"], b""), b"old");
    child.kill().unwrap();
    child.wait().unwrap();
    scene.ok(&["set", "a"], b"newer");
    assert_eq!(scene.ok(&["get", "a"], b""), b"newer");
}

#[test]
fn a_second_vault_on_one_store_ends_with_73_and_names_the_first() {
    let scene = Scene::new();
    let server = scene.start();
    let second = scene.start_with(&[("DOCKFLARE_VAULT_ADMIN_SOCKET", scene.path("run/second.sock").to_str().unwrap())]);
    second.wait_for(&format!("is in use by pid {}", server.pid()));
    let mut second = second;
    assert_eq!(second.child.wait().unwrap().code(), Some(73));
    scene.ok(&["status"], b"");
}

#[test]
fn another_table_of_grants_is_taken_whole_or_not_at_all() {
    let scene = Scene::new();
    let server = scene.start();
    scene.configure("acl:\n- subject: user.requests\n  operations: [get]\n");
    server.signal(nix::sys::signal::Signal::SIGHUP);
    server.wait_for("took the new table of grants grants=2");
    scene.configure("acl:\n- subject: user.requests\n  operations: [get, frob]\n");
    server.wait_for("\"frob\" is no operation");
    // A setting that needs a restart holds back the rest of the file.
    scene.configure_with(
        "keep: 7",
        "",
        "acl:\n- subject: other.requests\n  operations: [get]\n- subject: x\n  operations: [get]\n",
    );
    server.wait_for("audit count from a start, so restart the vault for it");
    scene.configure("acl:\n- subject: user.requests\n  operations: [get, set]\n");
    server.wait_for("took the new table of grants grants=2");
    assert_eq!(server.stop().0, Some(0));
}

#[test]
fn a_next_master_key_that_lies_ready_is_taken_by_name_and_by_the_next_start() {
    let scene = Scene::new();
    assert!(scene.fails(&["rotate", "--master"], b"", 64).contains("encryption.next_master_key_file"));
    let next = scene.path("next.key");
    scene.configure_with("", &format!("next_master_key_file: {}", next.display()), "");
    let server = scene.start();
    scene.ok(&["set", "a"], b"x");
    assert!(scene.fails(&["rotate", "--master"], b"", 64).contains("No such file") || !next.exists());
    fs::write(&next, scene.ok(&["generate-key"], b"")).unwrap();
    fs::set_permissions(&next, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    assert!(scene.fails(&["rotate", "--master"], b"", 64).contains("may be changed by others (mode 0666)"));
    fs::set_permissions(&next, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    scene.ok(&["rotate", "--master"], b"");
    server.kill();
    // Nobody has replaced the old key with the new one yet.
    let server = scene.start_with(&[]);
    server.wait_for("of encryption.next_master_key_file: put");
    server.wait_for("dockflare-vault started");
    assert_eq!(scene.ok(&["get", "a"], b""), b"x");
    assert!(String::from_utf8(scene.ok(&["check"], b"")).unwrap().contains("put it in the place of"));
    assert_eq!(server.stop().0, Some(0));
    fs::rename(&next, scene.path("master.key")).unwrap();
    assert_eq!(scene.ok(&["get", "a"], b""), b"x");
}

#[test]
fn links_in_the_place_of_store_audit_lock_and_counter_are_refused_with_the_remedy() {
    for (file, code) in
        [("data/vault.redb", 74), ("data/vault.redb.lock", 74), ("data/audit.log", 74), ("other/change", 74)]
    {
        let scene = Scene::new();
        scene.ok(&["set", "a"], b"x");
        let (path, target) = (scene.path(file), scene.path("target"));
        fs::rename(&path, &target).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        let said = scene.fails(&["get", "a"], b"", code);
        assert!(said.contains("symbolic link") && said.contains("name the file itself"), "{file}: {said}");
        fs::rename(&target, &path).unwrap();
        assert_eq!(scene.ok(&["get", "a"], b""), b"x");
    }
}

#[test]
fn a_level_that_is_none_ends_with_64_and_the_nearest_one() {
    let scene = Scene::new();
    let output = scene.command(&["run"]).env("LOG_LEVEL", "inof").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("do you mean INFO?") && said.contains("dockflare_vault"), "{said}");
}

/// What a script does: `docker run -d`, and the first command right after it.
#[test]
fn a_command_right_behind_the_start_waits_for_the_vault_and_keeps_it_from_nothing() {
    let scene = Scene::new();
    for number in 1..20 {
        let server = scene.start_with(&[]);
        // Odd rounds send the command at once; even rounds once the lock is taken and the socket may not be there yet.
        let lock = scene.path("data/vault.redb.lock");
        let until = Instant::now() + SOON;
        while number % 2 == 0
            && !fs::read_to_string(&lock).unwrap_or_default().contains(&format!("pid {} ", server.pid()))
        {
            assert!(Instant::now() < until, "it does not start");
        }
        assert_eq!(scene.ok(&["set", "a"], b"x"), format!("version {number}\n").as_bytes());
        server.wait_for("dockflare-vault started");
        assert_eq!(server.stop().0, Some(0));
    }
}

#[test]
fn a_check_tries_docker_where_containers_are_named_and_the_launcher_where_it_has_a_folder() {
    let scene = Scene::new();
    let dir = scene.dir.path().display();
    let settings = format!(
        "docker: {{host: 'unix://{dir}/none.sock'}}\nlauncher: {{folder: {dir}/launcher}}\n\
         deliveries:\n- {{workload: app, directory: {dir}/app, containers: [shop], files: [{{name: a, secret: a}}]}}\n"
    );
    scene.configure(&settings);
    let check = || String::from_utf8(scene.run(&["check"], b"").stdout).unwrap();
    let first = check();
    assert!(first.contains(&format!("✗ docker.host unix://{dir}/none.sock: Docker cannot be reached")), "{first}");
    assert!(first.contains(&format!("✗ launcher.folder {dir}/launcher cannot be written")), "{first}");
    fs::create_dir(scene.path("launcher")).unwrap();
    assert!(check().contains("· launcher.folder"), "{}", check());
    let server = scene.start();
    assert!(check().contains("✓ launcher.folder"), "{}", check());
    fs::write(scene.path("launcher/dockflare-vault.new"), "another").unwrap();
    fs::rename(scene.path("launcher/dockflare-vault.new"), scene.path("launcher/dockflare-vault")).unwrap();
    assert!(check().contains("✗ launcher.folder"), "{}", check());
    assert_eq!(server.stop().0, Some(0));
    // Without containers in the configuration, nobody asks Docker.
    scene.configure("");
    assert!(!check().contains("docker"), "{}", check());
}

/// Includes a deliberate difference from `swarm-vaultctl`: a missing secret is an error, not an empty answer.
#[test]
fn every_operation_with_and_without_what_it_is_about() {
    let scene = Scene::new();
    let server = scene.start();
    for arguments in [vec!["get", "none"], vec!["delete", "none"], vec!["history", "none"]] {
        assert_eq!(scene.fails(&arguments, b"", 1), "none is not there\n", "{arguments:?}");
    }
    assert_eq!(scene.ok(&["list"], b""), b"");
    assert_eq!(scene.ok(&["set", "empty"], b""), b"version 1\n");
    assert_eq!(scene.ok(&["get", "empty"], b""), b"");
    assert_eq!(scene.ok(&["set", "empty"], "grüße\n".as_bytes()), b"version 2\n");
    assert_eq!(scene.ok(&["get", "empty"], b""), "grüße\n".as_bytes());
    scene.ok(&["set", "app/b"], b"x");
    scene.ok(&["set", "app/a"], b"x");
    scene.ok(&["set", "apple"], b"x");
    assert_eq!(scene.ok(&["list"], b""), b"app/a\napp/b\napple\nempty\n");
    assert_eq!(scene.ok(&["list", "app"], b""), b"app/a\napp/b\n");
    assert_eq!(scene.ok(&["delete", "empty"], b""), b"deleted; the last version was 2\n");
    assert_eq!(scene.fails(&["delete", "empty"], b"", 1), "empty is not there\n");
    assert!(String::from_utf8(scene.ok(&["history", "empty"], b"")).unwrap().contains("\"deleted\": 1"));
    let status: serde_json::Value = serde_json::from_slice(&scene.ok(&["status"], b"")).unwrap();
    assert_eq!((status["secrets"].as_u64(), status["versions"].as_u64()), (Some(3), Some(3)));
    for arguments in [vec!["get"], vec!["delete"], vec!["history"], vec!["audit"], vec!["get", "a", "--version", "x"]] {
        scene.fails(&arguments, b"", 64);
    }
    assert_eq!(server.stop().0, Some(0));
    assert!(scene.fails(&["healthcheck"], b"", 1).contains("health.port is 0"));
}
