//! `report.html`: one page that needs nothing else. Bars for each row, and all rows at one glance.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::report::{Figures, RowFigures, Verdict, digits, goal_text, value};
use crate::rows::{KERNEL, OURS, SQUASHFUSE, USER, Unit};

/// Text made safe to stand in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Writes the page and the figures into `dir`: `report.html` and `report.json`.
pub fn write(dir: &Path, figures: &Figures) -> Result<()> {
    fs::write(dir.join("report.json"), format!("{:#}\n", figures.to_json()))?;
    fs::write(dir.join("report.html"), html(figures))?;
    Ok(())
}

/// The whole page.
fn html(figures: &Figures) -> String {
    let mut page = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    page += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>mosfs beside its peers</title>\n<style>\n";
    page += include_str!("page.css");
    page += "</style></head>\n<body><main>\n";
    header(&mut page, figures);
    overview(&mut page, figures);
    page += "<h2>Row by row</h2>\n<p class=\"soft\">Bars are medians, dots are single runs, the thin line goes from the fastest to the slowest. \
             The dashed line is the goal for mosfs against the kernel.</p>\n<div class=\"grid\">\n";
    for row in &figures.rows {
        card(&mut page, row);
    }
    page += "</div>\n";
    table(&mut page, figures);
    page += "</main></body></html>\n";
    page
}

fn header(page: &mut String, figures: &Figures) {
    let judged: Vec<_> = figures.rows.iter().flat_map(RowFigures::judged).collect();
    let count = |verdict| judged.iter().filter(|j| j.verdict == verdict).count();
    let (reached, near) = (count(Verdict::Reached), count(Verdict::Near));
    let machine = &figures.machine;
    let text = |value: &Value| match value {
        Value::String(text) => escape(text),
        Value::Null => "?".into(),
        other => other.to_string(),
    };
    let steal = figures.rows.iter().map(|row| row.steal_percent).fold(0.0, f64::max);
    let _ = write!(
        page,
        "<h1>mosfs beside its peers</h1>\n<p>mosfs verifies every block that is read, in user space; the others here verify nothing. \
         {reached} of {} goals are reached; for {near} more the goal lies within the spread of the runs (≈).</p>\n",
        judged.len()
    );
    let _ = writeln!(
        page,
        "<p class=\"soft\">{}. {} × {}{}{}, {} GiB, Linux {}, Debian {}. At most {}&#8239;% of the CPU time was stolen in any row. {}, commit {}.</p>",
        escape(&figures.tree),
        text(&machine["cores"]),
        text(&machine["cpu"]),
        if machine["sha_ni"] == true { " with SHA instructions" } else { " without SHA instructions" },
        if machine["virtual"] == true { ", a virtual machine" } else { "" },
        text(&machine["memory_gib"]),
        text(&machine["kernel"]),
        text(&machine["debian"]),
        digits(steal),
        text(&machine["date"]),
        text(&machine["commit"]),
    );
    page.push_str(
        "<p class=\"soft\">Every figure says for whom it holds. Where it says nothing else, root mounts and reads; mosfs then keeps \
         idle cores awake while requests come in quick succession, where that pays (<code>--spin=auto</code>). With <code>--spin=never</code>, \
         and for an ordinary user, it does not. Goals are for root; those for a user begin with the name.</p>\n",
    );
    let tools: Vec<String> = machine["tools"]
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, version)| version.is_string())
        .map(|(name, version)| format!("{} {}", escape(name), text(version)))
        .collect();
    let _ = writeln!(page, "<p class=\"soft\">{}</p>", tools.join(" · "));
    for (name, why) in &figures.left_out {
        let _ = writeln!(page, "<p class=\"miss\">Left out: {}: {}</p>", escape(name), escape(why));
    }
}

/// The peers of the glance, and how they are drawn.
const GLANCE: &[(&str, &str)] =
    &[(OURS, "ours"), (USER, "ours hollow"), (SQUASHFUSE, "hollow"), ("kernel erofs", "solid")];

fn mark(out: &mut String, kind: &str, x: f64, y: f64) {
    let _ = match kind {
        "ours" => write!(out, "<circle class=\"ours\" cx=\"{x:.1}\" cy=\"{y}\" r=\"6\"/>"),
        "ours hollow" => write!(out, "<circle class=\"user\" cx=\"{x:.1}\" cy=\"{y}\" r=\"5\"/>"),
        "hollow" => write!(out, "<circle class=\"hollow\" cx=\"{x:.1}\" cy=\"{y}\" r=\"4.5\"/>"),
        _ => write!(
            out,
            "<rect class=\"solid\" x=\"{:.1}\" y=\"{}\" width=\"8\" height=\"8\" transform=\"rotate(45 {x:.1} {y})\"/>",
            x - 4.0,
            y - 4.0
        ),
    };
}

