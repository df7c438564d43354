//! `make bench`: mosfs beside its peers, on one Debian tree, in interleaved runs.
//!
//! Writes `report.html` (one page, complete in itself) and `report.json`, and prints a table. The peers are
//! in `benches/peers.conf`. Needs root, because the kernel's file systems do.

mod apart;
mod containers;
mod fixture;
mod largest;
mod link;
mod machine;
mod mounts;
mod page;
mod peers;
mod registry;
mod report;
mod rows;
mod scale;
mod stats;
mod system;
mod table;
mod work;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use apart::Apart;
use fixture::Fixture;
use report::{Figures, RowFigures};
use rows::{Files, Row, Who};
use stats::Sample;

/// A result whose error is only ever printed.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Measures mosfs beside its peers.
#[derive(Debug, Parser)]
#[command(name = "compare", max_term_width = 100)]
struct Args {
    /// Only these rows.
    #[arg(long, value_delimiter = ',', value_name = "ROW,…")]
    rows: Vec<String>,
    /// Only these peers.
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    peers: Vec<String>,
    /// Runs of each row; the figure is their median.
    #[arg(long, default_value_t = 7, value_name = "N")]
    runs: usize,
    /// Three runs.
    #[arg(long)]
    quick: bool,
    /// Where the tree and the images are kept.
    #[arg(long, env = "MOSFS_BENCH_DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    dir: PathBuf,
    /// Where the report is written.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    output: PathBuf,
    /// The peers.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers.conf"))]
    config: PathBuf,
    /// The mosfs command.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/release/mosfs"))]
    mosfs: PathBuf,
    /// Write the report anew from report.json, without measuring.
    #[arg(long)]
    report_only: bool,
    /// Make the tree and the images, and stop.
    #[arg(long)]
    prepare: bool,
    /// Measure how cost grows with files, folders and layers instead; `--rows` names cases.
    #[arg(long)]
    scale: bool,
    /// List the rows.
    #[arg(long)]
    list: bool,
    /// Do what stdin says, as a part of another run.
    #[arg(long, hide = true)]
    apart: bool,
    /// Open the image of this layout, as a part of another run.
    #[arg(long, hide = true)]
    open: Option<PathBuf>,
    /// Said by cargo bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.apart {
        return apart::answer();
    }
    if let Some(layout) = &args.open {
        return largest::open(layout);
    }
    if args.list {
        for row in table::all() {
            println!("{:<10} {}", row.id, row.title);
        }
        return Ok(());
    }
    if args.scale {
        fs::create_dir_all(&args.output)?;
        return scale::run(&args.dir, &args.output, &args.mosfs, &args.rows);
    }
    if let Some(unknown) = args.rows.iter().find(|id| !table::all().any(|row| row.id == **id)) {
        return Err(format!("no row '{unknown}'; --list shows them").into());
    }
    fs::create_dir_all(&args.output)?;
    if args.report_only {
        let text = fs::read(args.output.join("report.json"))?;
        return page::write(&args.output, &Figures::from_json(&serde_json::from_slice(&text)?)?);
    }
    let fixture = Fixture::make(&args.dir, &args.mosfs)?;
    if args.prepare {
        return fixture.make_images();
    }
    let figures = measure(args, &fixture)?;
    report::print(&figures);
    page::write(&args.output, &figures)?;
    println!("\n{}", args.output.join("report.html").display());
    Ok(())
}

