use proptest::prelude::*;

use super::*;
use crate::grant::{Decision, authorize};
use crate::principal::Principal;

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(text, &BTreeMap::new())
}

fn problems(text: &str) -> Vec<String> {
    parse(text).unwrap_err().0
}

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_keys_of_the_original_are_read_as_they_are() {
    let config = parse(
        "nats:\n  url: nats://nats-server:4222\n  user: vault\n  pass: hunter2\n\
         encryption:\n  master_key: /app/config/master.key\n\
         subjects:\n  request: vault.requests\n  reply: vault.replies\n\
         storage:\n  file: /app/data/vault.redb\n\
         acl:\n- subject: admin.requests\n  operations: [get, set, delete, list, rotate, status]\n\
         - subject: user.requests\n  operations: [get, set]\n",
    )
    .unwrap();
    assert_eq!(config.master_key_file, Path::new("/app/config/master.key"));
    let nats = config.nats.as_ref().unwrap();
    assert_eq!((nats.url.as_str(), nats.user.as_deref()), ("nats://nats-server:4222", Some("vault")));
    assert!(!format!("{config:?}").contains("hunter2"));
    let user = Principal::nats("user.requests").unwrap();
    let name = "anything".parse().unwrap();
    assert_eq!(authorize(&config.grants, &user, Operation::Set, Some(&name)), Decision::Allowed);
    assert!(matches!(authorize(&config.grants, &user, Operation::Delete, Some(&name)), Decision::Denied { .. }));
}

#[test]
fn an_empty_file_is_a_vault_for_its_operator_only() {
    for text in ["", "# nothing\n\n", "storage:\n"] {
        let config = parse(text).unwrap();
        assert_eq!(config.grants.rows(), [Grant::operator()]);
        assert_eq!(config.storage.file, Path::new("/app/data/vault.redb"));
        assert!(config.nats.is_none());
    }
}

#[test]
fn all_that_is_wrong_is_said_at_once_with_the_key_and_the_nearest_right_one() {
    let found = problems(
        "storge: {file: /x}\nstorage: {file: relative, chnge_counter: /c}\naudit: {keep: many}\n\
         health: {bind: here}\nacl: {}\ngrants:\n- principal: ip:10.0.0.1\n  operations: [gte]\n- 7\n",
    );
    for expected in [
        "storge is no setting: is storage meant?",
        "storage.chnge_counter is no setting: is storage.change_counter meant?",
        "storage.file is no absolute path",
        "audit.keep: \"many\" is no whole number from 0 to 1000",
        "health.bind: \"here\" is no address",
        "acl is no list",
        "grants[0].principal: \"ip:10.0.0.1\" is no principal",
        "grants[0].operations: \"gte\" is no operation",
        "grants[1] is no mapping",
    ] {
        assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}\n{found:#?}");
    }
    assert_eq!(found.len(), 9, "{found:#?}");
}

#[test]
fn rows_that_contradict_each_other_are_refused() {
    let row = |operations| format!("- principal: nats:a.b\n  operations: [{operations}]\n  names: app\n");
    let found = problems(&format!("grants:\n{}{}", row("get"), row("set")));
    assert!(found[0].contains("grants[0] and grants[1]"), "{found:#?}");
    let found = problems("encryption: {master_key: /a, master_key_file: /b}\n");
    assert!(found[0].contains("name two files"), "{found:#?}");
}

#[test]
fn a_single_value_can_come_from_the_environment_and_a_misspelt_variable_is_named() {
    let good = env(&[("DOCKFLARE_VAULT_STORAGE_FILE", "/e/v"), ("DOCKFLARE_VAULT_AUDIT_KEEP", ""), ("PATH", "/bin")]);
    let config = Config::parse("storage: {file: /f}\naudit: {keep: 3}\n", &good).unwrap();
    assert_eq!((config.storage.file.as_path(), config.audit.keep), (Path::new("/e/v"), 3));
    let bad = env(&[("DOCKFLARE_VAULT_STORAGE_FIEL", "/e/v")]);
    let found = Config::parse("", &bad).unwrap_err().0;
    assert_eq!(found, ["DOCKFLARE_VAULT_STORAGE_FIEL is no setting: is DOCKFLARE_VAULT_STORAGE_FILE meant?"]);
}

#[test]
fn no_error_shows_a_password() {
    for text in [
        "nats: {pass: hunter2, pas: x}\n",
        "nats:\n  pass: hunter2\n bad",
        "nats: {url: \"nats://u:hunter2@host\"}\n",
        "nats: {pass: hunter2, pass_file: /f}\n",
        "nats: {pass: [hunter2]}\n",
        "nats: {pass_file: hunter2}\n",
        "encryption: {master_key: hunter2}\n",
        "nats:\n  pass: hunter2\n  pass: hunter2\n",
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_refused(text in "(nats|acl|grants|audit|- |: |\\[|\\]|\\{|\\}|&a|\\*a|\n| |[a-z]|\"){0,30}") {
        let _ = parse(&text);
    }
}
