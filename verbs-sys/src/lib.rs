//! The C ABI of libibverbs: types, constants, inline verbs and the table of functions
