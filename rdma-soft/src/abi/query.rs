//! What the device, its port and its tables are.

use std::ffi::{c_char, c_int};
use std::mem::offset_of;

use verbs_sys::*;

use super::context::context_data;
use super::object::{minus_one, zeroed};
use super::{cq, qp, srq};
use crate::device::{Device, MAX_GROUPS, MAX_KEYS, MAX_MEMBERS, MAX_QUEUE_PAIRS, Moderation, eui64, mac_of};
use crate::proto::{Counter, MAX_MESSAGE};

/// Every port attribute that depends on nothing follows the kernel's Soft-RoCE (`rxe_param.h`).
pub(crate) const PORT: u8 = 1;
/// Entries of the GID table; more than are in use, as everywhere.
pub(crate) const GID_COUNT: usize = 16;
/// READ and atomic requests of a queue pair at a time, either way.
pub(crate) const MAX_RD_ATOMIC: u8 = 128;
const PKEY: u16 = 0xffff;
/// `IB_UVERBS_DEVICE_ATOMIC_WRITE` of the kernel's `ib_user_verbs.h`; libibverbs has no name of its own for it.
const DEVICE_ATOMIC_WRITE: u64 = 1 << 40;
const PHYS_STATE_LINK_UP: u8 = 5;
/// `IBV_LINK_LAYER_ETHERNET`, in the type of its field.
const LINK_LAYER_ETHERNET: u8 = 2;

/// A count of a constant as C has it.
fn int(n: usize) -> c_int {
    c_int::try_from(n).unwrap_or(c_int::MAX)
}

fn device_attr(device: &Device) -> ibv_device_attr {
    type Cap = ibv_device_cap_flags;
    let capabilities = Cap::IBV_DEVICE_BAD_PKEY_CNTR
        | Cap::IBV_DEVICE_BAD_QKEY_CNTR
        | Cap::IBV_DEVICE_CURR_QP_STATE_MOD
        | Cap::IBV_DEVICE_SYS_IMAGE_GUID
        | Cap::IBV_DEVICE_RC_RNR_NAK_GEN
        | Cap::IBV_DEVICE_SRQ_RESIZE
        | Cap::IBV_DEVICE_MEM_WINDOW
        | Cap::IBV_DEVICE_MEM_MGT_EXTENSIONS
        | Cap::IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    let mut attr: ibv_device_attr = zeroed();
    let version = concat!(env!("CARGO_PKG_VERSION"), "\0");
    for (to, from) in attr.fw_ver.iter_mut().zip(version.bytes()) {
        *to = from as c_char;
    }
    let guid = u64::from_ne_bytes(eui64(mac_of(device.address)));
    attr.node_guid = guid;
    attr.sys_image_guid = guid;
    attr.max_mr_size = u64::MAX;
    attr.page_size_cap = 0xffff_f000;
    attr.vendor_id = 0xff_ffff;
    attr.max_qp = int(MAX_QUEUE_PAIRS);
    attr.max_qp_wr = qp::MAX_WR.cast_signed();
    attr.device_cap_flags = capabilities.0;
    attr.max_sge = int(qp::MAX_SGE);
    attr.max_sge_rd = int(qp::MAX_SGE);
    attr.max_cq = int(MAX_KEYS);
    attr.max_cqe = cq::MAX_CQE.cast_signed();
    attr.max_mr = int(MAX_KEYS);
    attr.max_pd = int(MAX_KEYS);
    attr.max_qp_rd_atom = c_int::from(MAX_RD_ATOMIC);
    attr.max_res_rd_atom = 0x3_f000;
    attr.max_qp_init_rd_atom = c_int::from(MAX_RD_ATOMIC);
    // Atomics of the device are atomic instructions of the processor.
    attr.atomic_cap = ibv_atomic_cap::IBV_ATOMIC_GLOB;
    attr.max_mw = int(MAX_KEYS);
    attr.max_mcast_grp = int(MAX_GROUPS);
    attr.max_mcast_qp_attach = int(MAX_MEMBERS);
    attr.max_total_mcast_qp_attach = int(MAX_GROUPS * MAX_MEMBERS);
    attr.max_ah = int(MAX_KEYS);
    attr.max_srq = int(MAX_QUEUE_PAIRS);
    attr.max_srq_wr = srq::MAX_SRQ_WR.cast_signed();
    attr.max_srq_sge = srq::MAX_SRQ_SGE.cast_signed();
    attr.max_pkeys = 1;
    attr.local_ca_ack_delay = 15;
    attr.phys_port_cnt = 1;
    attr
}

