//! The functions that `libibverbs.so.1` exports, as a table that any provider can fill.

use core::error::Error;
use core::ffi::{c_char, c_int, c_uint, c_void};
use core::iter::successors;
use std::sync::OnceLock;

use crate::bindings::*;

/// Why the system's library could not be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The dynamic linker did not find or could not load the library.
    #[error(
        "libibverbs.so.1 could not be opened ({0}); install it with `apt-get install libibverbs1 ibverbs-providers` \
         (Debian, Ubuntu) or `dnf install libibverbs` (Fedora, RHEL)"
    )]
    NotFound(String),
    /// The library lacks a function that every release since 1.1 has.
    #[error("libibverbs.so.1 lacks the symbol {symbol} ({reason}); it is not a libibverbs of rdma-core")]
    MissingSymbol {
        /// The symbol's name.
        symbol: &'static str,
        /// The dynamic linker's words.
        reason: String,
    },
}

macro_rules! table {
    (
        required { $($name:ident: fn($($arg:ty),* $(,)?) $(-> $ret:ty)?;)* }
        optional { $($oname:ident = $osym:literal: fn($($oarg:ty),* $(,)?) $(-> $oret:ty)?;)* }
    ) => {
        /// The exported verbs of one provider.
        ///
        /// Each field is the C function of that name, with the contract of its manual page.
        /// Functions that older releases lack are `Option`s. The data path is not here: it goes
        /// through the tables of the objects, see [`inline`](crate::inline).
        #[derive(Debug, Clone, Copy)]
        #[allow(missing_docs, reason = "each field is the C function of that name")]
        #[non_exhaustive]
        pub struct Verbs {
            $(pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            $(pub $oname: Option<unsafe extern "C" fn($($oarg),*) $(-> $oret)?>,)*
        }

        impl Verbs {
            /// A table of the functions that every provider has; the optional ones are empty.
            #[must_use]
            #[allow(clippy::too_many_arguments, reason = "one argument per required verb, in the order of the fields")]
            pub const fn new($($name: unsafe extern "C" fn($($arg),*) $(-> $ret)?),*) -> Verbs {
                Verbs { $($name,)* $($oname: None),* }
            }

            fn from_library(library: &libloading::Library) -> Result<Verbs, LoadError> {
                Ok(Verbs {
                    $($name: {
                        // SAFETY: the symbol has this signature in every release of rdma-core since it
                        // appeared (the ABI check in ci/ compares them with the headers).
                        let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        *symbol.map_err(|e: libloading::Error| LoadError::MissingSymbol {
                            symbol: stringify!($name),
                            reason: in_full(&e),
                        })?
                    },)*
                    $($oname: {
                        // SAFETY: as above.
                        unsafe { library.get(concat!($osym, "\0").as_bytes()) }.ok().map(|s| *s)
                    },)*
                })
            }
        }
    };
}

table! {
    required {
        ibv_get_device_list: fn(*mut c_int) -> *mut *mut ibv_device;
        ibv_free_device_list: fn(*mut *mut ibv_device);
        ibv_get_device_name: fn(*mut ibv_device) -> *const c_char;
        ibv_get_device_guid: fn(*mut ibv_device) -> __be64;
        ibv_open_device: fn(*mut ibv_device) -> *mut ibv_context;
        ibv_close_device: fn(*mut ibv_context) -> c_int;
        ibv_get_async_event: fn(*mut ibv_context, *mut ibv_async_event) -> c_int;
        ibv_ack_async_event: fn(*mut ibv_async_event);
        ibv_query_device: fn(*mut ibv_context, *mut ibv_device_attr) -> c_int;
        ibv_query_port: fn(*mut ibv_context, u8, *mut _compat_ibv_port_attr) -> c_int;
        ibv_query_gid: fn(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
        ibv_query_pkey: fn(*mut ibv_context, u8, c_int, *mut __be16) -> c_int;
        ibv_alloc_pd: fn(*mut ibv_context) -> *mut ibv_pd;
        ibv_dealloc_pd: fn(*mut ibv_pd) -> c_int;
        ibv_reg_mr: fn(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
        ibv_dereg_mr: fn(*mut ibv_mr) -> c_int;
        ibv_create_comp_channel: fn(*mut ibv_context) -> *mut ibv_comp_channel;
        ibv_destroy_comp_channel: fn(*mut ibv_comp_channel) -> c_int;
        ibv_create_cq: fn(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        ibv_resize_cq: fn(*mut ibv_cq, c_int) -> c_int;
        ibv_destroy_cq: fn(*mut ibv_cq) -> c_int;
        ibv_get_cq_event: fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        ibv_ack_cq_events: fn(*mut ibv_cq, c_uint);
        ibv_create_srq: fn(*mut ibv_pd, *mut ibv_srq_init_attr) -> *mut ibv_srq;
        ibv_modify_srq: fn(*mut ibv_srq, *mut ibv_srq_attr, c_int) -> c_int;
        ibv_query_srq: fn(*mut ibv_srq, *mut ibv_srq_attr) -> c_int;
        ibv_destroy_srq: fn(*mut ibv_srq) -> c_int;
        ibv_create_qp: fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
        ibv_modify_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
        ibv_query_qp: fn(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
        ibv_destroy_qp: fn(*mut ibv_qp) -> c_int;
        ibv_create_ah: fn(*mut ibv_pd, *mut ibv_ah_attr) -> *mut ibv_ah;
        ibv_destroy_ah: fn(*mut ibv_ah) -> c_int;
        ibv_attach_mcast: fn(*mut ibv_qp, *const ibv_gid, u16) -> c_int;
        ibv_detach_mcast: fn(*mut ibv_qp, *const ibv_gid, u16) -> c_int;
    }
    optional {
        ibv_get_device_index = "ibv_get_device_index": fn(*mut ibv_device) -> c_int;
        ibv_get_pkey_index = "ibv_get_pkey_index": fn(*mut ibv_context, u8, __be16) -> c_int;
        ibv_query_gid_ex = "_ibv_query_gid_ex": fn(*mut ibv_context, u32, u32, *mut ibv_gid_entry, u32, usize) -> c_int;
        ibv_query_gid_table = "_ibv_query_gid_table": fn(*mut ibv_context, *mut ibv_gid_entry, usize, u32, usize) -> isize;
        ibv_reg_mr_iova = "ibv_reg_mr_iova": fn(*mut ibv_pd, *mut c_void, usize, u64, c_int) -> *mut ibv_mr;
        ibv_reg_mr_iova2 = "ibv_reg_mr_iova2": fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
        ibv_reg_dmabuf_mr = "ibv_reg_dmabuf_mr": fn(*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
        ibv_rereg_mr = "ibv_rereg_mr": fn(*mut ibv_mr, c_int, *mut ibv_pd, *mut c_void, usize, c_int) -> c_int;
        ibv_init_ah_from_wc = "ibv_init_ah_from_wc": fn(*mut ibv_context, u8, *mut ibv_wc, *mut ibv_grh, *mut ibv_ah_attr) -> c_int;
        ibv_create_ah_from_wc = "ibv_create_ah_from_wc": fn(*mut ibv_pd, *mut ibv_wc, *mut ibv_grh, u8) -> *mut ibv_ah;
        ibv_qp_to_qp_ex = "ibv_qp_to_qp_ex": fn(*mut ibv_qp) -> *mut ibv_qp_ex;
        ibv_query_qp_data_in_order = "ibv_query_qp_data_in_order": fn(*mut ibv_qp, ibv_wr_opcode, u32) -> c_int;
        ibv_query_ece = "ibv_query_ece": fn(*mut ibv_qp, *mut ibv_ece) -> c_int;
        ibv_set_ece = "ibv_set_ece": fn(*mut ibv_qp, *mut ibv_ece) -> c_int;
        ibv_fork_init = "ibv_fork_init": fn() -> c_int;
        ibv_is_fork_initialized = "ibv_is_fork_initialized": fn() -> ibv_fork_status;
        ibv_import_device = "ibv_import_device": fn(c_int) -> *mut ibv_context;
    }
}

impl Verbs {
    /// The system's `libibverbs.so.1`, opened once per process and never closed (its providers
    /// register exit handlers and cannot be unloaded).
    ///
    /// # Errors
    ///
    /// [`LoadError`] when the library is not there or is no libibverbs; the answer is kept too.
    pub fn load() -> Result<&'static Verbs, LoadError> {
        static SYSTEM: OnceLock<Result<Verbs, LoadError>> = OnceLock::new();
        SYSTEM
            .get_or_init(|| {
                let library = open("libibverbs.so.1")?;
                let verbs = Verbs::from_library(&library)?;
                std::mem::forget(library);
                Ok(verbs)
            })
            .as_ref()
            .map_err(Clone::clone)
    }
}

fn open(name: &str) -> Result<libloading::Library, LoadError> {
    // SAFETY: loading libibverbs runs its initialisers, which have no preconditions.
    unsafe { libloading::Library::new(name) }.map_err(|error| LoadError::NotFound(in_full(&error)))
}

/// An error with its sources: the dynamic linker's own words are the source of "dlopen failed".
fn in_full(error: &dyn Error) -> String {
    let sources = successors(error.source(), |&error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_without_verbs_is_named_as_such() {
        let library = open("libc.so.6").unwrap();
        let error = Verbs::from_library(&library).unwrap_err();
        assert!(matches!(error, LoadError::MissingSymbol { symbol: "ibv_get_device_list", .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("undefined symbol: ibv_get_device_list"), "{text}");
    }

    #[test]
    fn a_library_that_is_not_there_comes_with_the_linkers_words() {
        let error = open("libibverbs-that-is-not-there.so.1").unwrap_err();
        assert!(error.to_string().contains("No such file or directory"), "{error}");
    }
}
