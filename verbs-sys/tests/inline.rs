//! The inline verbs over a context made by hand: slots that are missing, and contexts too old for them.

use core::ffi::c_int;
use core::mem::{offset_of, zeroed};
use core::ptr;

use verbs_sys::inline::{self, ABI_EXTENDED, errno, set_errno};
use verbs_sys::*;

/// An extended context with the given size, and a queue pair, completion queue and so on in it.
struct Objects {
    extended: verbs_context,
    qp: ibv_qp,
    cq: ibv_cq,
    srq: ibv_srq,
    pd: ibv_pd,
    mw: ibv_mw,
}

const FULL: usize = size_of::<verbs_context>();

fn objects(abi_compat: *mut core::ffi::c_void, sz: usize) -> Box<Objects> {
    // SAFETY: all zeroes is valid for every field: null pointers, empty slots, unlocked mutexes.
    let mut objects: Box<Objects> = Box::new(unsafe { zeroed() });
    objects.extended.sz = sz;
    objects.extended.context.abi_compat = abi_compat;
    let context = objects.context();
    objects.qp.context = context;
    objects.cq.context = context;
    objects.srq.context = context;
    objects.pd.context = context;
    objects.mw =
        ibv_mw { context, pd: &raw mut objects.pd, rkey: 0, handle: 0, type_: ibv_mw_type::IBV_MW_TYPE_1 };
    objects
}

impl Objects {
    fn context(&mut self) -> *mut ibv_context {
        let extended = &raw mut self.extended;
        // From a pointer to the whole structure, as a provider does.
        extended.wrapping_byte_add(offset_of!(verbs_context, context)).cast()
    }
}

unsafe extern "C" fn query_port(_: *mut ibv_context, port: u8, _: *mut ibv_port_attr, size: usize) -> c_int {
    assert_eq!(size, size_of::<ibv_port_attr>());
    port.into()
}

unsafe extern "C" fn poll(_: *mut ibv_cq, entries: c_int, _: *mut ibv_wc) -> c_int {
    entries
}

#[test]
fn empty_slots_are_not_supported() {
    let mut o = objects(ABI_EXTENDED, FULL);
    let o = &mut *o;
    let context = o.context();
    let no = libc::EOPNOTSUPP;
    let mut send = ibv_send_wr::default();
    let mut bad = ptr::null_mut();
    // SAFETY: live objects throughout; no slot is filled, so nothing is read through the other pointers.
    assert_eq!(unsafe { inline::ibv_post_send(&raw mut o.qp, &raw mut send, &raw mut bad) }, no);
    assert_eq!(bad, &raw mut send, "nothing was posted");
    let mut receive = ibv_recv_wr::default();
    let mut bad = ptr::null_mut();
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_post_recv(&raw mut o.qp, &raw mut receive, &raw mut bad) }, no);
    assert_eq!(bad, &raw mut receive);
    let mut bad = ptr::null_mut();
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_post_srq_recv(&raw mut o.srq, &raw mut receive, &raw mut bad) }, no);
    assert_eq!(bad, &raw mut receive);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_poll_cq(&raw mut o.cq, 1, ptr::null_mut()) }, -no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_req_notify_cq(&raw mut o.cq, 0) }, no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_dealloc_mw(&raw mut o.mw) }, no);
    let mut bind = ibv_mw_bind::default();
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_bind_mw(&raw mut o.qp, &raw mut o.mw, &raw mut bind) }, no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_modify_cq(&raw mut o.cq, ptr::null_mut()) }, no);
    let advice = ib_uverbs_advise_mr_advice(0);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_advise_mr(&raw mut o.pd, advice, 0, ptr::null_mut(), 0) }, no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_query_rt_values_ex(context, ptr::null_mut()) }, no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_query_device_ex(context, ptr::null(), ptr::null_mut()) }, no);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_query_port_ex(context, 1, ptr::null_mut()) }, None);
    let created = |name: &str, object: bool| {
        assert!(!object && errno() == no, "{name}");
        set_errno(0);
    };
    set_errno(0);
    // SAFETY: as above.
    created("alloc_mw", !unsafe { inline::ibv_alloc_mw(&raw mut o.pd, ibv_mw_type(1)) }.is_null());
    // SAFETY: as above.
    created("create_cq_ex", !unsafe { inline::ibv_create_cq_ex(context, ptr::null_mut()) }.is_null());
    // SAFETY: as above.
    created("create_qp_ex", !unsafe { inline::ibv_create_qp_ex(context, ptr::null_mut()) }.is_null());
    // SAFETY: as above.
    created("alloc_null_mr", !unsafe { inline::ibv_alloc_null_mr(&raw mut o.pd) }.is_null());
    // SAFETY: as above.
    created("alloc_td", !unsafe { inline::ibv_alloc_td(context, ptr::null_mut()) }.is_null());
    // SAFETY: as above.
    created("parent_domain", !unsafe { inline::ibv_alloc_parent_domain(context, ptr::null_mut()) }.is_null());
}