/// All rows that have the kernel in them, as time in terms of the kernel's, on a logarithmic axis.
fn overview(page: &mut String, figures: &Figures) {
    let rows: Vec<&RowFigures> = figures
        .rows
        .iter()
        .filter(|row| matches!(row.row().unit, Unit::Seconds | Unit::CpuSeconds | Unit::PerSecond))
        .filter(|row| row.median(KERNEL).is_some())
        .collect();
    if rows.is_empty() {
        return;
    }
    // Reads per second are turned round, so that left is faster everywhere.
    let relative = |row: &RowFigures, name: &str| -> Option<f64> {
        let ratio = row.median(name)? / row.median(KERNEL)?;
        Some(if row.row().unit == Unit::PerSecond { 1.0 / ratio } else { ratio })
    };
    let (low, high): (f64, f64) = (0.05, 20.0);
    let (left, right, pitch, top) = (230.0, 1090.0, 26.0, 30.0);
    let x = |ratio: f64| left + (right - left) * (ratio.clamp(low, high) / low).ln() / (high / low).ln();
    let bottom = top + pitch * rows.len() as f64;
    let mut svg = format!(
        "<svg viewBox=\"0 0 1120 {}\" role=\"img\" aria-label=\"Time of each row in terms of the kernel's squashfs\">",
        bottom + 12.0
    );
    for tick in [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0] {
        let class = if tick == 1.0 { "one" } else { "axis" };
        let label = if tick == 1.0 { "kernel = 1".into() } else { tick.to_string() };
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{top}\" y2=\"{bottom}\"/><text class=\"soft\" x=\"{0:.1}\" y=\"18\" text-anchor=\"middle\">{label}</text>",
            x(tick)
        );
    }
    for (n, row) in rows.iter().enumerate() {
        let y = top + pitch * (n as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            left - 14.0,
            y + 4.0,
            escape(row.row().title)
        );
        if let Some(ours) = relative(row, OURS) {
            let _ = write!(
                svg,
                "<line class=\"span\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y}\" y2=\"{y}\"/>",
                x(ours),
                x(1.0)
            );
        }
        for (name, kind) in GLANCE.iter().rev() {
            if let Some(ratio) = relative(row, name) {
                let _ = write!(svg, "<g><title>{}: {}</title>", escape(name), digits(ratio));
                mark(&mut svg, kind, x(ratio), y);
                svg += "</g>";
            }
        }
    }
    svg += "</svg>";
    page.push_str("<h2>At a glance: time in terms of the kernel's own squashfs, further left is faster</h2>\n<div class=\"card\"><div class=\"key\">");
    for (name, kind) in GLANCE {
        page.push_str("<span><svg viewBox=\"0 0 14 12\">");
        mark(page, kind, 7.0, 6.0);
        let _ = write!(
            page,
            "</svg>{}</span>",
            escape(match *name {
                OURS => "mosfs, verified, root",
                USER => "mosfs, verified, an ordinary user",
                name => name,
            })
        );
    }
    let _ = writeln!(page, "</div><div class=\"scroll\">{svg}</div></div>");
}

fn card(page: &mut String, figures: &RowFigures) {
    let row = figures.row();
    let _ = write!(page, "<section class=\"card\"><h3>{}</h3><p>{}</p>", escape(row.title), escape(row.text));
    let judged = figures.judged();
    if !judged.is_empty() {
        page.push_str("<ul class=\"goals\">");
        for one in &judged {
            let class = match one.verdict {
                Verdict::Reached => "good",
                Verdict::Near => "near",
                Verdict::Missed => "miss",
            };
            let _ = write!(page, "<li class=\"{class}\">{}</li>", escape(&goal_text(one, row.unit)));
        }
        page.push_str("</ul>");
    }
    bars(page, figures);
    page.push_str("</section>\n");
}

/// How far the axis goes: what is far beyond ours and the baseline is cut, and says so.
fn axis_end(figures: &RowFigures) -> f64 {
    let medians = figures.samples.iter().filter_map(|(_, sample)| sample.range().map(|r| r.1));
    let largest = medians.fold(0.0, f64::max);
    let baseline =
        figures.row().goals.iter().filter_map(|goal| goal.against).filter_map(|peer| figures.median(peer));
    let near = baseline.chain(figures.median(figures.row().ours)).fold(0.0, f64::max);
    if near > 0.0 { largest.min(near * 3.0) } else { largest }
}

