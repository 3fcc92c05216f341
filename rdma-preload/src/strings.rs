//! Functions of a whole libibverbs that need no device: names, rates, sysfs. Only in the drop-in form.

use core::ffi::{c_char, c_int, c_void};
use std::ffi::CStr;
use std::ptr;

use verbs_sys::inline::set_errno;
use verbs_sys::*;

/// Exports a function from a number to a text; unknown numbers have a text too.
macro_rules! texts {
    ($(fn $name:ident($ty:ty) else $unknown:literal { $($value:path => $text:literal,)* })*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(value: $ty) -> *const c_char {
            #[allow(unreachable_patterns, reason = "aliases of one value")]
            let text: &'static CStr = match value {
                $($value => $text,)*
                _ => $unknown,
            };
            text.as_ptr()
        }
    )*};
}

texts! {
    fn ibv_wc_status_str(ibv_wc_status) else c"unknown" {
        ibv_wc_status::IBV_WC_SUCCESS => c"success",
        ibv_wc_status::IBV_WC_LOC_LEN_ERR => c"local length error",
        ibv_wc_status::IBV_WC_LOC_QP_OP_ERR => c"local QP operation error",
        ibv_wc_status::IBV_WC_LOC_EEC_OP_ERR => c"local EE context operation error",
        ibv_wc_status::IBV_WC_LOC_PROT_ERR => c"local protection error",
        ibv_wc_status::IBV_WC_WR_FLUSH_ERR => c"Work Request Flushed Error",
        ibv_wc_status::IBV_WC_MW_BIND_ERR => c"memory bind operation error",
        ibv_wc_status::IBV_WC_BAD_RESP_ERR => c"bad response error",
        ibv_wc_status::IBV_WC_LOC_ACCESS_ERR => c"local access error",
        ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => c"remote invalid request error",
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => c"remote access error",
        ibv_wc_status::IBV_WC_REM_OP_ERR => c"remote operation error",
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR => c"transport retry counter exceeded",
        ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => c"RNR retry counter exceeded",
        ibv_wc_status::IBV_WC_LOC_RDD_VIOL_ERR => c"local RDD violation error",
        ibv_wc_status::IBV_WC_REM_INV_RD_REQ_ERR => c"remote invalid RD request",
        ibv_wc_status::IBV_WC_REM_ABORT_ERR => c"aborted error",
        ibv_wc_status::IBV_WC_INV_EECN_ERR => c"invalid EE context number",
        ibv_wc_status::IBV_WC_INV_EEC_STATE_ERR => c"invalid EE context state",
        ibv_wc_status::IBV_WC_FATAL_ERR => c"fatal error",
        ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => c"response timeout error",
        ibv_wc_status::IBV_WC_GENERAL_ERR => c"general error",
        ibv_wc_status::IBV_WC_TM_ERR => c"tag matching error",
        ibv_wc_status::IBV_WC_TM_RNDV_INCOMPLETE => c"tag matching rendezvous incomplete",
    }
    fn ibv_node_type_str(ibv_node_type) else c"unknown" {
        ibv_node_type::IBV_NODE_CA => c"InfiniBand channel adapter",
        ibv_node_type::IBV_NODE_SWITCH => c"InfiniBand switch",
        ibv_node_type::IBV_NODE_ROUTER => c"InfiniBand router",
        ibv_node_type::IBV_NODE_RNIC => c"iWARP NIC",
        ibv_node_type::IBV_NODE_USNIC => c"usNIC",
        ibv_node_type::IBV_NODE_USNIC_UDP => c"usNIC UDP",
        ibv_node_type::IBV_NODE_UNSPECIFIED => c"unspecified",
    }
    fn ibv_port_state_str(ibv_port_state) else c"unknown" {
        ibv_port_state::IBV_PORT_NOP => c"no state change (NOP)",
        ibv_port_state::IBV_PORT_DOWN => c"down",
        ibv_port_state::IBV_PORT_INIT => c"init",
        ibv_port_state::IBV_PORT_ARMED => c"armed",
        ibv_port_state::IBV_PORT_ACTIVE => c"active",
        ibv_port_state::IBV_PORT_ACTIVE_DEFER => c"active defer",
    }
    fn ibv_event_type_str(ibv_event_type) else c"unknown" {
        ibv_event_type::IBV_EVENT_CQ_ERR => c"CQ error",
        ibv_event_type::IBV_EVENT_QP_FATAL => c"local work queue catastrophic error",
        ibv_event_type::IBV_EVENT_QP_REQ_ERR => c"invalid request local work queue error",
        ibv_event_type::IBV_EVENT_QP_ACCESS_ERR => c"local access violation work queue error",
        ibv_event_type::IBV_EVENT_COMM_EST => c"communication established",
        ibv_event_type::IBV_EVENT_SQ_DRAINED => c"send queue drained",
        ibv_event_type::IBV_EVENT_PATH_MIG => c"path migrated",
        ibv_event_type::IBV_EVENT_PATH_MIG_ERR => c"path migration request error",
        ibv_event_type::IBV_EVENT_DEVICE_FATAL => c"local catastrophic error",
        ibv_event_type::IBV_EVENT_PORT_ACTIVE => c"port active",
        ibv_event_type::IBV_EVENT_PORT_ERR => c"port error",
        ibv_event_type::IBV_EVENT_LID_CHANGE => c"LID change",
        ibv_event_type::IBV_EVENT_PKEY_CHANGE => c"P_Key change",
        ibv_event_type::IBV_EVENT_SM_CHANGE => c"SM change",
        ibv_event_type::IBV_EVENT_SRQ_ERR => c"SRQ catastrophic error",
        ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED => c"SRQ limit reached",
        ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED => c"last WQE reached",
        ibv_event_type::IBV_EVENT_CLIENT_REREGISTER => c"client reregistration",
        ibv_event_type::IBV_EVENT_GID_CHANGE => c"GID table change",
        ibv_event_type::IBV_EVENT_WQ_FATAL => c"work queue fatal error",
    }
}

