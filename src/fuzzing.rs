//! Doors for the fuzz targets to what is private otherwise. In no build but theirs.

/// A master's answer, as a registration, as commands, and as a refusal of any status.
pub fn reply(body: &[u8]) {
    crate::master::fuzz(body);
    crate::tunnels::fuzz(body);
}

/// A request to the socket proxy, head and body.
pub fn socket_proxy_request(bytes: &[u8]) {
    crate::socket_proxy::fuzz::request(bytes);
}

/// The body of a create call that the socket proxy is sent.
pub fn socket_proxy_create(body: &[u8]) {
    crate::socket_proxy::fuzz::create(body);
}