#[test]
fn filled_slots_are_called() {
    let mut o = objects(ABI_EXTENDED, FULL);
    o.extended.query_port = Some(query_port);
    o.extended.context.ops.poll_cq = Some(poll);
    let context = o.context();
    // SAFETY: live objects; the slots ignore the null pointers.
    assert_eq!(unsafe { inline::ibv_query_port_ex(context, 7, ptr::null_mut()) }, Some(7));
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_poll_cq(&raw mut o.cq, 5, ptr::null_mut()) }, 5);
}

#[test]
fn a_context_of_an_older_library_lacks_the_slots_in_front() {
    // `query_port` is the first slot: a context that is one pointer shorter does not have it.
    for (sz, has) in [(FULL, true), (FULL - size_of::<usize>(), false), (0, false)] {
        let mut o = objects(ABI_EXTENDED, sz);
        o.extended.query_port = Some(query_port);
        let context = o.context();
        // SAFETY: a live context; the slot ignores the null pointer.
        let result = unsafe { inline::ibv_query_port_ex(context, 7, ptr::null_mut()) };
        assert_eq!(result.is_some(), has, "sz {sz}");
    }
}

#[test]
fn a_plain_context_has_no_extended_slots() {
    let mut o = objects(ptr::null_mut(), FULL);
    o.extended.query_port = Some(query_port);
    let context = o.context();
    // SAFETY: a live context.
    assert_eq!(unsafe { inline::verbs_get_ctx(context) }, None);
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_query_port_ex(context, 7, ptr::null_mut()) }, None);
}

#[test]
fn binding_a_window_is_checked_before_the_provider_sees_it() {
    let mut o = objects(ABI_EXTENDED, FULL);
    let o = &mut *o;
    let mut other = ibv_pd { context: ptr::null_mut(), handle: 0 };
    let mut mr = ibv_mr { pd: &raw mut other, ..Default::default() };
    let mut bind = ibv_mw_bind::default();
    bind.bind_info.length = 1;
    // SAFETY: live objects.
    assert_eq!(unsafe { inline::ibv_bind_mw(&raw mut o.qp, &raw mut o.mw, &raw mut bind) }, libc::EINVAL);
    bind.bind_info.mr = &raw mut mr;
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_bind_mw(&raw mut o.qp, &raw mut o.mw, &raw mut bind) }, libc::EPERM);
    o.mw.type_ = ibv_mw_type::IBV_MW_TYPE_2;
    // SAFETY: as above.
    assert_eq!(unsafe { inline::ibv_bind_mw(&raw mut o.qp, &raw mut o.mw, &raw mut bind) }, libc::EINVAL);
}

#[test]
fn only_the_consumers_bits_of_a_key_count_up() {
    assert_eq!(inline::ibv_inc_rkey(0x1234_5600), 0x1234_5601);
    assert_eq!(inline::ibv_inc_rkey(0x1234_56ff), 0x1234_5600);
}
