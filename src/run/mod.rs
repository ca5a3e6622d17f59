//! Run directory, journal, and the whole method from end to end.
