//! Doors for the fuzz targets to what is private otherwise. In no build but theirs.

/// A master's answer, as a registration, as commands, and as a refusal of any status.
pub fn reply(body: &[u8]) {
    crate::master::fuzz(body);
    crate::tunnels::fuzz(body);
}
