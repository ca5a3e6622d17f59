//! Kernel sources as text: headers inlined, `extern "C"` signatures read, launchers and trampolines written from them.
//!
//! Shared with `build.rs`, so it uses nothing of the crate. The grammar is narrow on purpose; anything else is an error.

use std::fmt::Write as _;

#[cfg(test)]
#[path = "source/tests.rs"] // from build.rs, too
mod tests;

/// A file of `kernels/`, embedded.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// `norm.cu`
    pub file: &'static str,
    /// Headers inlined, with `#line`; compiled by NVRTC as it is, and by a C++ compiler with ARES_SIM.
    pub text: &'static str,
    pub kernels: &'static [&'static str],
}

/// A kernel with its parameters, or a struct that it takes by value with its fields: pointers and numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub name: String,
    parameters: Vec<Parameter>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Parameter {
    name: String,
    kind: Kind,
}

/// What a kernel may take.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// `T*` (mutable), `const T*`; `/*or null*/` after it makes it optional.
    Pointer { element: &'static Element, mutable: bool, nullable: bool },
    /// A number by value.
    Number(&'static Number),
    /// `const P`, a struct of the same file. `const __grid_constant__ P` is read too, but then the compiler no longer knows that the
    /// pointers in it point to global memory, and every access becomes a generic one.
    Struct(Signature),
    /// `const __grid_constant__ TensorMap`: the copy engine reads it where the launch put it.
    Map,
}

/// C++ name and Rust name of what a pointer may point to.
type Element = (&'static str, &'static str);
const ELEMENTS: &[Element] = &[("bf16", "bf16"), ("float", "f32"), ("u32", "u32")];
/// C++ name, what the caller gives, and the bytes that the kernel gets.
type Number = (&'static str, &'static str, usize);
const NUMBERS: &[Number] = &[("u32", "usize", 4), ("u64", "u64", 8), ("float", "f32", 4)];

/// `text` with every `#include "name"` replaced by what `read` gives for it, unless it is `done`; `#line` keeps messages true.
pub fn inline(
    file: &str,
    text: &str,
    done: &mut Vec<String>,
    read: &dyn Fn(&str) -> Result<String, String>,
) -> Result<String, String> {
    let mut out = format!("#line 1 \"kernels/{file}\"\n");
    for (number, line) in text.lines().enumerate() {
        let include = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        match include {
            Some(name) if done.iter().any(|d| d == name) => out.push('\n'),
            Some(name) => {
                done.push(name.to_string());
                let body = read(name).map_err(|e| format!("kernels/{file}:{}: {e}", number + 1))?;
                out.push_str(&inline(name, &body, done, read)?);
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

/// Fails on a kernel that does not begin by waiting for the launches before it.
pub fn expect_waits(file: &str, text: &str) -> Result<(), String> {
    for kernel in text.split("KERNEL ").skip(1) {
        let (head, body) = kernel.split_once('{').unwrap_or((kernel, ""));
        if !body.trim_start().starts_with("after_previous();") {
            let name = signature(head, text).map(|signature| signature.name).unwrap_or_default();
            return Err(format!("kernels/{file}: {name}: expected `after_previous();` as its first statement"));
        }
    }
    Ok(())
}

/// The kernels of one file.
pub fn signatures(file: &str, text: &str) -> Result<Vec<Signature>, String> {
    let lines: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let clean = lines.join("\n").replace("/*or null*/", " __or_null ");
    if file.ends_with(".cu") && clean.contains("__shared__") {
        return Err(format!("kernels/{file}: expected shared_memory<Shared>(), found __shared__"));
    }
    let mut found = Vec::new();
    let mut rest = clean.as_str();
    while let Some(at) = rest.find("KERNEL ") {
        rest = &rest[at + "KERNEL ".len()..];
        let end = rest.find('{').ok_or_else(|| format!("kernels/{file}: a KERNEL without a body"))?;
        found.push(signature(&rest[..end], &clean).map_err(|e| format!("kernels/{file}: {e}"))?);
        rest = &rest[end..];
    }
    Ok(found)
}

/// `[__launch_bounds__(…)] name(type name, …)`; `file` holds the structs that it takes.
fn signature(text: &str, file: &str) -> Result<Signature, String> {
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
    let parameters = inner.split(',').map(|p| parameter(p.trim(), file).map_err(|e| format!("{name}: {e}")));
    Ok(Signature { name: name.to_string(), parameters: parameters.collect::<Result<_, _>>()? })
}

fn parameter(text: &str, file: &str) -> Result<Parameter, String> {
    if let Some(name) = text.strip_prefix("const __grid_constant__ TensorMap ") {
        return Ok(Parameter { name: name.trim().into(), kind: Kind::Map });
    }
    let of_struct = text.strip_prefix("const ").map(|rest| rest.strip_prefix("__grid_constant__ ").unwrap_or(rest));
    let of_struct = of_struct.filter(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()));
    let Some(of_struct) = of_struct else { return field(text) };
    let (kind, name) = of_struct.split_once(' ').ok_or_else(|| format!("`{text}`: expected a struct and a name"))?;
    let body = file.split_once(&format!("struct {kind} {{")).and_then(|(_, rest)| rest.split_once('}'));
    let (body, _) = body.ok_or_else(|| format!("`{text}`: expected `struct {kind} {{` in the same file"))?;
    let mut parameters: Vec<Parameter> = Vec::new();
    for declaration in body.split(';').map(str::trim).filter(|declaration| !declaration.is_empty()) {
        // `u32 m, n`: the further names have the first one's type, which must be a number's.
        for (i, part) in declaration.split(',').enumerate() {
            parameters.push(match parameters.last() {
                Some(Parameter { kind: Kind::Number(number), .. }) if i > 0 => {
                    Parameter { name: part.trim().into(), kind: Kind::Number(number) }
                }
                _ => field(part.trim()).map_err(|e| format!("{kind}: {e}"))?,
            });
        }
    }
    Ok(Parameter { name: name.trim().into(), kind: Kind::Struct(Signature { name: kind.into(), parameters }) })
}

fn field(text: &str) -> Result<Parameter, String> {
    let fault = || {
        format!(
            "`{text}`: expected `const T* name`, `T* name`, `T* /*or null*/ name`, `number name` or `const Struct name`"
        )
    };
    let spaced = text.replace('*', " * ");
    let mut words: Vec<&str> = spaced.split_whitespace().collect();
    let name = words.pop().ok_or_else(fault)?.to_string();
    let nullable = words.last() == Some(&"__or_null");
    if nullable {
        words.pop();
    }
    let element = |name| ELEMENTS.iter().find(|e| e.0 == name).ok_or_else(fault);
    let kind = match words[..] {
        ["const", name, "*"] => Kind::Pointer { element: element(name)?, mutable: false, nullable },
        [name, "*"] => Kind::Pointer { element: element(name)?, mutable: true, nullable },
        [name] if !nullable => Kind::Number(NUMBERS.iter().find(|n| n.0 == name).ok_or_else(fault)?),
        _ => return Err(fault()),
    };
    Ok(Parameter { name, kind })
}

impl Kind {
    /// As C++ spells it.
    fn spelled(&self) -> String {
        match self {
            Kind::Pointer { element, mutable, .. } => format!("{}{}*", if *mutable { "" } else { "const " }, element.0),
            Kind::Number(number) => number.0.into(),
            Kind::Struct(params) => params.name.clone(),
            Kind::Map => "TensorMap".into(),
        }
    }

    /// Bytes and, of a single value, alignment.
    fn bytes(&self) -> usize {
        match self {
            Kind::Pointer { .. } => 8,
            Kind::Number(number) => number.2,
            Kind::Struct(params) => params.layout().1,
            Kind::Map => 128,
        }
    }

    /// What the caller gives.
    fn given(&self, lifetime: &str) -> String {
        match self {
            Kind::Pointer { element, mutable, nullable } => {
                let (access, element) = (if *mutable { "mut " } else { "" }, element.1);
                let buffer = format!("&{lifetime}{access}DeviceBuffer<{element}>");
                if *nullable { format!("Option<{buffer}>") } else { buffer }
            }
            Kind::Number(number) => number.1.into(),
            Kind::Struct(params) => format!("&{}", params.name),
            Kind::Map => "&TensorMap".into(),
        }
    }

    /// What the kernel gets of `value`, which messages call `name`.
    fn taken(&self, value: &str, name: &str) -> String {
        match self {
            Kind::Pointer { nullable: true, .. } => format!("{value}.as_ref().map_or(0, |b| b.address())"),
            Kind::Pointer { .. } => format!("{value}.address()"),
            Kind::Number(("u32", ..)) => format!("narrow({name:?}, {value})?"),
            Kind::Number(_) => value.into(),
            Kind::Struct(_) => format!("{value}.words()?"),
            Kind::Map => format!("{value}.words"),
        }
    }
}

impl Signature {
    /// Where each field lies, and bytes in all: as C++ and `repr(C)` have it.
    fn layout(&self) -> (Vec<usize>, usize) {
        let (mut at, mut most) = (0usize, 1);
        let mut place = |bytes: usize| {
            let offset = at.next_multiple_of(bytes);
            (at, most) = (offset + bytes, most.max(bytes));
            offset
        };
        let offsets = self.parameters.iter().map(|field| place(field.kind.bytes())).collect();
        (offsets, at.next_multiple_of(most))
    }

    /// Holds both C++ compilers to `layout`: the size, and each place where `offsetof` is known (not to NVRTC).
    fn assertions(&self) -> (String, String) {
        let (name, (offsets, bytes)) = (&self.name, self.layout());
        let places = self.parameters.iter().zip(offsets);
        let place = |(field, at): (&Parameter, usize)| {
            format!("static_assert(__builtin_offsetof({name}, {0}) == {at}, \"{name}.{0}\");\n", field.name)
        };
        (format!("static_assert(sizeof({name}) == {bytes}, \"{name}\");\n"), places.map(place).collect())
    }

    /// The struct with named, typed fields that callers fill in, and its words as the kernel gets them.
    fn structs(&self, file: &str) -> String {
        let (name, (offsets, bytes)) = (&self.name, self.layout());
        let (mut given, mut places) = (String::new(), String::new());
        for (Parameter { name, kind }, at) in self.parameters.iter().zip(offsets) {
            // Writing to a String cannot fail.
            let _ = writeln!(given, "    pub(crate) {name}: {},", kind.given("'a "));
            let _ = writeln!(places, "        put(&mut words, {at}, {});", kind.taken(&format!("self.{name}"), name));
        }
        let (generic, any) = if given.contains("'a") { ("<'a>", "<'_>") } else { ("", "") };
        let words = bytes.div_ceil(8);
        format!(
            "/// `{name}` of `kernels/{file}`.\npub(crate) struct {name}{generic} {{\n{given}}}\n\n\
             impl {name}{any} {{\n    fn words(&self) -> Result<[u64; {words}]> {{\n        \
             let mut words = [0; {words}];\n{places}        Ok(words)\n    }}\n}}\n\n"
        )
    }
}

/// The structs that a file's kernels take, each once.
fn params(signatures: &[Signature]) -> Vec<&Signature> {
    let mut all: Vec<&Signature> = Vec::new();
    for parameter in signatures.iter().flat_map(|s| &s.parameters) {
        match &parameter.kind {
            Kind::Struct(params) if !all.contains(&params) => all.push(params),
            _ => {}
        }
    }
    all
}

/// What is appended to a file: checks that its structs lie as Rust lays them out and, for the simulator, one function per
/// kernel that unpacks the arguments, each of which begins at a word.
pub fn trampolines(signatures: &[Signature]) -> String {
    let (mut out, places): (String, String) = params(signatures).into_iter().map(Signature::assertions).unzip();
    out.push_str("#ifdef ARES_SIM\n");
    out.push_str(&places);
    for Signature { name, parameters } in signatures {
        let mut at = 0;
        let unpack = parameters.iter().map(|p| {
            let value = format!("*reinterpret_cast<{}*>(args + {at})", p.kind.spelled());
            at += p.kind.bytes().div_ceil(8);
            value
        });
        let list = unpack.collect::<Vec<_>>().join(", ");
        // Writing to a String cannot fail.
        let _ = writeln!(out, "extern \"C\" void sim_{name}(u64* args) {{ {name}({list}); }}");
    }
    out.push_str("#endif\n");
    out
}

/// The typed Rust launchers of one file's kernels and the structs that they take; `source` is the name of the file's static.
pub fn launchers(file: &str, source: &str, signatures: &[Signature]) -> String {
    let mut out: String = params(signatures).iter().map(|params| params.structs(file)).collect();
    for Signature { name, parameters } in signatures {
        let (mut list, mut taken, mut bytes) = (String::new(), String::new(), String::new());
        for Parameter { name, kind } in parameters {
            let word = kind.taken(name, name);
            // Writing to a String cannot fail.
            let _ = writeln!(list, "    {name}: {},", kind.given(""));
            if word != *name {
                let _ = writeln!(taken, "    let {name} = {word};");
            }
            let _ = write!(bytes, "bytes_of(&{name}), ");
        }
        let _ = write!(
            out,
            "/// `{name}` of `kernels/{file}`.\n///\n/// # Safety\n/// Shapes were checked: the kernel stays within every buffer.\n\
             pub(crate) unsafe fn {name}(\n    cuda: &Cuda,\n    defines: &[Define],\n    config: LaunchConfig,\n{list}) -> Result<()> {{\n\
             {taken}    // SAFETY: the arguments are this signature's, in its order; the rest is the caller's promise.\n    \
             unsafe {{ cuda.launch(&{source}, \"{name}\", defines, config, &[{bytes}]) }}\n}}\n"
        );
    }
    out
}
