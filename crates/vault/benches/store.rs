#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a bench does one thing, and prints it")]
#![allow(clippy::expect_used, reason = "a figure that could not be taken is none")]
//! Measures the store next to its floor in the same run: `cargo bench -p dockflare-vault`.
//!
//! The floor of a set is one `redb` transaction with one record, flushed to the same disk. The floor of a get is one
//! `redb` read and opening one record of the same size. Prints figures and asserts nothing, since they belong to the
//! machine that they were taken on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use dockflare_vault::audit::AuditConfig;
use dockflare_vault::grant::{Grant, Grants};
use dockflare_vault::principal::Principal;
use dockflare_vault::seal::Key;
use dockflare_vault::secret::{SecretName, Value};
use dockflare_vault::store::{Change, Location, Options};
use dockflare_vault::vault::{Vault, now};
use redb::{Database, ReadableDatabase, TableDefinition};

const SIZES: [usize; 3] = [100, 10_000, 100_000];
/// How long to measure each figure.
const TIME: Duration = Duration::from_secs(2);
const VALUE: [u8; 64] = [7; 64];
const RAW: TableDefinition<&[u8], &[u8]> = TableDefinition::new("raw");

fn main() {
    // `cargo test --all-targets` runs this as well, and must not take minutes for figures that nobody reads.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    println!("| secrets | get/s | floor | set/s | floor | start | resident |\n|---|---|---|---|---|---|---|");
    for size in SIZES {
        let folder = dir.path().join(size.to_string());
        std::fs::create_dir(&folder).expect("a folder");
        row(&folder, size);
    }
}

fn open(folder: &Path, key: &Key) -> Vault {
    let location = Location { file: folder.join("vault.redb"), counter: None };
    let audit = AuditConfig { file: folder.join("audit.log"), max_bytes: 100 << 20, keep: 1 };
    let grants = Grants::new(vec![Grant::operator()]);
    let options = Options { accept_rollback: false, now: now() };
    Vault::open(&location, key.clone(), options, audit, grants).expect("a vault").0
}

fn name(number: usize) -> SecretName {
    format!("bench/{number}").parse().expect("a name")
}

/// How often `work` runs in a second.
fn rate(mut work: impl FnMut(usize)) -> u64 {
    let began = Instant::now();
    let mut done = 0;
    while began.elapsed() < TIME {
        work(done);
        done += 1;
    }
    (done as f64 / began.elapsed().as_secs_f64()) as u64
}

fn row(folder: &Path, size: usize) {
    let (key, who) = (Key::random().expect("a key"), Principal::Operator);
    let value = Value::new(VALUE.to_vec()).expect("a value");
    let change = Change { now: now(), ..Change::default() };
    let vault = open(folder, &key);
    // Fill it through the real store, although that is slow: one that flushes nothing would be another store.
    for number in 0..size {
        vault.set(&who, &name(number), &value, &change).expect("set");
    }
    drop(vault);
    let began = Instant::now();
    let vault = Arc::new(open(folder, &key));
    let start = began.elapsed();
    let gets = rate(|done| {
        let _ = vault.get(&who, &name(done * 7919 % size), None).expect("get");
    });
    let sets = rate(|done| {
        let _ = vault.set(&who, &name(done * 7919 % size), &value, &change).expect("set");
    });
    let resident = resident();

    let raw = Database::create(folder.join("raw.redb")).expect("redb");
    let cipher = XChaCha20Poly1305::new(&[1; 32].into());
    let nonce = XNonce::from([2; 24]);
    let sealed = cipher.encrypt(&nonce, &VALUE[..]).expect("seal");
    let place = |number: usize| -> [u8; 32] {
        let mut place = [0; 32];
        place[..8].copy_from_slice(&(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        place
    };
    let txn = raw.begin_write().expect("write");
    {
        let mut table = txn.open_table(RAW).expect("table");
        for number in 0..size {
            table.insert(&place(number)[..], &sealed[..]).expect("insert");
        }
    }
    txn.commit().expect("commit");
    let raw_gets = rate(|done| {
        let txn = raw.begin_read().expect("read");
        let table = txn.open_table(RAW).expect("table");
        let record = table.get(&place(done * 7919 % size)[..]).expect("get").expect("there");
        drop(cipher.decrypt(&nonce, record.value()).expect("open"));
    });
    let raw_sets = rate(|done| {
        let txn = raw.begin_write().expect("write");
        let sealed = cipher.encrypt(&nonce, &VALUE[..]).expect("seal");
        txn.open_table(RAW).expect("table").insert(&place(done * 7919 % size)[..], &sealed[..]).expect("insert");
        txn.commit().expect("commit");
    });
    println!(
        "| {size} | {gets} | {raw_gets} | {sets} | {raw_sets} | {:.0} ms | {resident:.1} MB |",
        start.as_secs_f64() * 1000.0
    );

    // Rotate all records while another thread reads without a pause.
    vault.rotate(&who).expect("rotate");
    let is_over = Arc::new(AtomicBool::new(false));
    let reader = {
        let (vault, is_over) = (vault.clone(), is_over.clone());
        std::thread::spawn(move || {
            let (mut reads, mut longest) = (0_u64, Duration::ZERO);
            while !is_over.load(Ordering::Relaxed) {
                let began = Instant::now();
                vault.get(&Principal::Operator, &name(reads as usize % size), None).expect("get");
                longest = longest.max(began.elapsed());
                reads += 1;
            }
            (reads, longest)
        })
    };
    let began = Instant::now();
    while vault.reseal().expect("reseal") {}
    let took = began.elapsed();
    is_over.store(true, Ordering::Relaxed);
    let (reads, longest) = reader.join().expect("reader");
    println!(
        "  a rotation of {size}: {:.1} s, {reads} reads meanwhile, the longest took {:.1} ms",
        took.as_secs_f64(),
        longest.as_secs_f64() * 1000.0
    );
}

/// Resident memory of this process in MB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or_default() / 1024.0
}
