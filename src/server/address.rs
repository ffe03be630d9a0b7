//! Addresses to listen on, from text: what can be said of them before the system is asked to open one.

use std::net::{SocketAddr, ToSocketAddrs};

use crate::Error;
use crate::error::Kind;

/// An address to listen on. Made from a socket address or from text: `127.0.0.1:8080`, `[::]:80`, `localhost:8080`.
///
/// ```
/// use std::net::{Ipv6Addr, SocketAddr};
/// use ringleader::Server;
///
/// let builder = Server::builder()
///     .listen("localhost:8080")
///     .listen(SocketAddr::from((Ipv6Addr::LOCALHOST, 8080)))
///     .listen("127.0.0.1:0"); // a free port, which `Handle::local_addrs` tells
/// # drop(builder);
/// ```
#[derive(Debug, Clone)]
pub struct Listen {
    text: String,
}

impl From<&str> for Listen {
    fn from(text: &str) -> Self {
        Self { text: text.to_owned() }
    }
}

impl From<String> for Listen {
    fn from(text: String) -> Self {
        Self { text }
    }
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self { text: address.to_string() }
    }
}

impl Listen {
    /// What the text means to the system: a name may have several addresses.
    pub(super) fn resolve(&self) -> Result<Vec<SocketAddr>, Error> {
        let text = &self.text;
        let explain = |what: String| Error::new(Kind::Usage, format!("cannot listen on '{text}': {what}"));
        match text.parse() {
            Ok(SocketAddr::V6(address)) if address.ip().is_unicast_link_local() && address.scope_id() == 0 => {
                let (ip, port) = (address.ip(), address.port());
                return Err(explain(format!(
                    "every interface has addresses like this; add the number of the one that is meant (`ip link` lists \
                     them), as in [{ip}%2]:{port}"
                )));
            }
            Ok(address) => return Ok(vec![address]),
            Err(_) => {}
        }
        if !text.contains(':') {
            return Err(explain("an address and a port are needed, such as 127.0.0.1:8080 or [::]:80".to_owned()));
        }
        if text.starts_with(':') {
            return Err(explain(format!(
                "a host is missing before the port: 0.0.0.0{text} is every address of IPv4, [::]{text} of IPv6"
            )));
        }
        let found = text.to_socket_addrs().map_err(|error| explain(error.to_string()))?;
        let mut addresses: Vec<SocketAddr> = found.collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() { Err(explain("the name has no address".to_owned())) } else { Ok(addresses) }
    }
}
