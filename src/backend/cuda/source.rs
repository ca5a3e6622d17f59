//! Kernel sources as text: headers inlined, `extern "C"` signatures read, launchers and trampolines written from them.
//!
//! Shared with `build.rs`, so it uses nothing of the crate. The grammar is narrow on purpose; anything else is an error.

use std::fmt::Write as _;

/// A file of `kernels/`, embedded.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// `norm.cu`
    pub file: &'static str,
    /// Headers inlined, with `#line`; compiled by NVRTC as it is, and by a C++ compiler with ARES_SIM.
    pub text: &'static str,
    pub kernels: &'static [&'static str],
}

/// One kernel's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub name: String,
    pub(crate) parameters: Vec<Parameter>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// What a kernel may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// `T*` (mutable), `const T*`; `/*or null*/` after it makes it optional.
    Pointer { element: String, mutable: bool, nullable: bool },
    /// A number by value.
    Number(String),
}

/// C++ name and Rust name of what a pointer may point to.
const ELEMENTS: &[(&str, &str)] = &[("bf16", "bf16"), ("float", "f32"), ("u32", "u32")];
/// C++ name, Rust name, and how it becomes an argument word.
const NUMBERS: &[(&str, &str, &str)] =
    &[("u32", "u32", "u64::from({})"), ("u64", "u64", "{}"), ("float", "f32", "u64::from({}.to_bits())")];

/// `text` with every `#include "name"` replaced by what `read` gives for it, once; `#line` keeps messages true.
pub fn inline(file: &str, text: &str, read: &mut dyn FnMut(&str) -> Result<String, String>) -> Result<String, String> {
    let mut done = Vec::new();
    expand(file, text, read, &mut done)
}

fn expand(
    file: &str,
    text: &str,
    read: &mut dyn FnMut(&str) -> Result<String, String>,
    done: &mut Vec<String>,
) -> Result<String, String> {
    let mut out = format!("#line 1 \"kernels/{file}\"\n");
    for (number, line) in text.lines().enumerate() {
        let include = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match include {
            Some(name) if done.iter().any(|d| d == name) => out.push('\n'),
            Some(name) => {
                done.push(name.to_string());
                let body = read(name).map_err(|e| format!("kernels/{file}:{}: {e}", number + 1))?;
                out.push_str(&expand(name, &body, read, done)?);
                // Writing to a String cannot fail.
                let _ = writeln!(out, "#line {} \"kernels/{file}\"", number + 2);
            }
            None if line.trim() == "#pragma once" => out.push('\n'),
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    Ok(out)
}

/// The kernels of one file.
pub fn signatures(file: &str, text: &str) -> Result<Vec<Signature>, String> {
    let clean = without_comments(text);
    if file.ends_with(".cu") && clean.contains("__shared__") {
        return Err(format!("kernels/{file}: expected shared_memory<Shared>(), found __shared__"));
    }
    let mut found = Vec::new();
    let mut rest = clean.as_str();
    while let Some(at) = rest.find("KERNEL ") {
        rest = &rest[at + "KERNEL ".len()..];
        let end = rest.find('{').ok_or_else(|| format!("kernels/{file}: a KERNEL without a body"))?;
        found.push(signature(&rest[..end]).map_err(|e| format!("kernels/{file}: {e}"))?);
        rest = &rest[end..];
    }
    Ok(found)
}

/// Blanks comments, keeping `/*or null*/`.
fn without_comments(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        out.push_str(line.split("//").next().unwrap_or(""));
        out.push('\n');
    }
    let mut clean = String::new();
    let mut rest = out.as_str();
    while let Some(at) = rest.find("/*") {
        let end = rest[at..].find("*/").map_or(rest.len(), |e| at + e + 2);
        clean.push_str(&rest[..at]);
        if &rest[at..end] == "/*or null*/" {
            clean.push_str(" __or_null ");
        }
        rest = &rest[end..];
    }
    clean + rest
}

/// `[__launch_bounds__(…)] name(type name, …)`
fn signature(text: &str) -> Result<Signature, String> {
    let mut head = text.trim();
    if let Some(rest) = head.strip_prefix("__launch_bounds__(") {
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        head = rest[end.ok_or("an open __launch_bounds__")? + 1..].trim();
    }
    let open = head.find('(').ok_or_else(|| format!("no parameters in `{head}`"))?;
    let name = head[..open].trim();
    let inner = head[open + 1..].trim().strip_suffix(')').ok_or_else(|| format!("{name}: parameters do not end"))?;
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("`{name}` is no kernel's name"));
    }
    let parameters = inner.split(',').map(|p| parameter(p.trim()).map_err(|e| format!("{name}: {e}")));
    Ok(Signature { name: name.to_string(), parameters: parameters.collect::<Result<_, _>>()? })
}

fn parameter(text: &str) -> Result<Parameter, String> {
    let fault = || format!("`{text}`: expected `const T* name`, `T* name`, `T* /*or null*/ name` or `number name`");
    let spaced = text.replace('*', " * ");
    let mut words: Vec<&str> = spaced.split_whitespace().collect();
    let name = words.pop().ok_or_else(fault)?.to_string();
    let nullable = words.last() == Some(&"__or_null");
    if nullable {
        words.pop();
    }
    let kind = match words[..] {
        ["const", element, "*"] if known(element) => {
            Kind::Pointer { element: element.into(), mutable: false, nullable }
        }
        [element, "*"] if known(element) => Kind::Pointer { element: element.into(), mutable: true, nullable },
        [number] if !nullable && NUMBERS.iter().any(|n| n.0 == number) => Kind::Number(number.into()),
        _ => return Err(fault()),
    };
    Ok(Parameter { name, kind })
}

