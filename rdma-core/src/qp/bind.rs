//! Binding of type 1 memory windows.

use verbs_sys::{ibv_mw_bind, ibv_mw_bind_info, ibv_send_flags};

use super::QueuePair;
use super::post::fill;
use super::state::{CanSend, State};
use super::transport::{Connected, Transport};
use crate::Error;
use crate::cq::Opcode;
use crate::inflight::{Meta, Operation, Posted, QueueRef};
use crate::mr::{RemoteAccess, RemoteSlice, SharedSlice};
use crate::mw::{Binding, MemoryWindow, WindowType};

impl Binding {
    /// As the verbs take it.
    pub(super) fn info(&self) -> ibv_mw_bind_info {
        ibv_mw_bind_info {
            mr: self.slice.region().inner.mr.as_ptr(),
            addr: self.slice.remote().addr,
            length: self.slice.len() as u64,
            mw_access_flags: self.access.bits(),
        }
    }
}

impl<T: Transport, S: State> QueuePair<T, S> {
    /// Binds a window of type 1 to `slice` (`man ibv_bind_mw`): an [`Operation`] of the send queue,
    /// and the token that peers can use once it completed.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] as for [`MemoryWindow::bind`], a full queue, and what `ibv_bind_mw` says.
    pub fn bind_window(
        &self,
        window: &MemoryWindow,
        slice: &SharedSlice,
        access: RemoteAccess,
    ) -> Result<(Operation<QueueRef<'_>>, RemoteSlice), Error>
    where
        T: Connected,
        S: CanSend,
    {
        let inner = &*self.inner;
        if window.window_type() != WindowType::One {
            return Err(Error::Invalid {
                what: "a window of type 2 is bound by MemoryWindow::bind".to_owned(),
            });
        }
        let binding = window.binding(slice, access, 0)?;
        if !std::sync::Arc::ptr_eq(&binding.window.pd, &inner.pd) {
            return Err(Error::Invalid { what: "the window is of another protection domain".to_owned() });
        }
        let gone = Error::Post(super::PostErrorKind::WindowGone);
        let mw = binding.window.ptr().ok_or(gone)?.as_ptr();
        let full = Error::Post(super::PostErrorKind::QueueFull);
        let queue = &*inner.sq;
        queue.slots.prepare_owned();
        let mut guard = queue.lock_post();
        let post = &mut *guard;
        let Some(free) = queue.acquire_paid(post) else { return Err(full) };
        // SAFETY: the poster owns the payload; a bind has no list.
        unsafe {
            fill(
                free.payload(),
                Meta { id: 0, keep: Some(binding.keep()), seq: post.seq, held: 0, opcode: Opcode::Bind },
            )
        };
        let id = free.publish(Posted::Owned.step());
        let mut bind = ibv_mw_bind {
            wr_id: id.0,
            send_flags: ibv_send_flags::IBV_SEND_SIGNALED.0,
            bind_info: binding.info(),
        };
        // SAFETY: pair, window and region are live (S-1), and the slot keeps window and region so until
        // the completion (S-2).
        let code = unsafe { verbs_sys::inline::ibv_bind_mw(inner.ptr.as_ptr(), mw, &raw mut bind) };
        if code != 0 {
            queue.return_credits(1);
            queue.slots.set_cursor(&mut post.cursor, id.slot());
            drop(queue.retract(id.slot(), true));
            return Err(Error::verb("ibv_bind_mw", crate::error::from_return(code)));
        }
        post.seq = post.seq.wrapping_add(1);
        // SAFETY: live; the verb wrote the new key, and only binds of this window write it.
        let rkey = unsafe { (*mw).rkey };
        drop(guard);
        binding.note(rkey);
        // SAFETY: just published as owned in this queue.
        let operation = unsafe { Operation::new(QueueRef(&inner.sq), id.slot()) };
        Ok((operation, RemoteSlice { rkey, ..slice.remote() }))
    }
}
