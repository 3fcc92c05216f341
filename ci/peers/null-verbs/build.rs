//! Programs that were linked against libibverbs ask for it by this name.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libibverbs.so.1");
}
