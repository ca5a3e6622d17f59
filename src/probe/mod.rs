//! Search for prompts that expose coupled failures.
