//! How long work shows itself.

/// Hears of every stage and how far it has come; what it does with that is the caller's affair.
pub(crate) trait Watch {
    /// A stage begins; `total` is its number of units, 0 if unknown.
    fn begin(&mut self, stage: &str, total: usize);

    /// So many units are done; `note` says what matters now.
    fn at(&mut self, done: usize, note: &str);

    /// The stage is over; one line that stays.
    fn end(&mut self, result: &str);

    /// One line that belongs to no stage.
    fn note(&mut self, line: &str);
}
