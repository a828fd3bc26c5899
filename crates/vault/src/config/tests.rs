use proptest::prelude::*;

use super::*;
use crate::delivery::{Content, OnChange, Signal};
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
fn the_master_key_and_the_next_one_are_two_files() {
    let config = parse("encryption: {master_key_file: /a, next_master_key_file: /b}").unwrap();
    assert_eq!((config.master_key_file, config.next_master_key_file), ("/a".into(), Some("/b".into())));
    assert!(problems("encryption: {master_key: /a, next_master_key_file: /a}")[0].contains("name another one"));
    assert!(problems("encryption: {master_key: /a, master_key_file: /b}")[0].contains("two files"));
    let variables = env(&[("DOCKFLARE_VAULT_ENCRYPTION_NEXT_MASTER_KEY_FILE", "/c")]);
    assert_eq!(Config::parse("", &variables).unwrap().next_master_key_file, Some("/c".into()));
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

const DELIVERY: &str = "deliveries:
- workload: shop
  directory: /run/deliver/shop/
  gid: 1000
  mode: 0444
  on_change: {signal: HUP}
  containers: [shop_api_1, shop_worker_1]
  files:
  - {name: db_password, secret: shop/db-password, mode: \"0400\"}
  - name: db.ini
    secrets: {user: shop/db-user, password: shop/db-password}
    template: |
      user={{ user }}
      password={{ password|urlencode }}
- workload: blog
  directory: /run/deliver/blog
  allow_disk: true
  on_change: restart
  containers: [blog]
  files: [{name: key, secret: blog/key}]
";

#[test]
fn a_delivery_says_which_files_a_workload_has_and_what_follows_a_change() {
    let config = parse(DELIVERY).unwrap();
    let [blog, shop] = config.deliveries.as_slice() else { panic!("{:?}", config.deliveries) };
    assert_eq!((shop.directory.as_path(), shop.gid, shop.uid), (Path::new("/run/deliver/shop"), Some(1000), None));
    assert_eq!((shop.on_change, shop.containers.len()), (OnChange::Signal(Signal::Hup), 2));
    assert_eq!((shop.files["db_password"].mode, shop.files["db.ini"].mode), (0o400, 0o444));
    let secrets: Vec<_> = shop.secrets().into_iter().map(|name| name.as_str()).collect();
    assert_eq!(secrets, ["shop/db-password", "shop/db-user"]);
    let Content::Template { template, .. } = &shop.files["db.ini"].content else { panic!("no template") };
    let values = BTreeMap::from([("user", "u"), ("password", "a b&c")]);
    assert_eq!(template.render(&values).unwrap().as_slice(), b"user=u\npassword=a%20b%26c\n");
    assert_eq!((blog.allow_disk, blog.on_change, blog.files["key"].mode), (true, OnChange::Restart, 0o440));
    assert!(parse("deliveries: []\n").unwrap().deliveries.is_empty());
}

#[test]
fn all_that_is_wrong_with_deliveries_is_said_with_the_remedy() {
    for (from, to, expected) in [
        ("workload: blog", "workload: shop", "deliveries[1].workload: there is another delivery for shop"),
        ("workload: blog", "workload: b/g", "deliveries[1].workload: \"b/g\" is no name of a workload"),
        ("/run/deliver/blog", "/run/deliver/shop", "deliveries[0].directory and deliveries[1].directory are one"),
        ("/run/deliver/blog", "/run/deliver/shop/x", "or one lies in the other (/run/deliver/shop/x)"),
        ("/run/deliver/blog", "/run/../etc", "is no place for a workload's files"),
        ("/run/deliver/blog", "/", "is no place for a workload's files"),
        ("/run/deliver/blog", "blog", "write an absolute path"),
        ("allow_disk: true", "allow_disk: yes!", "deliveries[1].allow_disk: \"yes!\" is neither true nor false"),
        ("gid: 1000", "gid: app", "deliveries[0].gid: \"app\" is no whole number"),
        ("mode: 0444", "mode: 0466", "deliveries[0].mode: \"466\" is no mode"),
        ("mode: 0444", "mode: 0040", "deliveries[0].mode: \"40\" is no mode"),
        ("mode: 0444", "mode: 9", "deliveries[0].mode: \"9\" is no mode"),
        ("{signal: HUP}", "{signal: KILL}", "deliveries[0].on_change.signal: \"KILL\" is no signal that can be sent"),
        ("{signal: HUP}", "{sginal: HUP}", "deliveries[0].on_change.signal is missing"),
        ("{signal: HUP}", "reload", "deliveries[0].on_change: \"reload\" is unknown: write none, restart, or"),
        ("[blog]", "[]", "deliveries[1].containers is missing"),
        ("[blog]", "[/blog]", "deliveries[1].containers: \"/blog\" is no name of a container"),
        ("[blog]", "[blog, blog]", "deliveries[1].containers: blog is there twice"),
        ("{name: key, secret: blog/key}", "", "deliveries[1].files is missing or empty"),
        ("name: key,", "name: ..data,", "deliveries[1].files[0].name: \"..data\" is no name of a file"),
        ("name: key,", "nme: key,", "deliveries[1].files[0].nme is no setting: is deliveries[1].files[0].name meant?"),
        ("name: db.ini", "name: db_password", "there is another file db_password in this directory"),
        ("secret: blog/key", "secret: blog//key", "deliveries[1].files[0].secret: the name \"blog//key\""),
        ("secret: blog/key", "mode: 0440", "deliveries[1].files[0].secret is missing: name a secret, or"),
        ("secret: blog/key", "secret: a, template: b", "secret and deliveries[1].files[0].template are both there"),
        ("secret: blog/key", "secret: a, secrets: {b: c}", "deliveries[1].files[0].secrets is for a template"),
        (
            "{user: shop/db-user,",
            "{usr: shop/db-user,",
            "uses \"user\", for which secrets names no secret: is usr meant?",
        ),
        ("{user: shop/db-user, password: shop/db-password}", "{}", "the template uses \"password\""),
        ("{{ user }}", "{{ user", "deliveries[0].files[1].template: the template cannot be read in its line"),
        ("user: shop", "us-er: shop", "files[1].secrets.us-er: a template knows no such word"),
    ] {
        assert_ne!(DELIVERY.replace(from, to), DELIVERY, "{from}");
        let found = problems(&DELIVERY.replacen(from, to, 1));
        assert!(found.iter().any(|problem| problem.contains(expected)), "{to}: {expected}\n{found:#?}");
    }
}

#[test]
fn no_error_shows_what_stands_in_a_template() {
    for broken in ["hunter2 {{ user", "hunter2 {{ 'hunter2'|nothing }}{{ user }}", "{% hunter2 %}", "{{ hunter2( }}"] {
        let text = format!(
            "deliveries: [{{workload: a, directory: /a, files: [{{name: a, secrets: {{user: u}}, template: \"{broken}\"}}]}}]"
        );
        if let Err(errors) = parse(&text) {
            assert!(!errors.to_string().contains("hunter2"), "{errors}");
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_refused(text in "(nats|acl|grants|deliveries|files|secrets|template|audit|- |: |\\[|\\]|\\{|\\}|&a|\\*a|\n| |[a-z]|\"){0,30}") {
        let _ = parse(&text);
    }
}