fn bars(page: &mut String, figures: &RowFigures) {
    let row = figures.row();
    // Room for the longest name, at some 7 units a letter, but never more than half of the card.
    let longest = figures.samples.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let left = (16.0 + 7.0 * longest as f64).clamp(118.0, 280.0);
    let (right, pitch) = (410.0, 30.0);
    let end = axis_end(figures);
    let x = |value: f64| left + (right - left) * if end > 0.0 { (value / end).min(1.0) } else { 0.0 };
    let bottom = 6.0 + pitch * figures.samples.len() as f64;
    let _ = write!(
        page,
        "<svg viewBox=\"0 0 560 {}\" role=\"img\" aria-label=\"{}\">",
        bottom + 18.0,
        escape(row.title)
    );
    let _ = write!(page, "<line class=\"axis\" x1=\"{left}\" x2=\"{left}\" y1=\"4\" y2=\"{bottom}\"/>");
    for (n, (name, sample)) in figures.samples.iter().enumerate() {
        let (Some(median), Some((min, max))) = (sample.median(), sample.range()) else { continue };
        let y = 6.0 + pitch * (n as f64 + 0.5);
        let class = if name.starts_with(OURS) { "ours" } else { "other" };
        let name_class = if name == row.ours { "name ours" } else { "name" };
        let _ = write!(
            page,
            "<text class=\"{name_class}\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            y + 4.0,
            escape(name)
        );
        let _ = write!(
            page,
            "<g><title>{}: {} runs, {} .. {}</title><rect class=\"{class}\" x=\"{left}\" y=\"{}\" width=\"{:.1}\" height=\"16\" rx=\"2\"/>",
            escape(name),
            sample.runs.len(),
            value(min, row.unit),
            value(max, row.unit),
            y - 8.0,
            (x(median) - left).max(1.0)
        );
        if median > end {
            // Two strokes through the end of a bar that goes on.
            let _ = write!(
                page,
                "<path d=\"M{0:.1} {1} l6 -20 M{2:.1} {1} l6 -20\" stroke=\"var(--card)\" stroke-width=\"3\"/>",
                right - 22.0,
                y + 10.0,
                right - 14.0
            );
        } else {
            let _ = write!(
                page,
                "<line class=\"whisker\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y}\" y2=\"{y}\"/>",
                x(min),
                x(max)
            );
            for run in &sample.runs {
                let _ = write!(page, "<circle class=\"run\" cx=\"{:.1}\" cy=\"{y}\" r=\"2.4\"/>", x(*run));
            }
        }
        let _ = write!(
            page,
            "</g><text x=\"482\" y=\"{}\" text-anchor=\"end\">{}</text>",
            y + 4.0,
            value(median, row.unit)
        );
        let base = row.goals.iter().find_map(|goal| figures.median(goal.against?));
        if let Some(base) = base {
            let _ = write!(
                page,
                "<text class=\"soft\" x=\"548\" y=\"{}\" text-anchor=\"end\">× {}</text>",
                y + 4.0,
                digits(median / base)
            );
        }
    }
    let goal = row.goals.first().and_then(|goal| match goal.against {
        Some(peer) => Some(figures.median(peer)? * goal.limit),
        None => Some(goal.limit),
    });
    if let Some(goal) = goal.filter(|goal| *goal <= end) {
        let _ = write!(
            page,
            "<line class=\"goal\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"2\" y2=\"{bottom}\"/><text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\" style=\"fill:var(--goal);font-size:11px\">goal</text>",
            x(goal),
            bottom + 13.0
        );
    }
    page.push_str("</svg>");
}

fn table(page: &mut String, figures: &Figures) {
    page.push_str("<h2>Figures</h2>\n<div class=\"card scroll\"><table><tr><th>Row</th><th>Peer</th><th>For</th><th>Median</th><th>Min</th><th>Max</th><th>Runs</th><th>× kernel</th><th>× squashfuse_ll</th><th>Stolen</th></tr>\n");
    for row in &figures.rows {
        let unit = row.row().unit;
        for (n, (name, sample)) in row.samples.iter().enumerate() {
            let (Some(median), Some((min, max))) = (sample.median(), sample.range()) else { continue };
            let times = |peer: &str| row.times(median, peer);
            let _ = writeln!(
                page,
                "<tr><td>{}</td><td class=\"{}\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                if n == 0 { escape(row.row().title) } else { String::new() },
                if name.starts_with(OURS) { "ours" } else { "" },
                escape(name),
                escape(figures.who(row.row(), name)),
                value(median, unit),
                value(min, unit),
                value(max, unit),
                sample.runs.len(),
                times(KERNEL),
                times(SQUASHFUSE),
                if n == 0 { format!("{}&#8239;%", digits(row.steal_percent)) } else { String::new() },
            );
        }
    }
    page.push_str("</table></div>\n");
}
