//! The C ABI of libibverbs: types, constants, inline verbs and the table of functions.
//!
//! This crate is the seam between safe code and whatever provides RDMA verbs: the system's
//! `libibverbs.so.1`, a device in user space, or a provider made for tests. It links nothing and
//! needs no headers: [`bindings`] is generated once from rdma-core's headers and committed, and
//! the library is opened at run time.
//!
//! * [`bindings`] (re-exported here): structures, constants, and C enums as integer newtypes, so
//!   that a value a newer driver returns is a value, not undefined behaviour.
//! * [`inline`]: the verbs that `verbs.h` defines as inline functions over `ibv_context.ops`,
//!   `verbs_context`, `ibv_qp_ex` and `ibv_cq_ex`. A slot that the provider left empty gives
//!   `EOPNOTSUPP`, never a call through a null pointer.
//! * [`Verbs`]: the functions that the library exports, as a table. [`Verbs::load`] fills it from
//!   the system's library; other providers build their own.
//! * `null` and `evil` (feature `test-providers`): a provider that completes every work request at once, to measure what our
//!   own code costs, and one that misbehaves on purpose.
//!
//! Everything here mirrors C: the functions are unsafe, and their contracts are those of the
//! manual pages of rdma-core (`man ibv_post_send` and so on).

/// Structures and constants, generated from `infiniband/verbs.h` by `ci/bindgen.sh`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::allow_attributes_without_reason,
    reason = "generated code, named as in C and documented by the manual pages of rdma-core"
)]
pub mod bindings;
pub use bindings::*;

pub mod inline;

mod table;
pub use table::{LoadError, Verbs};

mod names;

#[cfg(feature = "test-providers")]
pub mod evil;
#[cfg(feature = "test-providers")]
pub mod null;