pub(crate) unsafe extern "C" fn query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    // SAFETY: and a pointer that is valid for writes.
    unsafe { attr.write(device_attr(&data.device)) };
    0
}

/// Memory is never pinned, so on-demand paging is what happens anyway. Ranges must be named, though.
fn odp_caps() -> ibv_odp_caps {
    type Cap = ibv_odp_transport_cap_bits;
    let datagram =
        Cap::IBV_ODP_SUPPORT_SEND.0 | Cap::IBV_ODP_SUPPORT_RECV.0 | Cap::IBV_ODP_SUPPORT_SRQ_RECV.0;
    let one_sided =
        Cap::IBV_ODP_SUPPORT_WRITE.0 | Cap::IBV_ODP_SUPPORT_READ.0 | Cap::IBV_ODP_SUPPORT_ATOMIC.0;
    let mut caps = ibv_odp_caps {
        general_caps: u64::from(ibv_odp_general_caps::IBV_ODP_SUPPORT.0),
        ..Default::default()
    };
    caps.per_transport_caps.rc_odp_caps = datagram | one_sided;
    caps.per_transport_caps.uc_odp_caps = datagram | Cap::IBV_ODP_SUPPORT_WRITE.0;
    caps.per_transport_caps.ud_odp_caps = datagram;
    caps
}

pub(crate) unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    attr_size: usize,
) -> c_int {
    // SAFETY: the caller passes null or a valid input.
    if !input.is_null() && unsafe { (*input).comp_mask } != 0 {
        return libc::EINVAL;
    }
    if attr_size < offset_of!(ibv_device_attr_ex, comp_mask) {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let mut told: ibv_device_attr_ex = zeroed();
    told.orig_attr = device_attr(&data.device);
    told.odp_caps = odp_caps();
    told.completion_timestamp_mask = u64::MAX;
    told.cq_mod_caps =
        ibv_cq_moderation_caps { max_cq_count: cq::MAX_MODERATED, max_cq_period: Moderation::MAX_PERIOD };
    // Timestamps count nanoseconds; this is in kHz.
    told.hca_core_clock = 1_000_000;
    told.device_cap_flags_ex = u64::from(told.orig_attr.device_cap_flags) | DEVICE_ATOMIC_WRITE;
    told.phys_port_cnt_ex = 1;
    // SAFETY: the caller passes room for `attr_size` bytes, and the smaller of both sizes is copied.
    unsafe { super::object::copy_prefix(&told, attr.cast(), attr_size) };
    0
}

fn port_attr(device: &Device) -> ibv_port_attr {
    let mut attr: ibv_port_attr = zeroed();
    attr.state = ibv_port_state::IBV_PORT_ACTIVE;
    attr.max_mtu = ibv_mtu::IBV_MTU_4096;
    attr.active_mtu = ibv_mtu(device.active_mtu as u32 + 1);
    attr.gid_tbl_len = int(GID_COUNT);
    attr.port_cap_flags =
        ibv_port_cap_flags::IBV_PORT_CM_SUP.0 | ibv_port_cap_flags::IBV_PORT_IP_BASED_GIDS.0;
    attr.max_msg_sz = MAX_MESSAGE;
    // Counters of a port stay at their highest value.
    let count = |counter| u32::try_from(device.total(counter)).unwrap_or(u32::MAX);
    attr.bad_pkey_cntr = count(Counter::DropPkey);
    attr.qkey_viol_cntr = count(Counter::DropQkey);
    attr.pkey_tbl_len = 1;
    attr.max_vl_num = 1;
    attr.active_width = 1;
    attr.active_speed = 1;
    attr.phys_state = PHYS_STATE_LINK_UP;
    attr.link_layer = LINK_LAYER_ETHERNET;
    attr
}

pub(crate) unsafe extern "C" fn query_port_ex(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    attr_size: usize,
) -> c_int {
    if port != PORT {
        return libc::EINVAL;
    }
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let told = port_attr(&data.device);
    // SAFETY: the caller passes room for `attr_size` bytes, and the smaller of both sizes is copied.
    unsafe { super::object::copy_prefix(&told, attr.cast(), attr_size) };
    0
}

/// The exported function knows the structure as it was before `port_cap_flags2`.
pub(crate) unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    const OLD_SIZE: usize = offset_of!(ibv_port_attr, flags);
    // SAFETY: the same contract, with the old size.
    unsafe { query_port_ex(context, port, attr.cast(), OLD_SIZE) }
}

