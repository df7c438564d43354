//! What a command logs, on stderr: warnings; with `-v`, also what it tries again and why.

use log::{LevelFilter, Log, Metadata, Record};

use super::{Global, output};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates log requests with their headers.
        metadata.target().starts_with("mosfs")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            output::message(record.args());
        }
    }

    fn flush(&self) {}
}

/// Shows the log of this command from now on.
pub(super) fn show(global: &Global) {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(if global.verbose > 0 { LevelFilter::Info } else { LevelFilter::Warn });
    }
}
