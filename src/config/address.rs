//! Parses `IP:port` and `name:port`, and explains what is wrong with other text.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::problem::quoted;
use crate::names::DownstreamAddress;

/// Parses an address and port, or a DNS name and port. Text that looks like a misspelt IP address is refused as one.
///
/// # Errors
/// The value, what is wrong with it, and the fix.
pub(super) fn parse_or_name(text: &str, example: &str) -> Result<DownstreamAddress, String> {
    let name = text.rsplit_once(':').filter(|(host, port)| is_host_name(host) && as_port(port).is_some());
    match name {
        Some((_, port)) if as_port(port) == Some(0) => {
            Err(format!("{} has port 0; give a port from 1 to 65535", quoted(text)))
        }
        Some((host, port)) => {
            // DNS names are case-insensitive.
            Ok(DownstreamAddress::Name {
                host: host.to_ascii_lowercase().into(),
                port: as_port(port).unwrap_or_default(),
            })
        }
        None => parse(text, example).map(DownstreamAddress::Ip),
    }
}

/// True for labels of up to 63 letters, digits, `-` and `_`. The last label is not all digits, as it is in an IPv4 address.
fn is_host_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253 && name.split('.').all(is_label) && !last.chars().all(|c| c.is_ascii_digit())
}

/// Parses an address and port. Refuses port 0, IPv4-mapped IPv6 addresses, and link-local addresses without a zone number.
/// `example` is shown in the message if the text suggests nothing better.
///
/// # Errors
/// The value, what is wrong with it, and the fix.
pub(super) fn parse(text: &str, example: &str) -> Result<SocketAddr, String> {
    let shown = quoted(text);
    let address: SocketAddr = text.parse().map_err(|_| explain(text, example))?;
    if address.port() == 0 {
        return Err(format!("{shown} has port 0; give a port from 1 to 65535"));
    }
    if let SocketAddr::V6(v6) = address {
        if let Some(v4) = v6.ip().to_ipv4_mapped() {
            return Err(format!("{shown} is an IPv4 address written as IPv6; write \"{v4}:{}\"", v6.port()));
        }
        if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 {
            return Err(format!(
                "{shown} is link-local but does not say on which link; append the interface's number, as in \"[{}%2]:{}\"",
                v6.ip(),
                v6.port()
            ));
        }
    }
    Ok(address)
}

/// Why the text is not `IP:port`, and the fix.
fn explain(text: &str, example: &str) -> String {
    let shown = quoted(text);
    let port = example.rsplit_once(':').map_or("5514", |(_, port)| port);
    let inside_brackets = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    match inside_brackets.parse() {
        Ok(IpAddr::V4(ip)) => return format!("{shown} has no port; write for example \"{ip}:{port}\""),
        Ok(IpAddr::V6(ip)) => {
            return format!("{shown} has no port; write it after brackets, for example \"[{ip}]:{port}\"");
        }
        Err(_) => {}
    }
    let only_port = text.strip_prefix(':').unwrap_or(text);
    if let Some(port) = as_port(only_port) {
        let ip = example.rsplit_once(':').map_or("0.0.0.0", |(ip, _)| ip);
        return format!("{shown} has no IP address; write for example \"{ip}:{port}\"");
    }
    match text.rsplit_once(':') {
        Some((ip, port)) if ip.parse::<Ipv4Addr>().is_ok() || ip.starts_with('[') && ip.ends_with(']') => {
            if as_port(port).is_none() {
                return format!("{shown} has no valid port; give a port from 1 to 65535 after the last colon");
            }
            format!("{shown} has no valid IPv6 address in its brackets; write for example \"[::1]:{port}\"")
        }
        Some((host, port)) if as_port(port).is_some() => {
            let host = quoted(host);
            format!("{shown}: {host} is not an IP address; write for example \"{example}\"")
        }
        _ => format!("{shown} is not IP:port; write for example \"{example}\""),
    }
}

/// Digits only: `u16::from_str` accepts a sign too.
fn as_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_addresses_are_read() {
        for text in ["0.0.0.0:5514", "[::]:5514", "10.0.1.10:1", "[2001:db8::1]:65535", "[fe80::1%2]:53"] {
            assert_eq!(parse(text, "0.0.0.0:5514").unwrap().to_string(), text);
        }
    }

    #[test]
    fn names_are_those_that_dns_could_have() {
        let name = |text: &str| match parse_or_name(text, "10.0.1.10:5514") {
            Ok(DownstreamAddress::Name { host, port }) => format!("{host} {port}"),
            other => format!("{other:?}"),
        };
        assert_eq!(name("collector.example.org:514"), "collector.example.org 514");
        assert_eq!(name("Vector-1.Logging.svc.:5514"), "vector-1.logging.svc. 5514");
        assert_eq!(name("localhost:1"), "localhost 1");
        assert_eq!(name("_sink.x9:1"), "_sink.x9 1");
        assert_eq!(name("10.0.0.1:1"), "Ok(Ip(10.0.0.1:1))");
        assert_eq!(name("[::1]:1"), "Ok(Ip([::1]:1))");
        for wrong in
            ["10.0.0:1", "300.1.1.1:1", "1:1", "a..b:1", "-a.b:1", "a b:1", ".:1", ":1", "host", "host:x", "host:0"]
        {
            assert!(name(wrong).starts_with("Err("), "{wrong}: {}", name(wrong));
        }
        assert!(name(&format!("{}:1", "x.".repeat(128))).starts_with("Err("));
        assert!(name(&format!("{}.x:1", "x".repeat(64))).starts_with("Err("));
    }

    #[test]
    fn bad_addresses_are_explained() {
        for (text, message) in [
            ("0.0.0.0", r#""0.0.0.0" has no port; write for example "0.0.0.0:5514""#),
            ("::", r#""::" has no port; write it after brackets, for example "[::]:5514""#),
            ("[::1]", r#""[::1]" has no port; write it after brackets, for example "[::1]:5514""#),
            ("5514", r#""5514" has no IP address; write for example "0.0.0.0:5514""#),
            (":514", r#"":514" has no IP address; write for example "0.0.0.0:514""#),
            ("0.0.0.0:0", r#""0.0.0.0:0" has port 0; give a port from 1 to 65535"#),
            ("0.0.0.0:", r#""0.0.0.0:" has no valid port; give a port from 1 to 65535 after the last colon"#),
            ("0.0.0.0:65536", r#""0.0.0.0:65536" has no valid port; give a port from 1 to 65535 after the last colon"#),
            ("[::]:x", r#""[::]:x" has no valid port; give a port from 1 to 65535 after the last colon"#),
            ("[1.2.3.4]:5", r#""[1.2.3.4]:5" has no valid IPv6 address in its brackets; write for example "[::1]:5""#),
            (
                "localhost:5514",
                r#""localhost:5514": "localhost" is not an IP address; write for example "0.0.0.0:5514""#,
            ),
            ("", r#""" is not IP:port; write for example "0.0.0.0:5514""#),
            ("*:*", r#""*:*" is not IP:port; write for example "0.0.0.0:5514""#),
            (
                "[::ffff:10.0.0.1]:53",
                r#""[::ffff:10.0.0.1]:53" is an IPv4 address written as IPv6; write "10.0.0.1:53""#,
            ),
            (
                "[fe80::1]:53",
                r#""[fe80::1]:53" is link-local but does not say on which link; append the interface's number, as in "[fe80::1%2]:53""#,
            ),
        ] {
            assert_eq!(parse(text, "0.0.0.0:5514").unwrap_err(), message);
        }
    }
}
