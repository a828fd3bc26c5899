//! x
pub mod audit;
pub mod grant;
pub mod principal;
pub mod seal;
pub mod secret;
pub mod store;
pub mod config;
pub mod vault;
