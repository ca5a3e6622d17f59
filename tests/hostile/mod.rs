//! Files of others, damaged or meant badly: what was found once, and what chance finds.

mod formats;
mod found;
mod mutation;
mod mutator;
