//! One folder per operation: formula, shape check, cost and both directions; the CPU reference beside it.
