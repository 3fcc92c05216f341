//! The types and constants of `bindings.rs`, and the questions about them.

use std::collections::BTreeMap;
use std::fmt::Write;

use syn::{ImplItem, Item, Type};

/// A structure or union: its fields in order, each with its type's last name.
#[derive(Default)]
struct Shape {
    is_union: bool,
    fields: Vec<(String, String)>,
}

#[derive(Default)]
pub struct Bindings {
    shapes: BTreeMap<String, Shape>,
    /// Constants, with the enum that they belong to and whether they are of a newtype.
    constants: Vec<Constant>,
}

pub struct Constant {
    name: String,
    /// The enum; `None` for an anonymous one or a macro.
    of: Option<String>,
    is_newtype: bool,
}

fn last_name(ty: &Type) -> String {
    match ty {
        Type::Path(path) => path.path.segments.last().expect("a path has segments").ident.to_string(),
        _ => String::new(),
    }
}

/// Fields that bindgen renamed because their C name is a keyword of Rust.
fn c_name(field: &str) -> &str {
    match field {
        "type_" => "type",
        "priv_" => "priv",
        other => other,
    }
}

fn is_anonymous(name: &str) -> bool {
    name.starts_with("__bindgen_anon_")
}

/// How a crate spells what the headers name.
pub trait Dialect {
    fn has_type(&self, _name: &str) -> bool {
        true
    }
    fn constant(&self, constant: &Constant) -> Option<String>;
    /// The field's name; `None` where it cannot be named.
    fn field<'a>(&self, _of: &str, field: &'a str) -> Option<&'a str> {
        Some(field)
    }
}

impl Bindings {
    pub fn read(source: &str) -> Bindings {
        let mut found = Bindings::default();
        let file = syn::parse_file(source).expect("bindings.rs is Rust");
        for item in file.items {
            match item {
                Item::Struct(item) => {
                    let fields = item
                        .fields
                        .iter()
                        .filter_map(|f| Some((f.ident.as_ref()?.to_string(), last_name(&f.ty))));
                    found
                        .shapes
                        .insert(item.ident.to_string(), Shape { is_union: false, fields: fields.collect() });
                }
                Item::Union(item) => {
                    let fields = item
                        .fields
                        .named
                        .iter()
                        .filter_map(|f| Some((f.ident.as_ref()?.to_string(), last_name(&f.ty))));
                    found
                        .shapes
                        .insert(item.ident.to_string(), Shape { is_union: true, fields: fields.collect() });
                }
                Item::Const(item) if item.ident != "_" => found.constants.push(Constant {
                    name: item.ident.to_string(),
                    of: None,
                    is_newtype: last_name(&item.ty).starts_with("_bindgen_ty"),
                }),
                Item::Impl(item) if item.trait_.is_none() => {
                    for constant in item.items {
                        if let ImplItem::Const(constant) = constant {
                            let of = Some(last_name(&item.self_ty));
                            found.constants.push(Constant {
                                name: constant.ident.to_string(),
                                of,
                                is_newtype: true,
                            });
                        }
                    }
                }
                _ => {}
            }
        }
        assert!(found.shapes.len() > 100 && found.constants.len() > 300, "bindings.rs was not understood");
        found
    }

    /// The named types that have fields (bindgen gives opaque ones a placeholder).
    fn types(&self) -> impl Iterator<Item = (&String, &Shape)> {
        self.shapes.iter().filter(|(name, shape)| {
            let unnamed = name.contains("__bindgen_ty") || name.starts_with("_bindgen_ty");
            !unnamed
                && !shape.fields.is_empty()
                && !["_unused", "_address"].contains(&shape.fields[0].0.as_str())
        })
    }

    /// Paths to all fields, those of unnamed members included.
    fn paths(&self, shape: &Shape) -> Vec<Vec<String>> {
        let mut paths = Vec::new();
        for (field, ty) in &shape.fields {
            if !is_anonymous(field) {
                paths.push(vec![field.clone()]);
            }
            if ty.contains("__bindgen_ty") {
                for mut inner in self.paths(&self.shapes[ty]) {
                    inner.insert(0, field.clone());
                    paths.push(inner);
                }
            }
        }
        paths
    }

    /// Each field as its key, which is its C spelling, and its path in Rust.
    fn fields(&self, shape: &Shape) -> Vec<(String, Vec<String>)> {
        let key = |path: &[String]| {
            path.iter().filter(|f| !is_anonymous(f)).map(|f| c_name(f)).collect::<Vec<_>>().join(".")
        };
        self.paths(shape).into_iter().map(|path| (key(&path), path)).collect()
    }

    pub fn in_c(&self) -> String {
        let mut c = String::new();
        for (name, shape) in self.types() {
            let ty = format!("{} {name}", if shape.is_union { "union" } else { "struct" });
            let _ = writeln!(c, "  printf(\"size {name} %zu\\n\", sizeof({ty}));");
            let _ = writeln!(c, "  printf(\"align {name} %zu\\n\", _Alignof({ty}));");
            for (key, _) in self.fields(shape) {
                let _ = writeln!(c, "  printf(\"offset {name}.{key} %zu\\n\", offsetof({ty}, {key}));");
                let _ = writeln!(c, "  printf(\"length {name}.{key} %zu\\n\", sizeof((({ty} *)0)->{key}));");
            }
        }
        for Constant { name, .. } in &self.constants {
            let _ = writeln!(c, "  printf(\"constant {name} %lld\\n\", (long long){name});");
        }
        c
    }

