//! Entry points for `fuzz/`: the readers of everything that lies on a disk or comes over a socket.

use std::collections::BTreeMap;

/// Reads a record of the store, and its state. Each is refused, or read and written back with the same content.
pub fn record(bytes: &[u8]) {
    crate::store::fuzz_record(bytes);
}

/// Reads the ring of the store's keys, as for a record.
pub fn key_ring(bytes: &[u8]) {
    crate::store::fuzz_ring(bytes);
}

/// Reads lines of the audit. Each is taken or refused.
pub fn audit(bytes: &[u8]) {
    crate::audit::fuzz(bytes);
}

/// Reads a key file. A refusal contains nothing of it but its length.
pub fn key_file(bytes: &[u8]) {
    use crate::seal::KeyError;
    match crate::seal::Key::read(bytes) {
        Ok(_) | Err(KeyError::Constant) => {}
        Err(error) => assert_eq!(error, KeyError::Shape(bytes.len())),
    }
}

/// Reads a configuration, which is taken or refused.
pub fn configuration(text: &str) {
    let _ = crate::config::Config::parse(text, &BTreeMap::new());
}

/// Reads a request at the admin socket, which is understood or refused.
pub fn admin_request(bytes: &[u8]) {
    let _ = serde_json::from_slice::<crate::doors::admin::Request>(bytes);
}
