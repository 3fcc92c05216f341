//! The bindings have the layout that was measured with a C compiler against libibverbs 44.

#![cfg(all(target_arch = "x86_64", target_env = "gnu"))]

use core::mem::offset_of;
use std::collections::BTreeMap;

use verbs_sys::*;

/// `offsets-libibverbs-44.txt`: lines `struct NAME size S align A`, each followed by its `FIELD off O size S`.
const MEASURED: &str = include_str!("offsets-libibverbs-44.txt");

/// A structure: size and alignment. A field (`structure.field`): offset and size.
type Facts = BTreeMap<String, (usize, usize)>;

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The facts of the bindings, about the structures and fields that the file names.
macro_rules! facts {
    ($($name:ident $(: $($($field:ident).+),+)?;)*) => {{
        let mut facts = Facts::new();
        $(
            facts.insert(stringify!($name).to_owned(), (size_of::<$name>(), align_of::<$name>()));
            $($(
                let path = [stringify!($name), $(stringify!($field)),+].join(".");
                let offset = offset_of!($name, $($field).+);
                facts.insert(path, (offset, size_of_field(|s: &$name| &s.$($field).+)));
            )+)?
        )*
        facts
    }};
}

fn ours() -> Facts {
    facts! {
        ibv_device: node_type, transport_type, name, dev_name, dev_path, ibdev_path;
        ibv_context: device, ops, ops.alloc_mw, ops.bind_mw, ops.dealloc_mw, ops.poll_cq, ops.req_notify_cq, ops.post_srq_recv, ops.post_send, ops.post_recv, ops._compat_query_device, ops._compat_query_port, ops._compat_async_event, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat;
        verbs_context: query_port, advise_mr, alloc_null_mr, read_counters, attach_counters_point_flow, create_counters, destroy_counters, reg_dm_mr, alloc_dm, free_dm, modify_flow_action_esp, destroy_flow_action, create_flow_action_esp, modify_qp_rate_limit, alloc_parent_domain, dealloc_td, alloc_td, modify_cq, post_srq_ops, destroy_rwq_ind_table, create_rwq_ind_table, destroy_wq, modify_wq, create_wq, query_rt_values, create_cq_ex, priv_, query_device_ex, ibv_destroy_flow, ABI_placeholder2, ibv_create_flow, ABI_placeholder1, open_qp, create_qp_ex, get_srq_num, create_srq_ex, open_xrcd, close_xrcd, _ABI_placeholder3, sz, context;
        ibv_qp: context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond, events_completed;
        ibv_qp_ex: comp_mask, wr_id, wr_flags, wr_atomic_cmp_swp, wr_atomic_fetch_add, wr_bind_mw, wr_local_inv, wr_rdma_read, wr_rdma_write, wr_rdma_write_imm, wr_send, wr_send_imm, wr_send_inv, wr_send_tso, wr_set_ud_addr, wr_set_xrc_srqn, wr_set_inline_data, wr_set_inline_data_list, wr_set_sge, wr_set_sge_list, wr_start, wr_complete, wr_abort, wr_atomic_write;
        ibv_cq: channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed;
        ibv_cq_ex: comp_mask, status, wr_id, start_poll, next_poll, end_poll, read_opcode, read_vendor_err, read_byte_len, read_imm_data, read_qp_num, read_src_qp, read_wc_flags, read_slid, read_sl, read_dlid_path_bits, read_completion_ts, read_cvlan, read_flow_tag, read_tm_info, read_completion_wallclock_ns;
        ibv_pd;
        ibv_mr: lkey, rkey;
        ibv_mw;
        ibv_srq;
        ibv_ah;
        ibv_comp_channel: fd, refcnt;
        ibv_wc;
        ibv_send_wr: wr, qp_type;
        ibv_recv_wr;
        ibv_sge;
        ibv_device_attr;
        ibv_device_attr_ex;
        ibv_port_attr;
        ibv_qp_attr;
        ibv_qp_init_attr;
        ibv_qp_init_attr_ex;
        ibv_cq_init_attr_ex;
        ibv_gid_entry;
        ibv_ah_attr;
        ibv_async_event;
        ibv_poll_cq_attr;
        ibv_data_buf;
    }
}

fn measured() -> Facts {
    let mut facts = Facts::new();
    let mut structure = "";
    for line in MEASURED.lines() {
        let number = |word: &str| -> usize { word.parse().expect("a number") };
        let words: Vec<&str> = line.split_whitespace().collect();
        let (path, fact) = match words[..] {
            ["struct", name, "size", size, "align", align] => {
                structure = name;
                (name.to_owned(), (number(size), number(align)))
            }
            // `priv` is a keyword in Rust.
            [field, "off", offset, "size", size] => {
                let field = if field == "priv" { "priv_" } else { field };
                (format!("{structure}.{field}"), (number(offset), number(size)))
            }
            _ => panic!("not understood: {line}"),
        };
        assert_eq!(facts.insert(path, fact), None, "twice: {line}");
    }
    facts
}

#[test]
fn every_measured_fact_holds() {
    let (ours, measured) = (ours(), measured());
    assert_eq!(measured.len(), MEASURED.lines().count(), "one fact a line");
    for (path, fact) in &measured {
        assert_eq!(ours.get(path), Some(fact), "{path}");
    }
    assert_eq!(ours.len(), measured.len(), "facts that the file does not have");
}
