//! Outcomes, measures with their intervals, gates.