fn measure(args: &Args, fixture: &Fixture) -> Result<Figures> {
    let mnt = fixture.scratch().with_file_name("mnt");
    fs::create_dir_all(&mnt)?;
    let word = |name: &str| -> Result<Option<String>> {
        let oci = |layout: PathBuf, tag: &str| format!("oci:{}:{tag}", layout.display());
        Ok(Some(match name {
            "mnt" => mnt.display().to_string(),
            "mosfs" => args.mosfs.display().to_string(),
            "squashfs" => fixture.squashfs()?.display().to_string(),
            "erofs" => fixture.erofs()?.display().to_string(),
            "tar" => format!("{}:three", fixture.tar_layout()?.display()),
            "erofs_layer" => oci(fixture.erofs_layers()?, "erofs"),
            "one" | "three" | "twenty" => oci(fixture.layers()?, name),
            "lz4" => oci(fixture.lz4_layers()?, "three"),
            "puzzlefs" => format!("{}:tree", fixture.puzzlefs()?.display()),
            _ => return Ok(None),
        }))
    };
    let chosen: Vec<&Row> =
        table::all().filter(|row| args.rows.is_empty() || args.rows.iter().any(|id| id == row.id)).collect();
    let user = Apart::as_user(&args.dir.canonicalize()?, &fixture.for_others())?;
    let one_core = Apart::on_one_core(&args.dir.canonicalize()?, &mnt, &fixture.entries)?;
    let takes_part = |row: &Row, name: &str, only: &Option<Vec<String>>| {
        let named = only.as_ref().is_some_and(|ids| ids.iter().any(|id| id == row.id));
        match row.who {
            Who::All => only.is_none() || named,
            Who::Named => named,
            Who::NamedAndOurs => named || name == rows::OURS,
            Who::Programs => false,
        }
    };
    let wanted = |name: &str, only: &Option<Vec<String>>| {
        (args.peers.is_empty() || args.peers.iter().any(|n| n == name))
            && chosen.iter().any(|row| takes_part(row, name, only))
    };
    let (peers, unusable) = peers::load(&args.config, &word, user.mnt(), wanted, |peer| {
        if peer.as_user { user.check(peer) } else { apart::check(peer, &mnt, &fixture.entries) }
    })?;
    for peer in &unusable {
        eprintln!("left out: {}: {}", peer.name, peer.why);
    }
    let files = Files::of(&fixture.entries);
    let runs = if args.quick { args.runs.min(3) } else { args.runs };
    let mut figures = Figures {
        machine: machine::describe(),
        tree: fixture.describe(),
        holds_for: peers.iter().map(|peer| (peer.name.clone(), peer.holds_for())).collect(),
        left_out: unusable.into_iter().map(|peer| (peer.name, peer.why)).collect(),
        rows: Vec::new(),
    };
    for row in chosen {
        eprintln!("{}", row.title);
        // Cold means a fresh mount of an image that is in memory.
        fixture.warm()?;
        let ticks = machine::Ticks::now();
        let samples = if row.who == Who::Programs {
            let programs: Vec<_> = table::programs(row).iter().map(|name| (name.to_string(), runs)).collect();
            interleave(&programs, runs.min(3), |n| {
                table::run_program(row, &programs[n].0, fixture, &args.mosfs)
            })?
        } else {
            let part: Vec<&peers::Peer> =
                peers.iter().filter(|peer| takes_part(row, &peer.name, &peer.rows)).collect();
            let names: Vec<_> =
                part.iter().map(|peer| (peer.name.clone(), peer.runs.unwrap_or(usize::MAX))).collect();
            interleave(&names, runs * row.times, |n| {
                if part[n].as_user {
                    user.measure(row.id, part[n])
                } else if row.id == rows::ONE_CORE {
                    one_core.measure(row.id, part[n])
                } else {
                    rows::measure(row, part[n], &mnt, &files)
                }
            })?
        };
        figures.rows.push(RowFigures {
            id: row.id.into(),
            samples,
            steal_percent: ticks.stolen_percent_since(),
        });
    }
    Ok(figures)
}

/// Takes turns: one run of each, then the next round, which begins with another one. `who` is name and most runs.
fn interleave(
    who: &[(String, usize)],
    rounds: usize,
    mut one: impl FnMut(usize) -> Result<Option<f64>>,
) -> Result<Vec<(String, Sample)>> {
    let mut samples: Vec<Sample> = who.iter().map(|_| Sample { runs: Vec::new() }).collect();
    for round in 0..rounds {
        for turn in 0..who.len() {
            let n = (turn + round) % who.len();
            if round < who[n].1
                && let Some(value) = one(n)?
            {
                samples[n].runs.push(value);
            }
        }
    }
    Ok(who.iter().map(|(name, _)| name.clone()).zip(samples).filter(|(_, s)| !s.runs.is_empty()).collect())
}
