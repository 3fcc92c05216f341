//! Completion channels and their events.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use verbs_sys::*;

use super::context::{Counted, context_data};
use super::cq;
use super::object::{Object, minus_one, null};
use crate::device::{Channel, Handle, load};

/// Our part of a completion channel.
pub(crate) struct ChannelData {
    device: Arc<Handle>,
    pub(crate) channel: Arc<Channel>,
    _counted: Counted,
}

pub(crate) type CompChannel = Object<ibv_comp_channel, ChannelData>;

pub(crate) unsafe extern "C" fn create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let channel = match Channel::new() {
        Ok(channel) => Arc::new(channel),
        Err(e) => return null(e.raw_os_error().unwrap_or(libc::EMFILE)),
    };
    let c = ibv_comp_channel { context, fd: channel.fd(), refcnt: 0 };
    CompChannel::allocate(
        c,
        ChannelData { device: Arc::clone(&data.device), channel, _counted: Counted::new(data) },
    )
}

pub(crate) unsafe extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the caller passes a live channel.
    let data = unsafe { CompChannel::data(channel) };
    if load(&data.channel.users) > 0 {
        return libc::EBUSY;
    }
    // SAFETY: as above, and the caller uses it no more.
    drop(unsafe { CompChannel::free(channel) });
    0
}

/// `man ibv_get_cq_event`.
pub(crate) unsafe extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller passes a live channel.
    let data = unsafe { CompChannel::data(channel) };
    let queue = match data.channel.take(&data.device) {
        Ok(queue) => queue,
        Err(e) => return minus_one(e.raw_os_error().unwrap_or(libc::EAGAIN)),
    };
    let (raw, context) = cq::of_identity(queue.identity);
    // SAFETY: the caller passes pointers that are valid for writes.
    unsafe { *cq = raw };
    // SAFETY: as above.
    unsafe { *cq_context = context };
    0
}

pub(crate) unsafe extern "C" fn ack_cq_events(cq: *mut ibv_cq, n: c_uint) {
    // SAFETY: the caller passes a live completion queue.
    unsafe { cq::data(cq) }.queue.completion_events.acknowledge(n);
}