/// Rates as (`ibv_rate`, multiple of 2.5 Gb/s, Mb/s).
const RATES: &[(ibv_rate, c_int, c_int)] = &[
    (ibv_rate::IBV_RATE_2_5_GBPS, 1, 2500),
    (ibv_rate::IBV_RATE_5_GBPS, 2, 5000),
    (ibv_rate::IBV_RATE_10_GBPS, 4, 10_000),
    (ibv_rate::IBV_RATE_20_GBPS, 8, 20_000),
    (ibv_rate::IBV_RATE_30_GBPS, 12, 30_000),
    (ibv_rate::IBV_RATE_40_GBPS, 16, 40_000),
    (ibv_rate::IBV_RATE_60_GBPS, 24, 60_000),
    (ibv_rate::IBV_RATE_80_GBPS, 32, 80_000),
    (ibv_rate::IBV_RATE_120_GBPS, 48, 120_000),
    (ibv_rate::IBV_RATE_14_GBPS, -1, 14_062),
    (ibv_rate::IBV_RATE_56_GBPS, -1, 56_250),
    (ibv_rate::IBV_RATE_112_GBPS, -1, 112_500),
    (ibv_rate::IBV_RATE_168_GBPS, -1, 168_750),
    (ibv_rate::IBV_RATE_25_GBPS, 10, 25_781),
    (ibv_rate::IBV_RATE_100_GBPS, 40, 103_125),
    (ibv_rate::IBV_RATE_200_GBPS, -1, 206_250),
    (ibv_rate::IBV_RATE_300_GBPS, -1, 309_375),
    (ibv_rate::IBV_RATE_28_GBPS, -1, 28_125),
    (ibv_rate::IBV_RATE_50_GBPS, -1, 53_125),
    (ibv_rate::IBV_RATE_400_GBPS, -1, 425_000),
    (ibv_rate::IBV_RATE_600_GBPS, -1, 637_500),
];

#[unsafe(no_mangle)]
pub extern "C" fn ibv_rate_to_mult(rate: ibv_rate) -> c_int {
    RATES.iter().find(|r| r.0 == rate).map_or(-1, |r| r.1)
}

#[unsafe(no_mangle)]
pub extern "C" fn mult_to_ibv_rate(mult: c_int) -> ibv_rate {
    RATES.iter().find(|r| r.1 == mult && mult > 0).map_or(ibv_rate::IBV_RATE_MAX, |r| r.0)
}

#[unsafe(no_mangle)]
pub extern "C" fn ibv_rate_to_mbps(rate: ibv_rate) -> c_int {
    RATES.iter().find(|r| r.0 == rate).map_or(-1, |r| r.2)
}

#[unsafe(no_mangle)]
pub extern "C" fn mbps_to_ibv_rate(mbps: c_int) -> ibv_rate {
    RATES.iter().find(|r| r.2 == mbps).map_or(ibv_rate::IBV_RATE_MAX, |r| r.0)
}

#[unsafe(no_mangle)]
pub extern "C" fn ibv_get_sysfs_path() -> *const c_char {
    c"/sys".as_ptr()
}

/// Reads `DIR/FILE` into `buf` without its final newline: the number of bytes, or -1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_read_sysfs_file(
    dir: *const c_char,
    file: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> c_int {
    // SAFETY: the caller passes C strings (manual page).
    let dir = unsafe { CStr::from_ptr(dir) };
    // SAFETY: as above.
    let file = unsafe { CStr::from_ptr(file) };
    let path = format!("{}/{}", dir.to_string_lossy(), file.to_string_lossy());
    let Ok(text) = std::fs::read(path) else { return -1 };
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    let length = text.len().min(size);
    // SAFETY: the caller's buffer holds `size` bytes, of which at most that many are written.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), length) };
    if length < size {
        // SAFETY: as above: index `length` is inside the buffer.
        let end = unsafe { buf.add(length) };
        // SAFETY: as above.
        unsafe { *end = 0 };
    }
    c_int::try_from(length).unwrap_or(c_int::MAX)
}

#[unsafe(no_mangle)]
pub extern "C" fn ibv_dontfork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn ibv_dofork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}

/// Exports functions of the verbs library that need a kernel device: they say that there is none.
macro_rules! kernel_only {
    ($($name:ident -> $ret:ty = $failure:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> $ret {
            set_errno(libc::EOPNOTSUPP);
            $failure
        }
    )*};
}

kernel_only! {
    ibv_import_pd -> *mut c_void = ptr::null_mut();
    ibv_unimport_pd -> () = ();
    ibv_import_mr -> *mut c_void = ptr::null_mut();
    ibv_unimport_mr -> () = ();
    ibv_import_dm -> *mut c_void = ptr::null_mut();
    ibv_unimport_dm -> () = ();
    ibv_resolve_eth_l2_from_gid -> c_int = libc::EOPNOTSUPP;
    ibv_copy_ah_attr_from_kern -> () = ();
    ibv_copy_qp_attr_from_kern -> () = ();
    ibv_copy_path_rec_from_kern -> () = ();
    ibv_copy_path_rec_to_kern -> () = ();
}