pub(crate) unsafe extern "C" fn query_gid(
    context: *mut ibv_context,
    port: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let Some(index) = usize::try_from(index).ok().filter(|index| port == PORT && *index < GID_COUNT) else {
        return minus_one(libc::EINVAL);
    };
    // An entry that is not in use is all zeros.
    let raw = data.device.gid(index).map_or([0; 16], |address| address.octets());
    // SAFETY: the caller passes a pointer that is valid for writes; a GID is bytes to some.
    unsafe { gid.write_unaligned(ibv_gid { raw }) };
    0
}

fn gid_entry(device: &Device, index: usize) -> Option<ibv_gid_entry> {
    Some(ibv_gid_entry {
        gid: ibv_gid { raw: device.gid(index)?.octets() },
        gid_index: u32::try_from(index).ok()?,
        port_num: u32::from(PORT),
        gid_type: ib_uverbs_gid_type::IB_UVERBS_GID_TYPE_ROCE_V2.0,
        ndev_ifindex: device.interface_index,
    })
}

pub(crate) unsafe extern "C" fn query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    entry_size: usize,
) -> c_int {
    if port != u32::from(PORT) {
        return libc::EINVAL;
    }
    if flags != 0 {
        return libc::EOPNOTSUPP;
    }
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let Some(told) = gid_entry(&data.device, index as usize) else {
        return if index as usize >= GID_COUNT { libc::EINVAL } else { libc::ENODATA };
    };
    // SAFETY: the caller passes room for `entry_size` bytes, and the smaller of both sizes is copied.
    unsafe { super::object::copy_prefix(&told, entry.cast(), entry_size) };
    0
}

/// The number of entries, or a negative errno.
pub(crate) unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    entry_size: usize,
) -> isize {
    if flags != 0 {
        return -(libc::EOPNOTSUPP as isize);
    }
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let in_use = (0..GID_COUNT).filter_map(|index| gid_entry(&data.device, index));
    let mut count = 0;
    for told in in_use {
        if count == max_entries {
            return -(libc::EINVAL as isize);
        }
        let place = entries.cast::<u8>().wrapping_add(count * entry_size);
        // SAFETY: the caller passes room for `max_entries` entries of `entry_size` bytes each.
        unsafe { super::object::copy_prefix(&told, place, entry_size) };
        count += 1;
    }
    isize::try_from(count).unwrap_or(0)
}

pub(crate) unsafe extern "C" fn query_pkey(
    _context: *mut ibv_context,
    port: u8,
    index: c_int,
    pkey: *mut __be16,
) -> c_int {
    if port != PORT || index != 0 {
        return minus_one(libc::EINVAL);
    }
    // SAFETY: the caller passes a pointer that is valid for writes.
    unsafe { *pkey = PKEY.to_be() };
    0
}

pub(crate) unsafe extern "C" fn get_pkey_index(_context: *mut ibv_context, port: u8, pkey: __be16) -> c_int {
    if port == PORT && u16::from_be(pkey) == PKEY { 0 } else { minus_one(libc::ENOENT) }
}

/// `man ibv_query_rt_values_ex`: the clock of completion timestamps.
pub(crate) unsafe extern "C" fn query_rt_values(
    context: *mut ibv_context,
    values: *mut ibv_values_ex,
) -> c_int {
    const CLOCK: u32 = ibv_values_mask::IBV_VALUES_MASK_RAW_CLOCK.0;
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    // SAFETY: and valid values, which nobody else uses meanwhile.
    let values = unsafe { &mut *values };
    let wanted = values.comp_mask & CLOCK;
    values.comp_mask = wanted;
    if wanted != 0 {
        let now = data.device.clock();
        values.raw_clock = timespec {
            tv_sec: i64::try_from(now / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(now % 1_000_000_000).unwrap_or(0),
        };
    }
    0
}