fn known(element: &str) -> bool {
    ELEMENTS.iter().any(|e| e.0 == element)
}

/// What the simulator calls: one function per kernel that unpacks the argument words.
pub fn trampolines(signatures: &[Signature]) -> String {
    let mut out = String::from("#ifdef ARES_SIM\n");
    for s in signatures {
        let unpack = s.parameters.iter().enumerate().map(|(i, p)| match &p.kind {
            Kind::Pointer { element, mutable: true, .. } => format!("*reinterpret_cast<{element}**>(args + {i})"),
            Kind::Pointer { element, .. } => format!("*reinterpret_cast<const {element}**>(args + {i})"),
            Kind::Number(number) => format!("*reinterpret_cast<{number}*>(args + {i})"),
        });
        let list = unpack.collect::<Vec<_>>().join(", ");
        // Writing to a String cannot fail.
        let _ = writeln!(out, "extern \"C\" void sim_{}(u64* args) {{ {}({list}); }}", s.name, s.name);
    }
    out.push_str("#endif\n");
    out
}

/// The typed Rust launcher of one kernel; `SOURCE` is the name of its file's static.
pub fn launcher(file: &str, source: &str, s: &Signature) -> String {
    let rust = |element: &str| ELEMENTS.iter().find(|e| e.0 == element).map_or("", |e| e.1).to_string();
    let (mut parameters, mut words) = (String::new(), String::new());
    for p in &s.parameters {
        let name = &p.name;
        let (kind, word) = match &p.kind {
            Kind::Pointer { element, mutable, nullable } => {
                let buffer = format!("&{}DeviceBuffer<{}>", if *mutable { "mut " } else { "" }, rust(element));
                if *nullable {
                    (format!("Option<{buffer}>"), format!("{name}.map_or(0, |b| b.address())"))
                } else {
                    (buffer, format!("{name}.address()"))
                }
            }
            Kind::Number(number) => {
                let (_, kind, word) = NUMBERS.iter().find(|n| n.0 == number).copied().unwrap_or_default();
                (kind.to_string(), word.replace("{}", name))
            }
        };
        let _ = writeln!(parameters, "    {name}: {kind},");
        let _ = writeln!(words, "        {word},");
    }
    let name = &s.name;
    format!(
        "/// `{name}` of `kernels/{file}`.\n///\n/// # Safety\n/// Shapes were checked: the kernel stays within every buffer.\n\
         pub(crate) unsafe fn {name}(\n    cuda: &Cuda,\n    defines: &[Define],\n    config: LaunchConfig,\n{parameters}) -> Result<()> {{\n    \
         let mut args = [\n{words}    ];\n    // SAFETY: the words are this signature's, in its order; the rest is the caller's promise.\n    \
         unsafe {{ cuda.launch(&{source}, \"{name}\", defines, config, &mut args) }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_read() {
        let text = "// KERNEL in a comment\nKERNEL __launch_bounds__(ROWS * (WARP)) f(bf16* y, const float* /*or null*/ b,\n u32 n, float eps) {}";
        let found = signatures("f.cu", text).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "f");
        let kinds: Vec<_> = found[0].parameters.iter().map(|p| (p.name.as_str(), p.kind.clone())).collect();
        let pointer = |element: &str, mutable, nullable| Kind::Pointer { element: element.into(), mutable, nullable };
        assert_eq!(
            kinds,
            [
                ("y", pointer("bf16", true, false)),
                ("b", pointer("float", false, true)),
                ("n", Kind::Number("u32".into())),
                ("eps", Kind::Number("float".into())),
            ]
        );
        let launcher = launcher("f.cu", "F", &found[0]);
        assert!(launcher.contains("b: Option<&DeviceBuffer<f32>>") && launcher.contains("y: &mut DeviceBuffer<bf16>"));
        assert!(trampolines(&found).contains("f(*reinterpret_cast<bf16**>(args + 0), "));
    }

    #[test]
    fn anything_else_is_refused() {
        for wrong in [
            "KERNEL f(int n) {}",
            "KERNEL f(double* x) {}",
            "KERNEL f(bf16 x) {}",
            "KERNEL f(u32 n",
            "KERNEL (u32 n) {}",
        ] {
            assert!(signatures("f.cu", wrong).is_err(), "{wrong}");
        }
        assert!(signatures("f.cu", "KERNEL f(u32 n) { __shared__ float x[4]; }").is_err());
    }

    #[test]
    fn a_header_is_inlined_once_and_lines_stay_true() {
        let mut read = |name: &str| if name == "a.h" { Ok("int a;\n".to_string()) } else { Err(format!("no {name}")) };
        let text = inline("k.cu", "#include \"a.h\"\nint b;\n#include \"a.h\"\nint c;\n", &mut read).unwrap();
        assert_eq!(
            text,
            "#line 1 \"kernels/k.cu\"\n#line 1 \"kernels/a.h\"\nint a;\n#line 2 \"kernels/k.cu\"\nint b;\n\nint c;\n"
        );
        assert_eq!(inline("k.cu", "\n#include \"b.h\"\n", &mut read), Err("kernels/k.cu:2: no b.h".to_string()));
    }
}