    /// A block that inserts into `facts`, for a module with the crate's names in scope.
    pub fn in_rust(&self, dialect: &dyn Dialect) -> String {
        let mut rust = String::from("{\n");
        for (name, shape) in self.types().filter(|(name, _)| dialect.has_type(name)) {
            let _ = writeln!(rust, "facts.insert(\"size {name}\", size_of::<{name}>() as i128);");
            let _ = writeln!(rust, "facts.insert(\"align {name}\", align_of::<{name}>() as i128);");
            for (key, path) in self.fields(shape) {
                let path: Option<Vec<_>> = path.iter().map(|f| dialect.field(name, f)).collect();
                let Some(path) = path.map(|path| path.join(".")) else { continue };
                let _ = writeln!(
                    rust,
                    "facts.insert(\"offset {name}.{key}\", offset_of!({name}, {path}) as i128);
                     facts.insert(\"length {name}.{key}\", length(|s: &{name}| unsafe {{ &s.{path} }}));"
                );
            }
        }
        for constant in &self.constants {
            if let Some(value) = dialect.constant(constant) {
                let _ = writeln!(rust, "facts.insert(\"constant {}\", {value} as i128);", constant.name);
            }
        }
        rust.push('}');
        rust
    }
}

/// verbs-sys.
pub struct Ours;

impl Dialect for Ours {
    fn constant(&self, constant: &Constant) -> Option<String> {
        let path = match &constant.of {
            Some(of) => format!("{of}::{}", constant.name),
            None => constant.name.clone(),
        };
        Some(if constant.is_newtype { format!("{path}.0") } else { path })
    }
}

/// rdma-sys 0.3.0, which reads the headers with an older bindgen and its own choices, and spells
/// structures with unions by hand.
pub struct RdmaSys;

impl Dialect for RdmaSys {
    fn has_type(&self, name: &str) -> bool {
        name.starts_with("ibv_") || name.starts_with("verbs_")
    }

    fn field<'a>(&self, of: &str, field: &'a str) -> Option<&'a str> {
        Some(match (of, field) {
            // Its fields are private.
            ("ibv_ops_wr", _) => return None,
            ("ibv_send_wr", "invalidate_rkey") => "invalidated_rkey",
            ("ibv_wc", "__bindgen_anon_1") => "imm_data_invalidated_rkey_union",
            ("ibv_send_wr", "__bindgen_anon_1") => "imm_data_invalidated_rkey_union",
            ("ibv_send_wr", "__bindgen_anon_2") => "bind_mw_tso_union",
            ("ibv_flow_spec", "__bindgen_anon_1") => "ibv_flow_spec_union",
            _ => field,
        })
    }

    fn constant(&self, constant: &Constant) -> Option<String> {
        // It takes no anonymous enums and no macros.
        let of = constant.of.as_deref().filter(|of| of.starts_with("ibv_"))?;
        let name = &constant.name;
        Some(if NEWTYPES.contains(&of) {
            format!("{of}::{name}.0")
        } else if IN_A_SCOPE.contains(&of) {
            format!("{of}::{name}")
        } else {
            name.clone()
        })
    }
}

/// Enums that rdma-sys makes newtypes.
const NEWTYPES: &[&str] = &[
    "ibv_device_cap_flags",
    "ibv_odp_transport_cap_bits",
    "ibv_odp_general_caps",
    "ibv_rx_hash_function_flags",
    "ibv_rx_hash_fields",
    "ibv_raw_packet_caps",
    "ibv_tm_cap_flags",
    "ibv_pci_atomic_op_size",
    "ibv_port_cap_flags",
    "ibv_port_cap_flags2",
    "ibv_create_cq_wc_flags",
    "ibv_wc_flags",
    "ibv_access_flags",
    "ibv_xrcd_init_attr_mask",
    "ibv_rereg_mr_flags",
    "ibv_srq_attr_mask",
    "ibv_srq_init_attr_mask",
    "ibv_wq_init_attr_mask",
    "ibv_wq_flags",
    "ibv_wq_attr_mask",
    "ibv_ind_table_init_attr_mask",
    "ibv_qp_init_attr_mask",
    "ibv_qp_create_flags",
    "ibv_qp_create_send_ops_flags",
    "ibv_qp_open_attr_mask",
    "ibv_qp_attr_mask",
    "ibv_send_flags",
    "ibv_ops_flags",
    "ibv_cq_attr_mask",
    "ibv_flow_flags",
    "ibv_flow_action_esp_mask",
    "ibv_cq_init_attr_mask",
    "ibv_create_cq_attr_flags",
    "ibv_parent_domain_init_attr_mask",
    "ibv_read_counters_flags",
    "ibv_values_mask",
];

/// Enums that rdma-sys makes a module of constants, and one that it makes a Rust enum.
const IN_A_SCOPE: &[&str] = &[
    "ibv_event_type",
    "ibv_node_type",
    "ibv_transport_type",
    "ibv_atomic_cap",
    "ibv_mtu",
    "ibv_port_state",
    "ibv_wc_status",
    "ibv_wc_opcode",
    "ibv_mw_type",
    "ibv_rate",
    "ibv_srq_type",
    "ibv_wq_type",
    "ibv_wq_state",
    "ibv_qp_type",
    "ibv_qp_state",
    "ibv_mig_state",
    "ibv_wr_opcode",
    "ibv_ops_wr_opcode",
    "ibv_flow_attr_type",
    "ibv_flow_spec_type",
    "ibv_counter_description",
    "ibv_rereg_mr_err_code",
];
