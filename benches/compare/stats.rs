//! Medians and spreads.

/// What several runs of one measurement gave, in the unit of its row.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Every run, in the order in which they were made.
    pub runs: Vec<f64>,
}

impl Sample {
    /// The median; of an even number of runs, the mean of the two in the middle. None without runs.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            n if n % 2 == 1 => Some(sorted[middle]),
            _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        }
    }

    /// What the middle half of the runs lies between: the first and third quartile, of the runs themselves.
    pub fn middle_half(&self) -> Option<(f64, f64)> {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let quarter = sorted.len() / 4;
        Some((*sorted.get(quarter)?, *sorted.get(sorted.len().checked_sub(1 + quarter)?)?))
    }

    /// The smallest and the largest run.
    pub fn range(&self) -> Option<(f64, f64)> {
        let min = self.runs.iter().copied().min_by(f64::total_cmp)?;
        let max = self.runs.iter().copied().max_by(f64::total_cmp)?;
        Some((min, max))
    }
}

/// A generator of numbers that is the same in each run (xorshift64*).
pub struct Random(u64);

impl Random {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}
