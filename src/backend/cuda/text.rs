//! What a kernel file says: embedded in the program, or with `ARES_KERNELS=DIR` read from that folder, so that a kernel's
//! author need not build the program anew.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use super::source::{Source, inline, signatures, trampolines};
use crate::error::{Error, Result};

/// The text to compile. With a folder its file is read at each call; launchers are compiled in, so signatures must not differ.
pub(crate) fn text(source: &'static Source, folder: Option<&Path>) -> Result<Cow<'static, str>> {
    let Some(folder) = folder else { return Ok(Cow::Borrowed(source.text)) };
    let path = folder.join(source.file);
    let read = |path: &Path| fs::read_to_string(path).map_err(Error::read(path));
    let remedy = "name a copy of the program's kernels/ folder with ARES_KERNELS, or unset it";
    let fault = |found: String| Error::file(&path, "kernels in CUDA C++ with all their headers", remedy)(found);
    let body = read(&path)?;
    let header = |header: &str| read(&folder.join(header)).map_err(|e| e.to_string());
    let inlined = inline(source.file, &body, &mut Vec::new(), &header);
    let inlined = inlined.map_err(fault)?;
    let trampolines = trampolines(&signatures(source.file, &body).map_err(fault)?);
    // The embedded text ends with the trampolines of the signatures that the program's launchers were made from.
    if !source.text.ends_with(&trampolines) {
        let expected = "the kernels and signatures that the program was built with";
        return Err(Error::file(&path, expected, "build ares anew to change a signature")("others"));
    }
    Ok(Cow::Owned(inlined + &trampolines))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::backend::cuda::kernels::SOURCES;
    use crate::error::refused;

    #[test]
    fn a_folder_takes_the_place_of_what_is_embedded() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let folder = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").args(["-R", "."]).arg(folder.path()).current_dir(&kernels).status();
        assert!(copied.unwrap().success());
        for source in SOURCES {
            assert_eq!(text(source, None).unwrap(), source.text);
            assert_eq!(text(source, Some(&kernels)).unwrap(), source.text, "{}", source.file);
            let path = folder.path().join(source.file);
            let body = fs::read_to_string(&path).unwrap();
            fs::write(&path, format!("// other\n{body}")).unwrap();
            assert!(text(source, Some(folder.path())).unwrap().contains("// other\n"));
            fs::write(&path, format!("{body}KERNEL another(u32 n) {{}}\n")).unwrap();
            refused(text(source, Some(folder.path())), "build ares anew");
            fs::write(&path, body).unwrap();
        }
        fs::remove_file(folder.path().join("device.cuh")).unwrap();
        assert!(text(SOURCES[0], Some(folder.path())).is_err());
    }
}
