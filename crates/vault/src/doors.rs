//! How the vault is asked. Each door proves who asks, and hands the question to [`crate::vault::Vault`].

pub mod admin;
pub mod deliver;
