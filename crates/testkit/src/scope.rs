//! A scope: what a test makes, and the promise that it is gone afterwards.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bollard::Docker;

use crate::cleanup;
use crate::process::{self, Kind, Owned, SCOPE};
use crate::runner;

/// Everything one test makes. Dropping it removes the lot, whether the test passed, failed or panicked.
pub struct Scope {
    docker: Docker,
    suffix: String,
    /// A std mutex: no await happens under it.
    owned: Mutex<Vec<Owned>>,
}

impl Scope {
    /// An empty scope with a suffix of its own.
    #[must_use]
    pub fn new(docker: Docker) -> Self {
        Self { docker, suffix: process::random_suffix(), owned: Mutex::default() }
    }

    /// The engine.
    #[must_use]
    pub fn docker(&self) -> &Docker {
        &self.docker
    }

    /// The random part of this scope's names.
    #[must_use]
    pub fn suffix(&self) -> &str {
        &self.suffix
    }

    /// `base-<suffix>`: a name that no other test has.
    #[must_use]
    pub fn name(&self, base: &str) -> String {
        format!("{base}-{}", self.suffix)
    }

    /// The labels that make a thing part of this scope; whatever bears them is removed with it.
    #[must_use]
    pub fn labels(&self) -> HashMap<String, String> {
        let mut labels = process::me().labels();
        labels.insert(SCOPE.to_owned(), self.suffix.clone());
        labels
    }

    /// A container of this name, made from now on by the program under test, is this scope's to remove.
    /// One that was there before is left alone.
    pub fn owns_container(&self, name: &str) {
        self.own(Owned::now(Kind::Container, name));
    }

    /// As [`Scope::owns_container`], for a network.
    pub fn owns_network(&self, name: &str) {
        self.own(Owned::now(Kind::Network, name));
    }

    fn own(&self, owned: Owned) {
        process::write_down(&owned);
        self.owned.lock().unwrap_or_else(PoisonError::into_inner).push(owned);
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let owned = std::mem::take(&mut *self.owned.lock().unwrap_or_else(PoisonError::into_inner));
        let suffix = self.suffix.clone();
        let want_logs = runner::wants_notes();
        // A thread and runtime of its own: this drop may run inside a runtime, or outside of any.
        let cleaner = std::thread::spawn(move || cleanup::block_on(cleanup::end_scope(&suffix, &owned, want_logs)));
        match cleaner.join() {
            Ok(Ok(logs)) => logs.into_iter().for_each(|(name, log)| runner::note(&format!("container {name}"), &log)),
            Ok(Err(error)) => eprintln!("testkit: scope {} may have left something behind: {error:#}", self.suffix),
            Err(_) => eprintln!("testkit: cleaning up scope {} panicked", self.suffix),
        }
    }
}
