//! How callers reach the vault. Each door proves who asks, and hands the request to [`crate::vault::Vault`].

pub mod admin;
pub mod deliver;
