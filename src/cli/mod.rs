//! Commands: what was typed becomes valid options and one call.
