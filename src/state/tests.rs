use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use base64::Engine as _;

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

/// The names of the folder's files, sorted.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn token(json: serde_json::Value) -> Token {
    Token::new(base64::engine::general_purpose::STANDARD.encode(json.to_string()))
}

#[tokio::test]
async fn documents_come_back_as_they_were_written_and_only_the_owner_can_read_them() {
    let (dir, store) = store();
    let id = AgentId::try_from("0f9c".to_owned()).unwrap();
    let state = TunnelState {
        token: Some(Token::new("secret")),
        id: Some(TunnelId("t".into())),
        name: Some("edge".into()),
        desired_state: DesiredState::Running,
        redeploys: 3,
        ..TunnelState::default()
    };
    store.save_agent_id(&id).await.unwrap();
    store.save_tunnel(&state).await.unwrap();
    assert_eq!(store.agent_id().unwrap().document, Some(id));
    assert_eq!(store.tunnel().unwrap().document, Some(state));
    assert_eq!(fs::read_to_string(dir.path().join(AGENT_ID)).unwrap(), "0f9c", "the id and nothing else");
    for name in [AGENT_ID, TUNNEL] {
        let mode = fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    assert_eq!(names(dir.path()), [LOCK, AGENT_ID, TUNNEL], "nothing else is left in the folder");
}

#[tokio::test]
async fn a_file_that_was_readable_to_all_is_narrowed_when_it_is_replaced() {
    let (dir, store) = store();
    let path = dir.path().join(TUNNEL);
    fs::write(&path, "{}").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    store.save_tunnel(&TunnelState::default()).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn files_of_the_python_agent_are_understood() {
    let (dir, store) = store();
    fs::write(dir.path().join(AGENT_ID), "agent-12ab\n").unwrap();
    fs::write(
        dir.path().join(TUNNEL),
        r#"{"token": null, "id": null, "name": "edge", "desired_state": "unknown", "version": "x"}"#,
    )
    .unwrap();
    assert_eq!(store.agent_id().unwrap().document.unwrap().as_str(), "agent-12ab");
    let state = store.tunnel().unwrap().document.unwrap();
    assert_eq!((state.token.as_ref(), state.desired_state), (None, DesiredState::Unknown));
    assert_eq!(serde_json::to_value(&state).unwrap()["version"], "x", "keys of others are kept");
}

#[test]
fn what_the_python_agent_reads_is_written_under_its_names() {
    let state = TunnelState { token: Some(Token::new("tok")), ..TunnelState::default() };
    let text = serde_json::to_value(&state).unwrap();
    assert_eq!(text["token"], "tok");
    assert_eq!(text["id"], json!(null));
    assert_eq!(text["name"], json!(null));
    assert_eq!(text["desired_state"], "unknown");
}

#[test]
fn what_cannot_be_parsed_is_set_aside_and_said() {
    for (name, text) in [
        (TUNNEL, "".as_bytes()),
        (TUNNEL, b"\0\0\0\0"),
        (TUNNEL, br#"{"token": "s3cret", "desired_st"#),
        (TUNNEL, br#"{"desired_state": "s3cret"}"#),
        (TUNNEL, br#"["s3cret"]"#),
        (AGENT_ID, b""),
        (AGENT_ID, b"\xff\xfe"),
        (AGENT_ID, b"../../s3cret"),
        (TOMBSTONE, br#"{"schema_version": 2}"#),
    ] {
        let (dir, store) = store();
        fs::write(dir.path().join(name), text).unwrap();
        let set_aside = match name {
            TUNNEL => store.tunnel().unwrap().set_aside,
            AGENT_ID => store.agent_id().unwrap().set_aside,
            _ => store.tombstone().unwrap().set_aside,
        };
        let set_aside = set_aside.unwrap_or_else(|| panic!("{name} {text:?} was taken"));
        assert!(!dir.path().join(name).exists());
        assert_eq!(fs::read(&set_aside.to).unwrap(), text, "nothing is lost");
        assert!(!set_aside.problem.contains("s3cret"), "{}", set_aside.problem);
    }
}

#[test]
fn setting_aside_twice_keeps_both() {
    let (dir, store) = store();
    for text in ["one", "two", "three"] {
        fs::write(dir.path().join(TUNNEL), text).unwrap();
        assert!(store.tunnel().unwrap().set_aside.is_some());
    }
    let set_aside = names(dir.path()).into_iter().filter(|name| name.contains("unreadable")).count();
    assert_eq!(set_aside, 3);
}

#[test]
fn a_truncated_state_file_is_never_taken_for_another_state() {
    let state = TunnelState {
        token: Some(Token::new("s3cret")),
        name: Some("edge".into()),
        desired_state: DesiredState::Running,
        ..TunnelState::default()
    };
    let whole = serde_json::to_vec_pretty(&state).unwrap();
    for length in 0..whole.len() {
        let (dir, store) = store();
        fs::write(dir.path().join(TUNNEL), &whole[..length]).unwrap();
        assert!(store.tunnel().unwrap().set_aside.is_some(), "cut at {length}");
    }
}

#[test]
fn a_token_tells_its_tunnel_and_hides_itself() {
    let token = token(json!({"a": "acc", "t": "tun", "s": "s3cret"}));
    let claims = token.claims().unwrap();
    assert_eq!((claims.account.as_str(), claims.tunnel), ("acc", TunnelId("tun".into())));
    assert!(!format!("{token:?}").contains(token.expose()));
    let state = TunnelState { token: Some(token.clone()), ..TunnelState::default() };
    assert!(!format!("{state:?}").contains(token.expose()));
}

#[test]
fn tokens_that_cloudflared_would_refuse_have_no_claims() {
    assert!(Token::new("%%%").claims().is_err());
    assert!(Token::new("").claims().is_err());
    let marked = Token::new(format!("\u{feff}{}", super::testing::token("t1"))).claims().unwrap_err();
    assert!(marked.contains("byte order mark"), "{marked}");
    for bad in [
        json!({"a": "x", "t": "y"}),
        json!({"a": "x", "t": 1, "s": "z"}),
        json!(["x"]),
        json!({"a":"","t":"y","s":"z"}),
    ] {
        assert!(token(bad.clone()).claims().is_err(), "{bad} was taken");
    }
}

#[test]
fn what_a_crash_in_the_middle_of_a_write_left_is_ignored_and_removed_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let leftovers = [
        ".tunnel_state.json.a1B2c3",
        ".agent_id.txt.ZZZZZZ",
        ".decommission.json.000000",
        ".reported.json.abc123",
        "..writable.xyzXYZ",
    ];
    let of_others = [
        ".tunnel_state.json.a1B2c",
        ".tunnel_state.json.a1B2c3d",
        ".tunnel_state.json.a1-2c3",
        ".tunnel_state.json",
        "tunnel_state.json.a1B2c3",
        ".notes.json.a1B2c3",
        "tunnel_state.json.unreadable-20260101T000000Z",
        ".env",
    ];
    for name in leftovers.iter().chain(&of_others) {
        fs::write(dir.path().join(name), r#"{"desired_state": "running"}"#).unwrap();
    }
    fs::create_dir(dir.path().join(".tunnel_state.json.folder")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(store.tunnel().unwrap().document.is_none(), "a leftover is no document");
    let mut expected = of_others.map(str::to_owned).to_vec();
    expected.extend([".tunnel_state.json.folder".to_owned(), LOCK.to_owned()]);
    expected.sort();
    assert_eq!(names(dir.path()), expected);
}

#[test]
fn a_second_store_on_one_folder_is_refused_and_told_by_whom() {
    let (dir, store) = store();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains(&format!("pid {} on host", std::process::id())) && error.contains("stop that one"),
        "{error}"
    );
    drop(store);
    Store::open(dir.path()).unwrap();
}

#[test]
fn an_unusable_folder_names_the_owner_and_what_helps() {
    // A file is in the folder's place: an error for every user, root included.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    fs::write(&path, "").unwrap();
    let error = Store::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("a file is in the way") && error.contains("belongs to uid") && !error.contains("chown"),
        "{error}"
    );
}

#[test]
fn the_remedy_fits_what_is_wrong_with_the_folder() {
    let said = |kind| remedy(&io::Error::from(kind), 65532, Path::new("/app/data"));
    assert!(said(io::ErrorKind::PermissionDenied).contains("chown -R 65532 /app/data"));
    assert!(said(io::ErrorKind::ReadOnlyFilesystem).contains("mount"));
    assert!(said(io::ErrorKind::StorageFull).contains("make room"));
    for (errno, words) in [
        (5, "the disk reports errors"),
        (23, "--ulimit nofile"),
        (24, "--ulimit nofile"),
        (107, "mount it again"),
        (116, "mount it again"),
        (40, "what the system says"),
    ] {
        let said = remedy(&io::Error::from_raw_os_error(errno), 65532, Path::new("/app/data"));
        assert!(said.contains(words) && !said.contains("chown"), "{errno}: {said}");
    }
    let own = tempfile::tempdir().unwrap();
    let said = remedy(&io::ErrorKind::PermissionDenied.into(), own_uid(), own.path());
    assert!(said.contains("chmod 700") && said.contains("SELinux") && !said.contains("chown"), "{said}");
}
