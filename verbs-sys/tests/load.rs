//! Opening the system's library, on machines that have one and on machines that have none.

use core::ptr;

use verbs_sys::{LoadError, Verbs};

#[test]
fn the_system_library_works_or_says_what_is_missing() {
    match Verbs::load() {
        Ok(verbs) => {
            let again = Verbs::load().expect("the answer is kept");
            assert!(ptr::eq(verbs, again));
            let mut count = -1;
            // SAFETY: a valid output pointer.
            let list = unsafe { (verbs.ibv_get_device_list)(&raw mut count) };
            // Without the kernel's RDMA support there is no list, and with it perhaps an empty one.
            assert!(list.is_null() || count >= 0);
            if !list.is_null() {
                // SAFETY: a list that was not freed before.
                unsafe { (verbs.ibv_free_device_list)(list) };
            }
        }
        Err(LoadError::NotFound(reason)) => {
            let text = LoadError::NotFound(reason).to_string();
            assert!(text.contains("libibverbs.so.1") && text.contains("install"), "{text}");
        }
        Err(other) => panic!("a libibverbs.so.1 that is none: {other}"),
    }
}
