//! Memory, copies, launching. Knows no operation.
