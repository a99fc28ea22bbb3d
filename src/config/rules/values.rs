//! Rules about a single value. Each returns the value, or a message with the value, what is wrong and the fix.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use crate::config::problem::quoted;

/// A listener's name becomes a metric label, a log field and part of file names.
pub(super) fn listener_name(name: &str) -> Result<&str, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=63).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(name);
    }
    Err(format!("{} is not a listener's name; use 1 to 63 of A-Z a-z 0-9 . _ -", quoted(name)))
}

/// A downstream's name is shown in logs and tables, between blanks.
pub(super) fn downstream_name(name: &str) -> Result<&str, String> {
    let allowed = |c: char| c.is_ascii_graphic() && !"\"'`\\".contains(c);
    if (1..=253).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(name);
    }
    let fix = "use 1 to 253 printable ASCII characters without blanks, quotes and backslashes";
    Err(format!("{} is not a downstream's name; {fix}", quoted(name)))
}

/// What the kernel accepts as the name of an interface.
pub(super) fn interface(name: &str) -> Result<&str, String> {
    let allowed = |c: char| !c.is_whitespace() && !c.is_control() && c != '/' && c != ':';
    if (1..=15).contains(&name.len()) && name.chars().all(allowed) && name != "." && name != ".." {
        return Ok(name);
    }
    Err(format!("{} is not an interface's name; `ip link` lists the interfaces", quoted(name)))
}

/// Names of Services and namespaces are DNS labels.
pub(super) fn kubernetes_name<'a>(name: &'a str, whose: &str) -> Result<&'a str, String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edges = !name.starts_with('-') && !name.ends_with('-');
    if (1..=63).contains(&name.len()) && name.chars().all(allowed) && edges {
        return Ok(name);
    }
    Err(format!("{} is not {whose}'s name; use 1 to 63 of a-z 0-9 - with no - at an end", quoted(name)))
}

/// The name of a Service's port is a DNS label. One of digits only is refused: it is a number in quotes.
pub(super) fn port_name(name: &str) -> Result<&str, String> {
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{} is a port's number; remove the quotes", quoted(name)));
    }
    kubernetes_name(name, "a Service's port").map_err(|message| format!("{message}, or the port's number"))
}

/// Longest path of a Unix socket: the kernel's `sun_path`, without the zero at its end.
const SOCKET_PATH: usize = 107;

/// A directory in a BPF file system.
pub(super) fn pin_path(path: &str) -> Result<&str, String> {
    let shown = quoted(path);
    let example = "write for example \"/sys/fs/bpf/udp-fanout\"";
    if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(format!("{shown} is not an absolute path; {example}"));
    }
    if path.contains('\0') || path.len() > PIN_PATH_LENGTH {
        return Err(format!("{shown} cannot be a path (at most {PIN_PATH_LENGTH} bytes); {example}"));
    }
    // The BPF file system keeps names with a dot for itself.
    if path.trim_end_matches('/').rsplit('/').next().is_none_or(|last| last.is_empty() || last.contains('.')) {
        return Err(format!("{shown} does not name a directory, or has a dot in the name; {example}"));
    }
    Ok(path)
}

/// Longest path of the pins' directory, with room for what is in it.
const PIN_PATH_LENGTH: usize = 1024;

/// The path of a Unix socket.
pub(super) fn socket_path(path: &str) -> Result<&str, String> {
    let shown = quoted(path);
    let example = "write for example \"/run/udp-fanout/status.sock\"";
    if !path.starts_with('/') {
        return Err(format!("{shown} is not an absolute path; {example}"));
    }
    if path.ends_with('/') || path.contains(char::is_control) {
        return Err(format!("{shown} is not a file's path; {example}"));
    }
    if path.len() > SOCKET_PATH {
        return Err(format!(
            "{shown} has {} bytes, but a socket's path has at most {SOCKET_PATH}; {example}",
            path.len()
        ));
    }
    Ok(path)
}

/// The path of the Prometheus page.
pub(super) fn metrics_path(path: &str) -> Result<&str, String> {
    let shown = quoted(path);
    if !path.starts_with('/') {
        return Err(format!("{shown} does not start with /; write for example \"/metrics\""));
    }
    if ["/healthz", "/readyz", "/serving"].contains(&path) || path.starts_with("/serving/") {
        return Err(format!("{shown} is reserved for a probe; write for example \"/metrics\""));
    }
    if let Some(c) = path.chars().find(|&c| !c.is_ascii_alphanumeric() && !"/-._~!$&'()*+,;=:@%".contains(c)) {
        return Err(format!("{shown} contains {c:?}, which no URL path may; write for example \"/metrics\""));
    }
    Ok(path)
}

/// A listener's address is one of this host, all of them, or a multicast group.
pub(super) fn bind(address: SocketAddr) -> Result<SocketAddr, String> {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_broadcast() => {
            Err(format!("\"{address}\" is the broadcast address; give an address of this host, or 0.0.0.0 for all"))
        }
        SocketAddr::V6(v6) if v6.ip().is_multicast() && v6.scope_id() != 0 => {
            let group = SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0);
            Err(format!("\"{address}\" is a group with a link, but `interface` names the link; write \"{group}\""))
        }
        _ => Ok(address),
    }
}

/// A downstream is one host's address, of the listener's IP version, and not the listener itself.
pub(super) fn downstream(address: SocketAddr, bind: Option<SocketAddr>) -> Result<(), String> {
    let ip = address.ip();
    if ip.is_unspecified() {
        return Err(format!(
            "\"{address}\" is the wildcard address; write the receiver's own, or a loopback address if it is on this host"
        ));
    }
    if ip.is_multicast() {
        return Err(format!("\"{address}\" is a multicast group; list the receivers one by one"));
    }
    if matches!(ip, IpAddr::V4(v4) if v4.is_broadcast()) {
        return Err(format!("\"{address}\" is the broadcast address; list the receivers one by one"));
    }
    let Some(bind) = bind else { return Ok(()) };
    if address.is_ipv4() != bind.is_ipv4() {
        let version = |address: SocketAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(format!(
            "\"{address}\" is {} but the listener's bind, \"{bind}\", is {}; give the receiver's {} address, or add a listener for {}",
            version(address),
            version(bind),
            version(bind),
            version(address)
        ));
    }
    let own = address == bind || (bind.ip().is_unspecified() && ip.is_loopback() && address.port() == bind.port());
    if own {
        return Err(format!(
            "\"{address}\" is the listener itself (bind \"{bind}\"), which would be a loop; give the receiver another port or address"
        ));
    }
    Ok(())
}
