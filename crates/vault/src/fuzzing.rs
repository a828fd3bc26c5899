//! What `fuzz/` calls from outside: the readers of everything that lies on a disk or comes over a socket.

use std::collections::BTreeMap;

/// A record of the store, and its state: read or refused, and what is read is written as it was.
pub fn record(bytes: &[u8]) {
    crate::store::fuzz_record(bytes);
}

/// The ring of the store's keys: as for a record.
pub fn key_ring(bytes: &[u8]) {
    crate::store::fuzz_ring(bytes);
}

/// Lines of the audit: each is read or refused.
pub fn audit(bytes: &[u8]) {
    crate::audit::fuzz(bytes);
}

/// A key file: read or refused, and the refusal holds nothing of it but its length.
pub fn key_file(bytes: &[u8]) {
    use crate::seal::KeyError;
    match crate::seal::Key::read(bytes) {
        Ok(_) | Err(KeyError::Constant) => {}
        Err(error) => assert_eq!(error, KeyError::Shape(bytes.len())),
    }
}

/// A configuration: taken or refused.
pub fn configuration(text: &str) {
    let _ = crate::config::Config::parse(text, &BTreeMap::new());
}

/// A request at the admin socket: understood or refused.
pub fn admin_request(bytes: &[u8]) {
    let _ = serde_json::from_slice::<crate::doors::admin::Request>(bytes);
}
