//! Results: figures by section, baseline and measure; medians and spread; the machine.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde::Serialize;

/// A measured quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// The key in the JSON file.
    pub key: &'static str,
    /// The head of its column.
    pub title: &'static str,
    /// Digits after the decimal point.
    pub digits: usize,
}

/// The highest rate without loss.
pub const LOSSLESS: Measure = Measure { key: "lossless_per_s", title: "lossless/s", digits: 0 };
/// The rate that arrives when twice the lossless rate is sent.
pub const OVERLOAD: Measure = Measure { key: "carried_at_twice_per_s", title: "carried at 2x", digits: 0 };
/// The loss at a rate that is the same for all.
pub const LOSS: Measure = Measure { key: "lost_at_250000_percent", title: "lost at 250 k/s, %", digits: 1 };
/// CPU time for each datagram that arrives, at half of the lossless rate.
pub const CPU: Measure = Measure { key: "cpu_ns", title: "CPU ns each", digits: 0 };
/// Reordered datagrams at half of the lossless rate.
pub const REORDERED: Measure = Measure { key: "reordered_percent", title: "out of order, %", digits: 2 };
/// Duplicated datagrams at half of the lossless rate.
pub const DUPLICATED: Measure = Measure { key: "duplicated", title: "twice", digits: 0 };
/// Latencies in microseconds at 20,000 datagrams a second.
pub const MODEST: [Measure; 3] = [
    Measure { key: "p50_at_20000_us", title: "p50 us, 20 k/s", digits: 1 },
    Measure { key: "p99_at_20000_us", title: "p99 us, 20 k/s", digits: 1 },
    Measure { key: "p999_at_20000_us", title: "p99.9 us, 20 k/s", digits: 1 },
];
/// Latencies in microseconds at half of the lossless rate.
pub const HALF: [Measure; 3] = [
    Measure { key: "p50_at_half_us", title: "p50 us, half", digits: 1 },
    Measure { key: "p99_at_half_us", title: "p99 us, half", digits: 1 },
    Measure { key: "p999_at_half_us", title: "p99.9 us, half", digits: 1 },
];

/// One figure, measured several times.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// The median.
    pub median: f64,
    /// The minimum.
    pub low: f64,
    /// The maximum.
    pub high: f64,
    /// All values, in the order of measurement.
    pub values: Vec<f64>,
}

impl Figure {
    /// Summarises at least one value.
    pub fn of(values: &[f64]) -> Figure {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 if !sorted.is_empty() => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted.get(middle).copied().unwrap_or(0.0),
        };
        let end = |value: Option<&f64>| value.copied().unwrap_or(0.0);
        Figure { median, low: end(sorted.first()), high: end(sorted.last()), values: values.to_vec() }
    }
}

/// One baseline in one section.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Row {
    /// The baseline's name.
    pub name: String,
    /// Figures, by the key of the measure.
    pub figures: BTreeMap<&'static str, Figure>,
    /// The reason why the baseline did not run, if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_run: Option<String>,
    #[serde(skip)]
    values: BTreeMap<&'static str, Vec<f64>>,
}

impl Row {
    /// A row without measurements.
    pub fn new(name: &str) -> Row {
        Row { name: name.into(), ..Row::default() }
    }

    /// Adds a measurement.
    pub fn add(&mut self, measure: Measure, value: f64) {
        let values = self.values.entry(measure.key).or_default();
        values.push(value);
        self.figures.insert(measure.key, Figure::of(values));
    }

    /// The median so far.
    pub fn median(&self, measure: Measure) -> Option<f64> {
        self.figures.get(measure.key).map(|figure| figure.median)
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// A short name, also that of the plot.
    pub key: String,
    /// The title in reports.
    pub title: String,
    /// The baseline that ratios are relative to.
    pub beside: String,
    /// Rows, in the order of the report.
    pub rows: Vec<Row>,
}

impl Table {
    /// The ratio of a baseline's lossless rate to that of the section's reference.
    pub fn ratio(&self, row: &Row) -> Option<f64> {
        let reference = self.rows.iter().find(|row| row.name == self.beside)?.median(LOSSLESS)?;
        Some(row.median(LOSSLESS)? / reference)
    }
}

/// One figure of the control plane, with its goal.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// What was measured.
    pub title: String,
    /// The unit.
    pub unit: &'static str,
    /// The measured values.
    pub figure: Figure,
    /// Upper limit, if there is one.
    pub below: Option<f64>,
}

/// The machine and the software.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processors that the benchmark may use.
    pub cpus: usize,
    /// The processors' model.
    pub architecture: &'static str,
    /// The kernel's version.
    pub kernel: String,
    /// The load average over one minute before the start.
    pub load_before: f64,
    /// Versions of the baselines, by package.
    pub packages: BTreeMap<String, String>,
}

impl Machine {
    /// This machine, now.
    pub fn here() -> Machine {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let release = read("/proc/sys/kernel/osrelease");
        let kernel = release.trim().split(['.', '-']).take(2).collect::<Vec<_>>().join(".");
        let load = read("/proc/loadavg").split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
        Machine {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            architecture: std::env::consts::ARCH,
            kernel,
            load_before: load,
            packages: packages(&["nginx", "nftables", "iptables", "socat", "dnsdist", "rsyslog"]),
        }
    }
}

/// The versions of these Debian packages, as far as they are installed.
fn packages(names: &[&str]) -> BTreeMap<String, String> {
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Version}\\n"]).args(names).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|line| line.split_once(' ')).map(|(name, is)| (name.into(), is.into())).collect()
}

/// Maximum share of disturbed runs for valid figures.
const TOO_MUCH: f64 = 0.1;

/// All results.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The machine.
    pub machine: Machine,
    /// Number of rounds.
    pub rounds: usize,
    /// The share of all runs, 0 to 1, that other programs disturbed.
    pub disturbed: f64,
    /// Forwarding.
    pub tables: Vec<Table>,
    /// The daemon's own work.
    pub control: Vec<Goal>,
}

impl Results {
    /// False if other programs disturbed too many runs.
    pub fn to_be_trusted(&self) -> bool {
        self.disturbed <= TOO_MUCH
    }
}
