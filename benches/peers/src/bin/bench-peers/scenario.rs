//! The scenarios: what the load generator does. A new one is a row in [`SCENARIOS`].

/// One way of loading a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    pub name: &'static str,
    pub what: &'static str,
    pub connections: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    KeepAlive,
    /// Sixteen requests at once, by `pipelined.lua`.
    Pipelined,
    /// A `Connection: close` header on every request.
    Close,
}

/// The script of [`Kind::Pipelined`].
pub const PIPELINED_LUA: &str = include_str!("pipelined.lua");

pub const SCENARIOS: &[Scenario] = &[
    keep_alive("keepalive-1", "keep-alive, 1 connection", 1),
    keep_alive("keepalive-4", "keep-alive, 4 connections", 4),
    keep_alive("keepalive-64", "keep-alive, 64 connections", 64),
    keep_alive("keepalive-256", "keep-alive, 256 connections", 256),
    Scenario {
        name: "pipelined-64",
        what: "16 requests pipelined, 64 connections",
        connections: 64,
        kind: Kind::Pipelined,
    },
    Scenario { name: "close-64", what: "one connection per request, 64 at a time", connections: 64, kind: Kind::Close },
];

const fn keep_alive(name: &'static str, what: &'static str, connections: u32) -> Scenario {
    Scenario { name, what, connections, kind: Kind::KeepAlive }
}

/// Finds a scenario by name, for the command line.
pub fn named(name: &str) -> Result<Scenario, String> {
    let found = SCENARIOS.iter().find(|scenario| scenario.name == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        format!("there is no such scenario; there are {}", names.join(", "))
    })
}
