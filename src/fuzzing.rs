//! Exposes private functions to the fuzz targets. Only their builds contain it.

/// Reads a master's answer as a registration, as commands, and as a refusal of any status.
pub fn reply(body: &[u8]) {
    crate::master::fuzz(body);
    crate::tunnels::fuzz(body);
}

/// Reads a request to the socket proxy, head and body.
pub fn socket_proxy_request(bytes: &[u8]) {
    crate::socket_proxy::fuzz::request(bytes);
}

/// Reads the body of a create call to the socket proxy.
pub fn socket_proxy_create(body: &[u8]) {
    crate::socket_proxy::fuzz::create(body);
}
