//! Asynchronous events.

use std::ffi::c_int;
use std::ptr;

use verbs_sys::*;

use super::context::context_data;
use super::object::{minus_one, zeroed};
use super::{cq, qp, srq};
use crate::device::AsyncEvent;
use crate::proto::Event;

fn event_type(event: AsyncEvent) -> ibv_event_type {
    match event {
        AsyncEvent::CqError => ibv_event_type::IBV_EVENT_CQ_ERR,
        AsyncEvent::LastWqeReached => ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED,
        AsyncEvent::SrqLimitReached => ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED,
        AsyncEvent::Qp(Event::CommunicationEstablished) => ibv_event_type::IBV_EVENT_COMM_EST,
        AsyncEvent::Qp(Event::SendQueueDrained) => ibv_event_type::IBV_EVENT_SQ_DRAINED,
        AsyncEvent::Qp(Event::RequestError) => ibv_event_type::IBV_EVENT_QP_REQ_ERR,
        AsyncEvent::Qp(Event::AccessError) => ibv_event_type::IBV_EVENT_QP_ACCESS_ERR,
        AsyncEvent::Qp(Event::Fatal) => ibv_event_type::IBV_EVENT_QP_FATAL,
    }
}

pub(crate) unsafe extern "C" fn get_async_event(
    context: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    // SAFETY: the caller passes a live context.
    let data = unsafe { context_data(context) };
    let taken = match data.async_events.take() {
        Ok(taken) => taken,
        Err(e) => return minus_one(e.raw_os_error().unwrap_or(libc::EAGAIN)),
    };
    let mut told: ibv_async_event = zeroed();
    told.event_type = event_type(taken.event);
    // All members of the union are pointers to the object.
    told.element.cq = ptr::with_exposed_provenance_mut(taken.identity);
    // SAFETY: the caller passes a pointer that is valid for writes.
    unsafe { event.write(told) };
    0
}

pub(crate) unsafe extern "C" fn ack_async_event(event: *mut ibv_async_event) {
    // SAFETY: the caller passes an event that `get_async_event` gave, whose object is live: its destroy call
    // waits for this one.
    let told = unsafe { &*event };
    match told.event_type {
        ibv_event_type::IBV_EVENT_CQ_ERR => {
            // SAFETY: an event of this type has a completion queue.
            let raw = unsafe { told.element.cq };
            // SAFETY: which is live, as above.
            unsafe { cq::data(raw) }.queue.async_event_count.acknowledge(1);
        }
        ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED => {
            // SAFETY: an event of this type has a shared receive queue.
            let raw = unsafe { told.element.srq };
            // SAFETY: which is live, as above.
            unsafe { srq::data(raw) }.queue.event_count.acknowledge(1);
        }
        _ => {
            // SAFETY: every other event of this device has a queue pair.
            let raw = unsafe { told.element.qp };
            // SAFETY: which is live, as above.
            unsafe { qp::data(raw) }.qp.event_count.acknowledge(1);
        }
    }
}
