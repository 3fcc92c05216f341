//! The objects of a device that unsolicited events are about.

use crate::bindings::*;
use crate::null::cq::Cq;
use crate::null::device::Context;
use crate::null::event::Subject;

/// Live objects. An object is taken off before it is destroyed, under the lock around this
/// structure, so that what stands here is valid while that lock is held.
#[derive(Default)]
pub(super) struct Live {
    pub(super) contexts: Vec<*mut ibv_context>,
    pub(super) cqs: Vec<*mut ibv_cq>,
    pub(super) srqs: Vec<*mut ibv_srq>,
    pub(super) qps: Vec<*mut ibv_qp>,
}

// SAFETY: the objects may be used from any thread, and the pointers only under the lock.
unsafe impl Send for Live {}

impl Live {
    /// The address of the pair of that number, and that of its shared receive queue.
    pub(super) fn pair(&self, number: u32) -> Option<(usize, Option<usize>)> {
        self.qps.iter().find_map(|&qp| {
            // SAFETY: it is live.
            let pair = unsafe { &*qp };
            (pair.qp_num == number).then(|| (qp.addr(), (!pair.srq.is_null()).then(|| pair.srq.addr())))
        })
    }

    pub(super) fn ring_channels(&self) {
        for &cq in &self.cqs {
            // SAFETY: it is live (see the type).
            unsafe { Cq::from_raw(cq) }.notify();
        }
    }

    pub(super) fn raise(&self, event_type: ibv_event_type) {
        let probe = ibv_async_event {
            element: ibv_async_event__bindgen_ty_1 { cq: core::ptr::null_mut() },
            event_type,
        };
        match Subject::of(&probe) {
            Subject::Cq(_) => {
                for &cq in &self.cqs {
                    // SAFETY: it is live.
                    let context = unsafe { (*cq).context };
                    raise(context, event_type, ibv_async_event__bindgen_ty_1 { cq });
                }
            }
            Subject::Srq(_) => {
                for &srq in &self.srqs {
                    // SAFETY: it is live.
                    let context = unsafe { (*srq).context };
                    raise(context, event_type, ibv_async_event__bindgen_ty_1 { srq });
                }
            }
            Subject::Qp(_) => {
                for &qp in &self.qps {
                    // SAFETY: it is live.
                    let context = unsafe { (*qp).context };
                    raise(context, event_type, ibv_async_event__bindgen_ty_1 { qp });
                }
            }
            Subject::Device => {
                for &context in &self.contexts {
                    raise(context, event_type, ibv_async_event__bindgen_ty_1 { port_num: 1 });
                }
            }
        }
    }
}

/// `context` is that of a live object, or a live one itself.
fn raise(context: *mut ibv_context, event_type: ibv_event_type, element: ibv_async_event__bindgen_ty_1) {
    // SAFETY: a context outlives its objects, and is on the list while it is open.
    unsafe { Context::from_raw(context) }.raise(event_type, element);
}
