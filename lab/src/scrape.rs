//! Fetches the daemon's HTTP pages with a GET over a plain socket, and parses Prometheus pages.

use std::fmt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::netns::Namespace;

/// Timeout for a page.
const LIMIT: Duration = Duration::from_secs(10);

/// A response to a GET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The HTTP status code.
    pub status: u16,
    /// The response body.
    pub body: String,
}

/// Fetches a page from inside a namespace.
///
/// # Errors
/// When the connection fails or the response is not HTTP.
pub fn get(namespace: &Namespace, address: SocketAddr, path: &str) -> Result<Page> {
    namespace.run(|| fetch(address, path))
}

/// Fetches a page.
///
/// # Errors
/// When the connection fails or the response is not HTTP.
pub fn fetch(address: SocketAddr, path: &str) -> Result<Page> {
    let answer = (|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        // HTTP 1.0: the end of the connection ends the response, and there is no chunked encoding.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: text/plain\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })();
    parse_answer(&answer.with_context(|| format!("cannot fetch http://{address}{path}"))?)
}

/// Parses an HTTP response.
///
/// # Errors
/// When the text is not an HTTP response.
pub fn parse_answer(answer: &str) -> Result<Page> {
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| anyhow!("not an HTTP response: {answer:?}"))?;
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let Some(status) = status.filter(|_| head.starts_with("HTTP/1.")) else {
        bail!("not an HTTP response: {head:?}");
    };
    Ok(Page { status, body: body.to_owned() })
}

/// A sample: one line of a Prometheus page.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Labels, in the order of the page.
    pub labels: Vec<(String, String)>,
    /// The sample's value.
    pub value: f64,
}

/// A Prometheus page.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// All samples, in the order of the page.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Fetches and parses a page from inside a namespace.
    ///
    /// # Errors
    /// When the page cannot be fetched or parsed.
    pub fn scrape(namespace: &Namespace, address: SocketAddr, path: &str) -> Result<Self> {
        let page = get(namespace, address, path)?;
        if page.status != 200 {
            bail!("http://{address}{path} answered {}: {}", page.status, page.body.trim());
        }
        Self::parse(&page.body)
    }

    /// Parses a page in the Prometheus text format.
    ///
    /// # Errors
    /// With the first malformed line.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| parse_sample(line).ok_or_else(|| anyhow!("not a metric: {line:?}")));
        Ok(Metrics { samples: samples.collect::<Result<_>>()? })
    }

    /// The samples of a metric whose labels include these.
    pub fn select<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        let fits = |sample: &Sample| labels.iter().all(|(key, value)| sample.label(key) == Some(value));
        self.samples.iter().filter(move |sample| sample.name == name && fits(sample))
    }

    /// The sum of the samples of a metric whose labels include these; 0 if there are none. Counts are exact up to 2^53.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.select(name, labels).map(|sample| sample.value as u64).sum()
    }

    /// True if the page has a sample of this metric with these labels.
    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.select(name, labels).next().is_some()
    }
}

impl Sample {
    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<_> = self.labels.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
        write!(f, "{}{{{}}} {}", self.name, labels.join(","), self.value)
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            rest = rest.trim_start_matches([',', ' ']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, value) = rest.split_once("=\"")?;
            let (value, after) = unquote(value)?;
            labels.push((key.to_owned(), value));
            rest = after;
        }
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Parses a label value up to its closing quote. Also returns the rest of the line.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}
