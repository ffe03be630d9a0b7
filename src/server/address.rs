//! Addresses to listen on, from text: what can be said of them before the system is asked to open one.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs};

use crate::Error;
use crate::error::Kind;
use crate::sys::socket;

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
        if let Some(address) = numeric(text).map_err(explain)? {
            return Ok(vec![address]);
        }
        if let Some(what) = misspelt(text) {
            return Err(explain(what));
        }
        let found = text.to_socket_addrs().map_err(|error| explain(error.to_string()))?;
        let mut addresses: Vec<SocketAddr> = found.collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() { Err(explain("the name has no address".to_owned())) } else { Ok(addresses) }
    }
}

/// The address, if it is one in numbers, the name of an interface excepted; what is wrong with it, if it cannot be listened
/// on.
fn numeric(text: &str) -> Result<Option<SocketAddr>, String> {
    let address = match text.parse() {
        Ok(address) => address,
        Err(_) => match with_named_interface(text)? {
            Some(address) => address,
            None => return Ok(None),
        },
    };
    if let SocketAddr::V6(address) = address {
        let (ip, port) = (address.ip(), address.port());
        if ip.is_unicast_link_local() && address.scope_id() == 0 {
            return Err(format!(
                "every interface has addresses like this; add the number of the one that is meant (`ip link` lists \
                 them), or its name, as in [{ip}%2]:{port}"
            ));
        }
        if let Some(ip) = ip.to_ipv4_mapped() {
            return Err(format!("this is how IPv6 notes an address of IPv4 (IPv4-mapped); write {ip}:{port}"));
        }
    }
    Ok(Some(address))
}

/// `[fe80::1%eth0]:80`, which the standard library takes with the interface's number only.
fn with_named_interface(text: &str) -> Result<Option<SocketAddr>, String> {
    let parts = text.strip_prefix('[').and_then(|text| text.rsplit_once("]:")).and_then(|(host, port)| {
        let (ip, interface) = host.split_once('%')?;
        Some((ip.parse().ok()?, interface, port.parse().ok()?))
    });
    let Some((ip, interface, port)) = parts else { return Ok(None) };
    match socket::interface_number(interface) {
        Some(number) => Ok(Some(SocketAddrV6::new(ip, port, 0, number).into())),
        None => Err(format!("there is no interface '{interface}' (`ip link` lists them)")),
    }
}

/// What to write instead of a text that is no address, if it is clear what is meant.
fn misspelt(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let is_port = port.parse::<u16>().is_ok();
    let is_ipv6 = |host: &str| host.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok());
    let every = || format!("0.0.0.0:{port} is every address of IPv4, [::]:{port} of IPv6");
    if text.contains("://") {
        return Some("an address and a port are needed, not a URL, such as 127.0.0.1:8080 or [::]:80".to_owned());
    }
    if text.starts_with("unix:") || text.contains('/') {
        let why = "sockets in the file system are not supported; 127.0.0.1:8080 is reached from this machine only";
        return Some(why.to_owned());
    }
    // Before the whole: who writes ::1:8080 means a port, though it may be an address, too.
    if is_port && is_ipv6(host) {
        return Some(format!("an address of IPv6 is written in brackets: [{host}]:{port}"));
    }
    if is_ipv6(text) {
        return Some(format!("an address of IPv6 is written in brackets, and a port follows: [{text}]:8080"));
    }
    if text.starts_with('[') && text.ends_with(']') {
        return Some(format!("a port is missing: {text}:8080"));
    }
    if !text.contains(':') {
        return Some("an address and a port are needed, such as 127.0.0.1:8080 or [::]:80".to_owned());
    }
    match host {
        "" => Some(format!("a host is missing before the port: {}", every())),
        "*" => Some(every()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_is_answered_with_what_to_write() {
        for (text, words) in [
            ("::1:21010", "in brackets: [::1]:21010"),
            ("2001:db8::1:80", "in brackets: [2001:db8::1]:80"),
            ("fe80::1%lo:80", "in brackets: [fe80::1%lo]:80"),
            ("::1", "a port follows: [::1]:8080"),
            ("::", "a port follows: [::]:8080"),
            ("[::1]", "a port is missing: [::1]:8080"),
            ("[::ffff:127.0.0.1]:21010", "write 127.0.0.1:21010"),
            ("[fe80::1]:80", "as in [fe80::1%2]:80"),
            ("[fe80::1%no-such-one]:80", "no interface 'no-such-one'"),
            ("*:80", "0.0.0.0:80 is every address of IPv4, [::]:80 of IPv6"),
            (":80", "a host is missing before the port: 0.0.0.0:80 is every"),
            ("http://127.0.0.1:80/", "not a URL, such as 127.0.0.1:8080"),
            ("unix:/run/web.sock", "not supported"),
            ("/run/web.sock", "not supported"),
            ("8080", "such as 127.0.0.1:8080"),
        ] {
            let error = Listen::from(text).resolve().expect_err("it is no address");
            assert!(error.is_usage() && error.to_string().contains(words), "no {words:?} in: {error}");
        }
    }

    #[test]
    fn an_interface_is_known_by_its_name_or_number() {
        for text in ["[fe80::1%1]:80", "[fe80::1%lo]:80"] {
            let expected = SocketAddrV6::new("fe80::1".parse().expect("it is one"), 80, 0, 1);
            assert_eq!(Listen::from(text).resolve().expect("it is one"), [expected.into()], "{text}");
        }
    }
}
