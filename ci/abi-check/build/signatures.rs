//! The signatures in `table.rs`, as questions to a C compiler about the headers' prototypes.

use std::fmt::Write;

/// C statements that print `signature NAME 1` where the header's prototype is compatible.
pub fn in_c(table: &str) -> String {
    let mut c = String::new();
    let mut count = 0;
    for line in table.lines() {
        let Some((name, rest)) = line.trim().strip_suffix(';').and_then(|l| l.split_once(": fn(")) else {
            continue;
        };
        let (arguments, result) = rest.rsplit_once(')').expect("a closed list of arguments");
        // An optional function is listed with the symbol that it is exported as.
        let symbol = name.split('"').nth(1).unwrap_or(name);
        let result = result.trim().strip_prefix("->").map_or("void".into(), |ty| c_type(ty.trim()));
        let arguments: Vec<String> =
            arguments.split(',').filter(|a| !a.trim().is_empty()).map(|a| c_type(a.trim())).collect();
        let arguments = if arguments.is_empty() { "void".into() } else { arguments.join(", ") };
        let _ = writeln!(
            c,
            "  printf(\"signature {symbol} %d\\n\", __builtin_types_compatible_p(__typeof__(&{symbol}), {result} (*)({arguments})));"
        );
        count += 1;
    }
    assert!(count > 40, "table.rs was not understood");
    c
}

fn c_type(rust: &str) -> String {
    if let Some(target) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(target));
    }
    if let Some(target) = rust.strip_prefix("*const ") {
        return format!("const {} *", c_type(target));
    }
    match rust {
        "c_int" => "int".into(),
        "c_uint" => "unsigned int".into(),
        "c_char" => "char".into(),
        "c_void" => "void".into(),
        "usize" => "size_t".into(),
        "isize" => "ssize_t".into(),
        "u8" | "u16" | "u32" | "u64" => format!("uint{}_t", &rust[1..]),
        "ibv_gid" => "union ibv_gid".into(),
        "ibv_wr_opcode" | "ibv_fork_status" => format!("enum {rust}"),
        _ if rust.starts_with("__") => rust.into(),
        _ => format!("struct {rust}"),
    }
}
