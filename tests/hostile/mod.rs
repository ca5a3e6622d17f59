//! Files of others, damaged or meant badly: what was found once, and what chance finds.

mod found;
mod mutation;
mod mutator;
