//! All rows of the report, from the modules that have them.

use std::path::Path;

use crate::Result;
use crate::fixture::Fixture;
use crate::rows::{self, Row};
use crate::{containers, largest, mounts, registry, system};

/// All rows, in the order of the report.
pub fn all() -> impl Iterator<Item = &'static Row> {
    rows::ROWS
        .iter()
        .chain(largest::ROWS)
        .chain(mounts::ROWS)
        .chain(system::ROWS)
        .chain(registry::ROWS)
        .chain(containers::ROWS)
}

/// The programs of a row that compares no file systems.
pub fn programs(row: &Row) -> &'static [&'static str] {
    if largest::has(row) {
        largest::programs(row)
    } else if mounts::has(row) {
        mounts::programs(row)
    } else if system::has(row) {
        system::programs(row)
    } else if registry::has(row) {
        registry::programs(row)
    } else if containers::has(row) {
        containers::programs(row)
    } else {
        rows::programs(row)
    }
}

/// One run of a program of such a row. None where it is not installed.
pub fn run_program(row: &Row, name: &str, fixture: &Fixture, mosfs: &Path) -> Result<Option<f64>> {
    if largest::has(row) {
        largest::run(row, name, fixture, mosfs)
    } else if mounts::has(row) {
        mounts::run(row, name, fixture, mosfs)
    } else if system::has(row) {
        system::run(row, name, fixture, mosfs)
    } else if registry::has(row) {
        registry::run(row, name, fixture, mosfs)
    } else if containers::has(row) {
        containers::run(row, name, fixture, mosfs)
    } else {
        rows::run_program(row, name, fixture, mosfs)
    }
}
