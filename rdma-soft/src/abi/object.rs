//! C structures with something of ours behind them.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr;

use verbs_sys::inline::set_errno;

/// What a program holds a `*mut C` to: its structure first, our data behind it.
///
/// The structure belongs to the program as much as to us (it reads fields and may write some), so no
/// reference to it is ever made; the data is ours alone.
#[repr(C)]
pub(crate) struct Object<C, T> {
    c: UnsafeCell<C>,
    data: T,
}

impl<C, T> Object<C, T> {
    /// Allocates an object.
    pub(crate) fn allocate(c: C, data: T) -> *mut C {
        Box::into_raw(Box::new(Object { c: UnsafeCell::new(c), data })).cast()
    }

    /// Allocates an object that `make` may fail to make; it gets the object's address, which is its identity
    /// in the device.
    pub(crate) fn create<E>(c: C, make: impl FnOnce(usize) -> Result<T, E>) -> Result<*mut C, E> {
        let place: Box<MaybeUninit<Self>> = Box::new_uninit();
        let data = make(place.as_ptr().addr())?;
        Ok(Box::into_raw(Box::write(place, Object { c: UnsafeCell::new(c), data })).cast())
    }

    /// Our data of an object.
    ///
    /// # Safety
    ///
    /// `raw` came from [`allocate`](Self::allocate) or [`create`](Self::create) of these types, and was not [freed](Self::free).
    pub(crate) unsafe fn data<'a>(raw: *mut C) -> &'a T {
        // SAFETY: the caller's promise; `c` is the first field, so the address is the object's. Only the
        // data is borrowed, which nobody ever borrows mutably.
        unsafe { &(*raw.cast::<Self>()).data }
    }

    /// Frees an object and gives its data back.
    ///
    /// # Safety
    ///
    /// As [`data`](Self::data), and the program uses `raw` no more.
    pub(crate) unsafe fn free(raw: *mut C) -> T {
        // SAFETY: the caller's promise: allocated by `allocate` or `create` as a box, and nobody else's any more.
        let object = unsafe { Box::from_raw(raw.cast::<Self>()) };
        object.data
    }
}

/// All zeros, for structures that are plain data to C.
pub(crate) fn zeroed<C: Zeroable>() -> C {
    // SAFETY: `Zeroable` says that zeros are a value.
    unsafe { std::mem::zeroed() }
}

/// Types of which all zeros are a valid value.
///
/// # Safety
///
/// Implemented for C structures of integers, nullable pointers, optional functions and arrays of them.
pub(crate) unsafe trait Zeroable {}

macro_rules! zeroable {
    ($($ty:ident)*) => {$(
        // SAFETY: generated from a C header: integers, nullable pointers, `Option<fn>`, arrays, unions.
        unsafe impl Zeroable for verbs_sys::$ty {}
    )*};
}

zeroable! {
    ibv_async_event ibv_cq_ex ibv_device ibv_device_attr ibv_device_attr_ex ibv_gid ibv_port_attr ibv_qp_attr
    ibv_qp_ex ibv_qp_init_attr ibv_srq ibv_wc verbs_context ibv_ah_attr
}

/// Null, with `errno` set.
pub(crate) fn null<T>(errno: c_int) -> *mut T {
    set_errno(errno);
    ptr::null_mut()
}

/// -1, with `errno` set.
pub(crate) fn minus_one(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

/// Copies as much of `value` as fits `size` bytes; what a newer program asks for beyond it is zeroed.
///
/// # Safety
///
/// `size` bytes from `to` on are valid for writes.
pub(crate) unsafe fn copy_prefix<T>(value: &T, to: *mut u8, size: usize) {
    let len = size.min(size_of::<T>());
    // SAFETY: the caller's promise, and `len` bytes of a value are readable; they do not overlap, as
    // `value` is ours.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>(), to, len) };
    // SAFETY: as above; `len` is at most `size`.
    let rest = unsafe { to.add(len) };
    // SAFETY: as above.
    unsafe { ptr::write_bytes(rest, 0, size - len) };
}
