//! The report: a table on the terminal, `report.json`, and `report.html`.

use serde_json::{Value, json};

use crate::Result;
use crate::rows::{Goal, KERNEL, Row, SQUASHFUSE, Unit, Who};
use crate::stats::Sample;
use crate::table;

/// All that was measured.
pub struct Figures {
    /// The machine, as [`crate::machine::describe`] puts it.
    pub machine: Value,
    /// The tree in a line.
    pub tree: String,
    /// For whom the figures of a peer hold: its name, and who mounts it and reads it.
    pub holds_for: Vec<(String, String)>,
    /// Peers that did not work here, and why.
    pub left_out: Vec<(String, String)>,
    /// The rows that were measured.
    pub rows: Vec<RowFigures>,
}

/// What a row gave.
pub struct RowFigures {
    /// Its [`Row::id`].
    pub id: String,
    /// The peers and their runs.
    pub samples: Vec<(String, Sample)>,
    /// Percent of the CPUs' time that the machine below took meanwhile.
    pub steal_percent: f64,
}

/// A goal beside what was reached.
pub struct Judged {
    /// The goal.
    pub goal: Goal,
    /// The ratio, or the absolute value.
    pub value: f64,
    /// Whether it is reached.
    pub verdict: Verdict,
}

/// Whether a goal is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// By the median.
    Reached,
    /// Not by the median, but the goal lies within the spread of the runs (their middle half): noise may decide.
    Near,
    /// No.
    Missed,
}

impl Verdict {
    /// Of runs, or of ratios of runs that were made one after the other.
    fn of(value: f64, spread: &Sample, limit: f64, more_is_better: bool) -> Self {
        let reaches = |value: f64| if more_is_better { value >= limit } else { value <= limit };
        match spread.middle_half() {
            _ if reaches(value) => Self::Reached,
            Some((low, high)) if reaches(low) || reaches(high) => Self::Near,
            _ => Self::Missed,
        }
    }

    /// Its sign.
    pub fn mark(self) -> &'static str {
        match self {
            Self::Reached => "✓",
            Self::Near => "≈",
            Self::Missed => "✗",
        }
    }
}

impl RowFigures {
    /// The row's definition.
    pub fn row(&self) -> &'static Row {
        table::all().find(|row| row.id == self.id).expect("rows come from the table")
    }

    /// The median of a peer.
    pub fn median(&self, name: &str) -> Option<f64> {
        self.samples.iter().find(|(n, _)| n == name)?.1.median()
    }

    /// A median in terms of a peer's, in digits; nothing where that has none, or took nothing.
    pub fn times(&self, median: f64, peer: &str) -> String {
        self.median(peer).filter(|&base| base > 0.0).map_or(String::new(), |base| digits(median / base))
    }

    /// What the figure of `name` is, in terms of the peer `against`.
    pub fn ratio(&self, name: &str, against: &str) -> Option<f64> {
        Some(self.median(name)? / self.median(against)?)
    }

    /// The same for each round: the runs of a round are made one after the other.
    fn ratios(&self, name: &str, against: &str) -> Option<Sample> {
        let runs = |name: &str| self.samples.iter().find(|(n, _)| n == name).map(|(_, sample)| &sample.runs);
        let (ours, theirs) = (runs(name)?, runs(against)?);
        Some(Sample { runs: ours.iter().zip(theirs).map(|(a, b)| a / b).collect() })
    }

    /// The goals that can be judged with what was measured.
    pub fn judged(&self) -> Vec<Judged> {
        let row = self.row();
        let more_is_better = row.unit.more_is_better();
        row.goals
            .iter()
            .filter_map(|&goal| {
                let of = goal.of.unwrap_or(row.ours);
                let (value, spread) = match goal.against {
                    Some(peer) => (self.ratio(of, peer)?, self.ratios(of, peer)?),
                    None => {
                        let (_, sample) = self.samples.iter().find(|(name, _)| name == of)?;
                        (sample.median()?, sample.clone())
                    }
                };
                let verdict = Verdict::of(value, &spread, goal.limit, more_is_better);
                Some(Judged { goal, value, verdict })
            })
            .collect()
    }
}

impl Figures {
    /// For whom the figures of a peer hold in a row; nothing for a program.
    pub fn who(&self, row: &Row, name: &str) -> &str {
        if row.who == Who::Programs {
            return "";
        }
        self.holds_for.iter().find(|(n, _)| n == name).map_or("", |(_, who)| who)
    }

