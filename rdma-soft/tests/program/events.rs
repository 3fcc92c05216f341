//! Polling, arming and events.

use std::ptr;

use verbs_sys::inline::*;
use verbs_sys::*;

use super::input::Input;
use super::world::{World, v, zeroed};

impl World {
    /// Polls up to `max` completions.
    pub fn poll_some(&mut self, cq: *mut ibv_cq, max: usize) -> usize {
        let mut room: [ibv_wc; 16] = std::array::from_fn(|_| zeroed());
        let n = unsafe { ibv_poll_cq(cq, max.min(room.len()) as i32, room.as_mut_ptr()) };
        let n = usize::try_from(n).expect("polling does not fail");
        assert!(n <= max);
        self.polled(cq, n);
        for wc in &room[..n] {
            self.account(cq, wc.wr_id, wc.status, wc.qp_num);
        }
        n
    }

    fn polled(&mut self, cq: *mut ibv_cq, n: usize) {
        let queue = self.queue(cq);
        queue.due = queue.due.saturating_sub(n);
    }

    pub fn poll(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.queues.len()) else { return };
        let (max, times) = (usize::from(input.byte() % 17), input.byte() % 32);
        // A poll in vain means that there was nothing to do, and gives the processor away, which takes its time.
        let mut polls = 0..=times;
        while polls.next().is_some() && self.poll_some(self.queues[place].raw, max) > 0 {}
    }

    pub fn poll_extended(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.queues.len()) else { return };
        let raw = self.queues[place].raw;
        let cq: *mut ibv_cq_ex = raw.cast();
        // Filled for queues that were created so.
        if unsafe { (*cq).start_poll.is_none() } {
            return;
        }
        let mut attr = ibv_poll_cq_attr { comp_mask: u32::from(input.byte() == 0xff) };
        let mut code = unsafe { (*cq).start_poll.unwrap()(cq, &mut attr) };
        if code == libc::EINVAL {
            return;
        }
        for _ in 0..=input.byte() % 8 {
            if code != 0 {
                break;
            }
            let (wr_id, status) = unsafe { ((*cq).wr_id, (*cq).status) };
            let qp_num = unsafe {
                (*cq).read_opcode.unwrap()(cq);
                (*cq).read_byte_len.unwrap()(cq);
                (*cq).read_imm_data.unwrap()(cq);
                (*cq).read_src_qp.unwrap()(cq);
                (*cq).read_wc_flags.unwrap()(cq);
                (*cq).read_completion_ts.unwrap()(cq);
                (*cq).read_completion_wallclock_ns.unwrap()(cq);
                (*cq).read_qp_num.unwrap()(cq)
            };
            self.polled(raw, 1);
            self.account(raw, wr_id, status, qp_num);
            code = unsafe { (*cq).next_poll.unwrap()(cq) };
            if code == 0 {
                continue;
            }
            assert_eq!(code, libc::ENOENT);
        }
        if code == 0 {
            // The cursor stands on one more, which is consumed with the end.
            let (wr_id, status) = unsafe { ((*cq).wr_id, (*cq).status) };
            let qp_num = unsafe { (*cq).read_qp_num.unwrap()(cq) };
            self.polled(raw, 1);
            self.account(raw, wr_id, status, qp_num);
        }
        unsafe { (*cq).end_poll.unwrap()(cq) };
    }

    pub fn arm(&mut self, input: &mut Input<'_>) {
        let Some(place) = input.place(self.queues.len()) else { return };
        let cq = self.queues[place].raw;
        let how = input.byte();
        unsafe {
            assert_eq!(ibv_req_notify_cq(cq, i32::from(how & 1)), 0);
            if how & 2 != 0 {
                let mut attr = ibv_modify_cq_attr {
                    attr_mask: u32::from(how >> 2 & 3),
                    moderate: ibv_moderate_cq {
                        cq_count: u16::from(input.byte() % 8),
                        cq_period: u16::from(input.byte()) * 8,
                    },
                };
                ibv_modify_cq(cq, &mut attr);
            }
        }
    }

    /// Takes and acknowledges every event there is.
    pub fn take_events(&mut self) {
        let (mut cq, mut cq_context) = (ptr::null_mut(), ptr::null_mut());
        while unsafe { (v().ibv_get_cq_event)(self.channel, &mut cq, &mut cq_context) } == 0 {
            self.queue(cq);
            unsafe { (v().ibv_ack_cq_events)(cq, 1) };
        }
        assert_eq!(errno(), libc::EAGAIN);
        let mut event: ibv_async_event = zeroed();
        while unsafe { (v().ibv_get_async_event)(self.context, &mut event) } == 0 {
            let object = unsafe { event.element.qp }.cast::<()>();
            match event.event_type {
                ibv_event_type::IBV_EVENT_CQ_ERR => {
                    assert!(self.queue(object.cast()).lossy, "an overrun though there was room");
                }
                ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED => {
                    assert!(self.shared.iter().any(|shared| shared.raw.cast() == object));
                }
                _ => assert!(self.pairs.iter().any(|pair| pair.raw.cast() == object)),
            }
            unsafe { (v().ibv_ack_async_event)(&mut event) };
        }
        assert_eq!(errno(), libc::EAGAIN);
    }
}
