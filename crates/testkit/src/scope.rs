//! Scopes: a scope owns what a test makes and removes it afterwards.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bollard::Docker;

use crate::cleanup;
use crate::process::{self, Kind, Owned, SCOPE};
use crate::runner;

/// Everything one test makes. Dropping the scope removes it all, whether the test passed, failed or panicked.
pub struct Scope {
    docker: Docker,
    suffix: String,
    /// A std mutex: no await happens under it.
    owned: Mutex<Vec<Owned>>,
}

impl Scope {
    /// Creates an empty scope with a random suffix.
    #[must_use]
    pub fn new(docker: Docker) -> Self {
        Self { docker, suffix: process::random_suffix(), owned: Mutex::default() }
    }

    /// Returns the engine's client.
    #[must_use]
    pub fn docker(&self) -> &Docker {
        &self.docker
    }

    /// Returns the random part of this scope's names.
    #[must_use]
    pub fn suffix(&self) -> &str {
        &self.suffix
    }

    /// Returns `base-<suffix>`, a name that no other test uses.
    #[must_use]
    pub fn name(&self, base: &str) -> String {
        format!("{base}-{}", self.suffix)
    }

    /// Returns the labels that make an object part of this scope. The scope removes every object with them.
    #[must_use]
    pub fn labels(&self) -> HashMap<String, String> {
        let mut labels = process::me().labels();
        labels.insert(SCOPE.to_owned(), self.suffix.clone());
        labels
    }

    /// Registers a container by name: the scope removes it if the program under test makes it from now on.
    /// An older container of that name is left alone.
    pub fn owns_container(&self, name: &str) {
        self.own(Owned::now(Kind::Container, name));
    }

    /// Like [`Scope::owns_container`], for a network.
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
        // Use a separate thread and runtime: this drop may run inside a runtime or outside of any.
        let cleaner = std::thread::spawn(move || cleanup::block_on(cleanup::end_scope(&suffix, &owned, want_logs)));
        match cleaner.join() {
            Ok(Ok(logs)) => logs.into_iter().for_each(|(name, log)| runner::note(&format!("container {name}"), &log)),
            Ok(Err(error)) => eprintln!("testkit: scope {} may have left something behind: {error:#}", self.suffix),
            Err(_) => eprintln!("testkit: cleaning up scope {} panicked", self.suffix),
        }
    }
}