    /// All of it, as report.json holds it.
    pub fn to_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|figures| {
                let row = figures.row();
                let peers: Vec<Value> = figures
                    .samples
                    .iter()
                    .map(|(name, sample)| {
                        let range = sample.range();
                        json!({
                            "name": name,
                            "runs": sample.runs,
                            "median": sample.median(),
                            "min": range.map(|r| r.0),
                            "max": range.map(|r| r.1),
                        })
                    })
                    .collect();
                let goals: Vec<Value> = figures
                    .judged()
                    .iter()
                    .map(|j| json!({"of": j.goal.of.unwrap_or(row.ours), "against": j.goal.against, "limit": j.goal.limit, "value": j.value, "verdict": j.verdict.mark()}))
                    .collect();
                json!({
                    "id": figures.id,
                    "title": row.title,
                    "unit": unit_name(row.unit),
                    "ours": row.ours,
                    "peers": peers,
                    "goals": goals,
                    "steal_percent": figures.steal_percent,
                })
            })
            .collect();
        let left_out: Vec<Value> = self.left_out.iter().map(|(n, w)| json!({"name": n, "why": w})).collect();
        let holds: Vec<Value> = self.holds_for.iter().map(|(n, w)| json!({"name": n, "who": w})).collect();
        json!({
            "version": 1, "machine": self.machine, "tree": self.tree, "holds_for": holds, "left_out": left_out,
            "rows": rows,
        })
    }

    /// Reads what [`Figures::to_json`] wrote. Rows that exist no longer are dropped.
    pub fn from_json(value: &Value) -> Result<Self> {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let rows = list(&value["rows"])
            .iter()
            .filter(|row| table::all().any(|known| row["id"] == known.id))
            .map(|row| RowFigures {
                id: text(&row["id"]),
                samples: list(&row["peers"])
                    .iter()
                    .map(|peer| {
                        let runs = list(&peer["runs"]).iter().filter_map(Value::as_f64).collect();
                        (text(&peer["name"]), Sample { runs })
                    })
                    .collect(),
                steal_percent: row["steal_percent"].as_f64().unwrap_or(0.0),
            })
            .collect();
        if value["version"] != 1 {
            return Err(format!("report.json has version {}, expected 1", value["version"]).into());
        }
        Ok(Self {
            machine: value["machine"].clone(),
            tree: text(&value["tree"]),
            holds_for: list(&value["holds_for"])
                .iter()
                .map(|h| (text(&h["name"]), text(&h["who"])))
                .collect(),
            left_out: list(&value["left_out"]).iter().map(|l| (text(&l["name"]), text(&l["why"]))).collect(),
            rows,
        })
    }
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Seconds => "seconds",
        Unit::CpuSeconds => "CPU seconds",
        Unit::PerSecond => "reads per second",
        Unit::Megabytes => "megabytes",
        Unit::Count => "count",
        Unit::Percent => "percent",
    }
}

/// A value as people read it: three digits and a unit.
pub fn value(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds | Unit::CpuSeconds if value < 0.1 => format!("{} ms", digits(value * 1e3)),
        Unit::Seconds | Unit::CpuSeconds => format!("{} s", digits(value)),
        Unit::PerSecond if value >= 1e3 => format!("{}k/s", digits(value / 1e3)),
        Unit::PerSecond => format!("{}/s", digits(value)),
        Unit::Megabytes => format!("{} MB", digits(value)),
        Unit::Count => digits(value),
        Unit::Percent => format!("{}\u{202f}%", digits(value)),
    }
}

/// Three significant digits, at most two of them after the point.
pub fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Prints the table.
pub fn print(figures: &Figures) {
    println!(
        "\n{:<34}{:<27}{:<20}{:>10}  {:<19}{:>9}{:>12}",
        "", "", "for", "median", "min .. max", "× kernel", "× squashfuse"
    );
    for row in &figures.rows {
        let unit = row.row().unit;
        for (n, (name, sample)) in row.samples.iter().enumerate() {
            let (Some(median), Some((min, max))) = (sample.median(), sample.range()) else { continue };
            let times = |peer: &str| row.times(median, peer);
            println!(
                "{:<34}{:<27}{:<20}{:>10}  {:<19}{:>9}{:>12}",
                if n == 0 { row.row().title } else { "" },
                name,
                figures.who(row.row(), name),
                value(median, unit),
                format!("{} .. {}", value(min, unit), value(max, unit)),
                times(KERNEL),
                times(SQUASHFUSE),
            );
        }
        for judged in row.judged() {
            println!("{:<34}{}", "", goal_text(&judged, unit));
        }
    }
    for (name, why) in &figures.left_out {
        println!("left out: {name}: {why}");
    }
}

/// A goal in words.
pub fn goal_text(judged: &Judged, unit: Unit) -> String {
    let sign = if unit.more_is_better() { "≥" } else { "≤" };
    let mark =
        judged.verdict.mark().to_string() + &judged.goal.of.map_or(String::new(), |of| format!(" {of}:"));
    match judged.goal.against {
        Some(peer) => {
            format!("{mark} {} of {peer} (goal {sign} {})", digits(judged.value), digits(judged.goal.limit))
        }
        None => {
            format!("{mark} {} (goal {sign} {})", value(judged.value, unit), value(judged.goal.limit, unit))
        }
    }
}
