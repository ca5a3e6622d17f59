//! The joint objective, its optimiser loop, and the methods it is compared with.
