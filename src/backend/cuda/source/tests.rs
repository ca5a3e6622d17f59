use super::*;

#[test]
fn a_signature_is_read() {
    let text = "// KERNEL in a comment\nKERNEL __launch_bounds__(ROWS * (WARP)) f(bf16* y, const float* /*or null*/ b,\n u32 n, float eps) {}";
    let found = signatures("f.cu", text).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "f");
    let kinds: Vec<_> = found[0].parameters.iter().map(|p| (p.name.as_str(), p.kind.clone())).collect();
    let pointer = |element: usize, mutable, nullable| Kind::Pointer { element: &ELEMENTS[element], mutable, nullable };
    assert_eq!(
        kinds,
        [
            ("y", pointer(0, true, false)),
            ("b", pointer(1, false, true)),
            ("n", Kind::Number(&NUMBERS[0])),
            ("eps", Kind::Number(&NUMBERS[2])),
        ]
    );
    let launcher = launchers("f.cu", "F", &found);
    assert!(launcher.contains("b: Option<&DeviceBuffer<f32>>") && launcher.contains("y: &mut DeviceBuffer<bf16>"));
    assert!(
        trampolines(&found)
            .contains("f(*reinterpret_cast<bf16**>(args + 0), *reinterpret_cast<const float**>(args + 1)")
    );
}

#[test]
fn a_kernel_that_does_not_wait_is_refused_by_name() {
    let waits = "KERNEL f(u32 n) {\n    after_previous();\n    if (n) return;\n}\n";
    assert_eq!(expect_waits("f.cu", waits), Ok(()));
    let error = expect_waits("f.cu", &format!("{waits}KERNEL __launch_bounds__(N * (2)) g(float* y) {{ *y = 1; }}"))
        .unwrap_err();
    assert_eq!(error, "kernels/f.cu: g: expected `after_previous();` as its first statement");
}

#[test]
fn a_struct_is_taken_by_name_and_lies_as_in_c() {
    let text = "struct P {\n    u32 rows; // before a pointer\n    bf16* /*or null*/ y;\n    const float* x;\n    u32 m, n;\n    float eps;\n};\n\
                KERNEL f(const __grid_constant__ P p, u32 k) {}\nKERNEL g(const P p) {}";
    let found = signatures("f.cu", text).unwrap();
    let trampolines = trampolines(&found);
    let places = [("rows", 0), ("y", 8), ("x", 16), ("m", 24), ("n", 28), ("eps", 32)];
    assert_eq!(trampolines.matches("sizeof(P) == 40").count(), 1);
    for (field, at) in places {
        assert!(trampolines.contains(&format!("__builtin_offsetof(P, {field}) == {at}")), "{trampolines}");
    }
    assert!(trampolines.contains("f(*reinterpret_cast<P*>(args + 0), *reinterpret_cast<u32*>(args + 5))"));
    let launchers = launchers("f.cu", "F", &found);
    assert!(
        launchers.contains("Result<[u64; 5]>") && launchers.contains("put(&mut words, 28, narrow(\"n\", self.n)?)")
    );
    assert!(launchers.contains("y: Option<&'a mut DeviceBuffer<bf16>>") && launchers.contains("m: usize,"));
    assert_eq!(launchers.matches("struct P<'a>").count(), 1);
}

#[test]
fn anything_else_is_refused() {
    for wrong in [
        "KERNEL f(int n) {}",
        "KERNEL f(double* x) {}",
        "KERNEL f(bf16 x) {}",
        "KERNEL f(u32 n",
        "KERNEL (u32 n) {}",
        "KERNEL f(const P p) {}",
        "struct P { int n; }; KERNEL f(const P p) {}",
        "struct P { bf16* y, z; }; KERNEL f(const P p) {}",
    ] {
        assert!(signatures("f.cu", wrong).is_err(), "{wrong}");
    }
    assert!(signatures("f.cu", "KERNEL f(u32 n) { __shared__ float x[4]; }").is_err());
}

#[test]
fn a_header_is_inlined_once_and_lines_stay_true() {
    let read = |name: &str| if name == "a.h" { Ok("int a;\n".to_string()) } else { Err(format!("no {name}")) };
    let text = inline("k.cu", "#include \"a.h\"\nint b;\n#include \"a.h\"\nint c;\n", &mut Vec::new(), &read).unwrap();
    assert_eq!(
        text,
        "#line 1 \"kernels/k.cu\"\n#line 1 \"kernels/a.h\"\nint a;\n#line 2 \"kernels/k.cu\"\nint b;\n\nint c;\n"
    );
    assert_eq!(
        inline("k.cu", "\n#include \"b.h\"\n", &mut Vec::new(), &read),
        Err("kernels/k.cu:2: no b.h".to_string())
    );
}
