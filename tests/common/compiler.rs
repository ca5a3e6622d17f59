//! What tests compile for themselves.

use std::path::Path;
use std::process::Command;

/// Makes a library of C++ source; false where there is no compiler, or refused with ARES_REQUIRE_SIM=1.
pub fn shared_library(source: &Path, library: &Path) -> bool {
    let compiler = std::env::var("CXX").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".into());
    let mut command = Command::new(compiler);
    match command.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"]).arg(library).arg(source).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(reason) => {
            assert!(std::env::var_os("ARES_REQUIRE_SIM").is_none(), "no C++ compiler: {reason}");
            println!("skipped: no C++ compiler ({reason})");
            return false;
        }
    }
    true
}
